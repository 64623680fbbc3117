"""Who is fastest with the FP8 inference operator, for docs/inference.md.

For each results file: a sentence for replays and one for eager calls, in how many cases ours takes less time than
*every* other contender, and by name where it does not; the others one by one; then every case beside the fastest of the
others, and what a small batch costs as fixed time and time an expert.
"""

from __future__ import annotations

from typing import Any

from supersonic_moe.bench.markdown import markdown, mean, metric_label, number, origin, times
from supersonic_moe.bench.report import Row, geomean

_CASES = {"infer-ds": "cases of DeepSeek-V3's experts", "infer-models": "cases of served models"}
NAMES = tuple(_CASES)
NOT_RUN = """\
Not measured with the kernels of this commit yet. On an H200, with the peers of `bench/infer_peers.py` on the path:

```bash
supersonic-moe bench infer --json infer-ds.json --png infer-ds.png
supersonic-moe bench infer --set models --json infer-models.json --png infer-models.png
```"""

_COLUMNS = ("hits", "rows", "floor_us", "replay_us", "of_floor", "eager_us", "host_us")
_WAYS = {"replay_us": "In a CUDA graph", "eager_us": "Eager"}
_SURE = 1.02  # one run cannot tell less apart


def page(contents: dict[str, dict[str, Any]]) -> str:
    """Of the files of ``NAMES`` that there are."""
    sections = []
    for name, content in contents.items():
        rows = [Row(**row) for row in content["rows"]]
        sections.append(f"**{name}**: {origin(content)}.")
        sections += [_standing(rows, metric) for metric in _WAYS]
        sections += [_peers(rows), _cases(rows), _fits(rows)]
    return "\n\n".join(filter(None, sections)) or NOT_RUN


def in_short(contents: dict[str, dict[str, Any]]) -> list[str]:
    """One sentence about replays of all files, if there are any."""
    counts = []
    for name, content in contents.items():
        best = _fastest([Row(**row) for row in content["rows"]], "replay_us").values()
        ratios = [row.ratio or 0.0 for row in best if row is not None]
        if ratios:
            ahead = sum(ratio >= 1 for ratio in ratios)
            counts.append(f"{ahead} of {len(ratios)} {_CASES[name]} (geometric mean {times(geomean(ratios))})")
    if not counts:
        return []
    text = "FP8 inference takes less time than the fastest of six operators of DeepGEMM's and SGLang's products in "
    text += f"{' and '.join(counts)}"
    return [f"{text}: [docs/inference.md](docs/inference.md#speed) names the others."]


def _fastest(rows: list[Row], metric: str) -> dict[str, Row | None]:
    """The fastest of the others at each case, if there is one."""
    found: dict[str, Row | None] = {}
    for row in rows:
        if row.metric == metric:
            best = found.setdefault(row.case, None)
            if row.peer_value is not None and (best is None or row.peer_value < (best.peer_value or 0.0)):
                found[row.case] = row
    return found


def _standing(rows: list[Row], metric: str) -> str:
    best = {case: row for case, row in _fastest(rows, metric).items() if row is not None}
    if not best:
        return ""
    ratios = {case: row.ratio or 0.0 for case, row in best.items()}
    behind = [f"{row.peer} at `{case}` ({ratios[case]:.3f}×)" for case, row in best.items() if ratios[case] < 1]
    close = sum(1 <= ratio < _SURE for ratio in ratios.values())
    text = f"{_WAYS[metric]}, ours takes less time than every other in {len(best) - len(behind)} of {len(best)} cases"
    text += f" ({close} of them by less than 2 %)" if close else ""
    text += f", the geometric mean over the fastest of the others is {times(geomean(list(ratios.values())))}."
    return text + (f" Ahead of ours: {'; '.join(behind)}." if behind else "")


def _peers(rows: list[Row]) -> str:
    """A line for each of the others: how many times longer it takes."""
    peers = dict.fromkeys(row.peer for row in rows if row.peer and row.ratio is not None)
    lines = []
    for peer in peers:
        line = [peer or ""]
        for metric in _WAYS:
            ratios = [row.ratio for row in rows if (row.peer, row.metric) == (peer, metric)]
            found = [ratio for ratio in ratios if ratio is not None]
            line += [mean(ratios), f"{min(found):.2f} to {max(found):.2f}" if found else "–"]
        lines.append(line)
    head = [
        "time over ours",
        *(cell for way in _WAYS.values() for cell in (f"{way}: geometric mean", "lowest to highest")),
    ]
    return markdown(head, lines) if lines else ""


def _cases(rows: list[Row]) -> str:
    values = {(row.case, row.metric): row.value for row in rows}
    lines = []
    for case, best in _fastest(rows, "replay_us").items():
        line = [f"`{case}`", *(number(name, values.get((case, name))) for name in _COLUMNS)]
        lines.append(line + ([str(best.peer), times(best.ratio)] if best else ["–", "–"]))
    return markdown(["case", *map(metric_label, _COLUMNS), "fastest of the others", "over ours"], lines)


def _fits(rows: list[Row]) -> str:
    """A line for each fit, ours first: ``fixed + slope`` of every contender."""
    fixed = [row for row in rows if row.metric == "fixed_us"]
    slopes = {(row.case, row.peer): row for row in rows if row.metric == "hit_us"}
    lines = []
    for case in dict.fromkeys(row.case for row in fixed):
        of_case = [row for row in fixed if row.case == case]
        own = f"{of_case[0].value:.1f} + {slopes[case, of_case[0].peer].value:.2f} × hits"
        cells = [
            f"{row.peer}: {row.peer_value:.1f} + {slopes[case, row.peer].peer_value:.2f}"
            for row in of_case
            if row.peer_value is not None
        ]
        lines.append([f"`{case}`", own, "; ".join(cells) or "–"])
    return markdown(["µs up to 80 tokens", "ours", "others"], lines) if lines else ""
