"""The results block of README.md, made from ``benchmarks/results/*.json`` so that no number in it is typed.

    python -m supersonic_moe.bench.readme     in the repository, after a benchmark has written its file

A file becomes a line about where its numbers come from and a table: a row for each case, a column for each headline
metric of its suite, and one for each peer with its compared metric over ours (above 1: ours is better). Cases that meet
other peers (a weight gradient, a product alone) get a table of their own, so that a mean is over like and like. The
format of the files is that of ``bench/report.py``; everything they hold and the README does not show stays one click
away. Files of ``UNSHOWN`` suites are left out: their figures stand in docs/.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supersonic_moe.bench.report import METRICS, Row, geomean, short

README, RESULTS = Path("README.md"), Path("benchmarks/results")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

NOTHING_YET = f"""\
No results are committed yet. On an H200, these commands measure them and fill this block:

```bash
supersonic-moe bench layer --json {RESULTS}/layer-bf16.json
supersonic-moe bench layer --recipe fp8 --json {RESULTS}/layer-fp8.json
supersonic-moe bench gemm --json {RESULTS}/gemm-bf16.json
supersonic-moe bench gemm --precision fp8 --json {RESULTS}/gemm-fp8.json
supersonic-moe bench cold-start --json {RESULTS}/cold-start.json
python -m supersonic_moe.bench.readme
```"""


@dataclass(frozen=True)
class Headline:
    """What of a suite the README shows; the names are those of ``report.METRICS``."""

    columns: tuple[str, ...]
    compared: str  # the metric whose ratios to the peers are shown


SUITES = {
    "layer": Headline(("fwd_us", "fwd_bwd_us", "fwd_bwd_tflops", "mfu", "saved_bytes"), compared="fwd_bwd_us"),
    "gemm": Headline(("us", "tflops", "sm_mhz", "watts", "pj_per_flop", "rel_fro"), compared="us"),
    "cold-start": Headline(("first_call_s", "call_s", "total_s", "import_s", "context_s"), compared="first_call_s"),
}
UNSHOWN = frozenset({"kernels", "breakdown", "precision", "train"})  # a row for each kernel, or each error: too long
_METRICS = {metric.name: metric for metric in METRICS}


def render(results_dir: Path) -> str:
    """The block, in Markdown: every file of the folder in the order of names, or how to make one."""
    contents = {path: _read(path) for path in sorted(results_dir.glob("*.json"))}
    sections = [_section(path, content) for path, content in contents.items() if content["suite"] in SUITES]
    return "\n\n".join(sections) or NOTHING_YET


def update(readme_path: Path, results_dir: Path) -> bool:
    """Put the block between its markers; True if that changed the file."""
    text = readme_path.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head + tail:
        raise ValueError(f"{readme_path} must hold {BEGIN} and, after it, {END}, each once. Put them back.")
    updated = f"{head}{BEGIN}\n{render(results_dir)}\n{END}{tail}"
    if updated == text:
        return False
    readme_path.write_text(updated, encoding="utf-8")
    return True


def _section(path: Path, content: dict[str, Any]) -> str:
    headline = SUITES[content["suite"]]
    commit, _, dirty = content["commit"].partition("-")
    source = [content["device"], f"torch {content['torch']}", f"commit `{commit[:12]}{'-' + dirty if dirty else ''}`"]
    origin = f"**{path.stem}** · {' · '.join(source)} · {content['date'][:10]} · `{content['command']}`"
    rows = [Row(**row) for row in content["rows"]]
    sections = [origin, *_tables(rows, headline)]
    if any(row.peer for row in rows):
        sections.append(f"*vs*: {_metric_label(headline.compared)} of that peer over ours, in the same run.")
    return "\n\n".join(sections)


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    wanted = ("suite", "command", "device", "torch", "commit", "date", "rows")
    if not isinstance(content, dict) or any(field not in content for field in wanted):
        raise ValueError(f"{path} must hold {', '.join(wanted)}. Write it with `supersonic-moe bench`.")
    if content["suite"] not in UNSHOWN.union(SUITES):
        raise ValueError(
            f"{path} is of suite {content['suite']!r}, and the README shows {', '.join(SUITES)}. "
            f"Say in bench/readme.py, SUITES, what it shows of that one."
        )
    return content


def _tables(rows: list[Row], headline: Headline) -> list[str]:
    peers: dict[str, set[str | None]] = {}
    for row in rows:
        peers.setdefault(row.case, set()).add(row.peer)
    groups = dict.fromkeys(map(frozenset, peers.values()))
    return [_table([row for row in rows if peers[row.case] == group], headline) for group in groups]


def _table(rows: list[Row], headline: Headline) -> str:
    values = {(row.case, row.metric): row.value for row in rows}
    ratios = {(row.case, row.peer): row.ratio for row in rows if row.peer and row.metric == headline.compared}
    peers = sorted({peer for _, peer in ratios if peer})
    cases = dict.fromkeys(row.case for row in rows)
    columns = [name for name in headline.columns if any((case, name) in values for case in cases)]

    lines = [["case", *map(_metric_label, columns), *(f"vs {peer}" for peer in peers)]]
    lines.append(["---", *["---:"] * (len(columns) + len(peers))])
    for case in cases:
        numbers = [_number(name, values.get((case, name))) for name in columns]
        lines.append([f"`{case}`", *numbers, *(_times(ratios.get((case, peer))) for peer in peers)])
    if len(cases) > 1 and peers:
        means = [_mean([ratios.get((case, peer)) for case in cases]) for peer in peers]
        lines.append(["geometric mean", *[""] * len(columns), *means])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _metric_label(name: str) -> str:
    return _METRICS[name].label.strip()


def _number(name: str, value: float | None) -> str:
    return "–" if value is None else short(value / _METRICS[name].shown_in)


def _times(ratio: float | None) -> str:
    return "missing" if ratio is None else f"{ratio:.2f}×"


def _mean(ratios: list[float | None]) -> str:
    """The geometric mean, and of how many cases where the peer lacks some."""
    found = [ratio for ratio in ratios if ratio is not None]
    share = f" ({len(found)} of {len(ratios)})" if found and len(found) < len(ratios) else ""
    return _times(geomean(found) if found else None) + share


def main() -> None:
    if not README.is_file():
        sys.exit(f"{README} must be in the current directory, {Path.cwd()}. Run this in the root of the repository.")
    print(f"{README}: {'updated' if update(README, RESULTS) else 'nothing to change'}")


if __name__ == "__main__":
    main()
