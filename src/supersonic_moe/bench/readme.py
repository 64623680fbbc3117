"""The tables of README.md and of docs/{expert-parallel,inference,performance,results,transformers}.md, made from
``benchmarks/results/*.json`` so that no number is typed.

    python -m supersonic_moe.bench.readme     in the repository, after a benchmark has written its file

README.md gets one table: the layers, in BF16 and in FP8. docs/performance.md sets them beside other libraries, as far
as those ran in the same process. docs/inference.md gets who is fastest at each batch of the inference operator
(``infer_page.py``), docs/expert-parallel.md what ``MegaMoE`` costs (``mega_page.py``) and a training step over ranks
(``ep_page.py``), and docs/transformers.md the experts backends of Transformers, in words where another one takes less
time.
docs/results.md gets every file of the suites in ``SUITES``: a line that says where its numbers come
from, its figure if there is one, and a table. A table has a row for each case, a column for each headline metric of its
suite, and a column for each peer: the compared metric of that peer over ours in the same run (above 1: ours is better).
Cases that meet other peers or lack the compared metric (a weight gradient, products alone) get a table of their own, so
that a mean is over like and like; the first metric with ratios takes the place of one that they lack. The format of the
files is that of ``bench/report.py``. Files of ``UNSHOWN`` suites are left out: their figures stand in other pages.

A block of generated text lies between two comments, ``<!-- name:begin -->`` and ``<!-- name:end -->``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supersonic_moe.bench import ep_page, infer_page, mega_page
from supersonic_moe.bench.markdown import commit_and_day, markdown, mean, metric_label, number, origin, times
from supersonic_moe.bench.report import Row, part_of_a_run

RESULTS = Path("benchmarks/results")

NOTHING_YET = f"""\
No results are committed yet. On an H200, these commands measure them and fill this block:

```bash
supersonic-moe bench all --out {RESULTS}
python -m supersonic_moe.bench.readme
```"""


@dataclass(frozen=True)
class Headline:
    """What docs/results.md shows of a suite; the names are those of ``report.METRICS``."""

    columns: tuple[str, ...]
    compared: str  # the metric whose ratios to the peers are shown


SUITES = {
    "layer": Headline(
        (
            "fwd_us",
            "fwd_bwd_us",
            "held_us",
            "fwd_bwd_tflops",
            "mfu",
            "saved_bytes",
            "graph_us",
            "host_us",
            "host_one_thread_us",
        ),
        "fwd_bwd_us",
    ),
    "infer": Headline(("hits", "replay_us", "floor_us", "gbps", "eager_us", "host_us"), "replay_us"),
    "gemm": Headline(("us", "tflops", "sm_mhz", "watts", "pj_per_flop", "rel_fro"), "us"),
    "breakdown": Headline(("us", "floor_us", "of_floor", "tflops"), "us"),
    "ep": Headline(("fwd_us", "fwd_bwd_us", "fwd_bwd_tflops", "host_us", "sent_bytes", "products_us"), "fwd_bwd_us"),
    "exchange": Headline(("us", "gbps", "of_copy", "tflops", "slowdown"), "of_copy"),
    "mega": Headline(
        ("hits", "rows", "replay_us", "floor_us", "of_floor", "host_us", "calc_diff", "worst_row"), "replay_us"
    ),
    "cold-start": Headline(("first_call_s", "call_s", "again_s", "total_s", "import_s", "context_s"), "first_call_s"),
}
UNSHOWN = frozenset(
    {"kernels", "precision", "train", "transformers"}
)  # docs/kernels.md, docs/fp8.md, docs/fp8-training.md and docs/transformers.md have them


# ---- blocks of generated text ----------------------------------------------------------------------------------------


def block(page: Path, name: str) -> str:
    """The text of a block of a page."""
    return _parts(page, name)[1].strip()


def put(page: Path, name: str, text: str) -> bool:
    """Replace the text of a block, and nothing else; True if that changed the file."""
    head, before, tail = _parts(page, name)
    if before == f"\n{text}\n":
        return False
    page.write_text(f"{head}\n{text}\n{tail}", encoding="utf-8")
    return True


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    """What comes up to the opening comment, the block, and what comes from the closing comment on."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text(encoding="utf-8")
    head, opened, rest = text.partition(begin)
    inside, closed, tail = rest.partition(end)
    if not opened or not closed or begin in rest or end in head + tail:
        raise ValueError(f"{page} must hold {begin} and, after it, {end}, each once. Put them back.")
    return head + begin, inside, end + tail


# ---- docs/results.md: every file -------------------------------------------------------------------------------------


def results(folder: Path, page: Path) -> str:
    """All tables, in Markdown: every file of the folder in the order of names, or how to make one. Figures are linked
    from the place of ``page``.
    """
    contents = {path: read(path) for path in sorted(folder.glob("*.json"))}
    sections = [_section(path, content, page) for path, content in contents.items() if content["suite"] in SUITES]
    return "\n\n".join(sections) or NOTHING_YET


def _section(path: Path, content: dict[str, Any], page: Path) -> str:
    shown = SUITES[content["suite"]]
    sections = [f"### {path.stem}", f"{origin(content)}. Measured by `{content['command']}`."]
    figure = path.with_suffix(".png")
    if figure.is_file():
        sections.append(f"![{path.stem}, drawn]({os.path.relpath(figure, page.parent)})")
    rows = [Row(**row) for row in content["rows"]]
    compared: list[str] = []
    for group in _groups(rows, shown):
        by_peers = [
            name for name in (shown.compared, *shown.columns) if any(r.metric == name and r.ratio for r in group)
        ]
        compared += by_peers[:1]
        sections.append(_table(group, shown.columns, *by_peers[:1]))
    if compared:
        usual, *others = map(metric_label, dict.fromkeys(compared))
        instead = f" (where a table lacks it: {'; '.join(others)})" if others else ""
        sections.append(f"*vs*: {usual}{instead} of that peer over ours, in the same run.")
    return "\n\n".join(sections)


def read(path: Path) -> dict[str, Any]:
    """A results file, checked. Raises ValueError for anything else, and for one that lacks cases of its command."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {path}: it is no text. Name a file that `supersonic-moe bench` wrote.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Name a file that `supersonic-moe bench` wrote.") from None
    wanted = ("suite", "command", "device", "torch", "commit", "date", "rows")
    if not isinstance(content, dict) or any(field not in content for field in wanted):
        raise ValueError(f"{path} must hold {', '.join(wanted)}. Write it with `supersonic-moe bench`.")
    of_row = ("case", "metric", "value", "unit")
    if any(not isinstance(row, dict) or any(field not in row for field in of_row) for row in content["rows"]):
        raise ValueError(f"each row of {path} must hold {', '.join(of_row)}. Write it with `supersonic-moe bench`.")
    if reason := part_of_a_run(content):
        raise ValueError(f"{path} {reason}")
    if content["suite"] not in UNSHOWN.union(SUITES):
        raise ValueError(
            f"{path} is of suite {content['suite']!r}, and docs/results.md shows {', '.join(SUITES)}. "
            f"Say in bench/readme.py, SUITES, what it shows of that one."
        )
    return content


def _groups(rows: list[Row], shown: Headline) -> list[list[Row]]:
    """The shown rows by what their cases have in common: the peers, and whether the compared metric is among theirs."""
    peers: dict[str, set[str | None]] = {}
    with_compared = {row.case for row in rows if row.metric == shown.compared}
    for row in rows:
        peers.setdefault(row.case, set()).add(row.peer)
    groups: dict[tuple[frozenset[str | None], bool], list[Row]] = {}
    for row in rows:
        if row.metric in shown.columns:
            groups.setdefault((frozenset(peers[row.case]), row.case in with_compared), []).append(row)
    return list(groups.values())


def _table(rows: list[Row], shown: tuple[str, ...], compared: str | None = None) -> str:
    values = {(row.case, row.metric): row.value for row in rows}
    ratios = {(row.case, row.peer): row.ratio for row in rows if row.peer and row.metric == compared}
    peers = sorted({peer for _, peer in ratios if peer})
    columns = [name for name in shown if any(metric == name for _, metric in values)]
    cases = dict.fromkeys(row.case for row in rows)

    lines = []
    for case in cases:
        numbers = [number(name, values.get((case, name))) for name in columns]
        lines.append([f"`{case}`", *numbers, *(times(ratios.get((case, peer))) for peer in peers)])
    if len(cases) > 1 and peers:
        means = [mean([ratios.get((case, peer)) for case in cases]) for peer in peers]
        lines.append(["geometric mean", *[""] * len(columns), *means])
    return markdown(["case", *map(metric_label, columns), *(f"vs {peer}" for peer in peers)], lines)


# ---- README.md: the layers on one page -------------------------------------------------------------------------------


def headline(folder: Path) -> str:
    """One table of forward + backward of the layers in ``layer-bf16.json`` and ``layer-fp8.json``, and a line each for
    the grouped GEMMs alone and the inference operator; or how to measure them.
    """
    paths = [folder / f"layer-{precision}.json" for precision in ("bf16", "fp8")]
    if not all(path.is_file() for path in paths):
        return NOTHING_YET
    bf16, fp8 = map(read, paths)
    contenders = [
        (bf16, _measured_peers(bf16, ["grouped_mm", "sonicmoe"]), ""),
        (fp8, _measured_peers(fp8, ["ours-BF16", "sonicmoe"]), "_fp8"),
    ]
    lines = []
    for case in dict.fromkeys(row["case"] for row in bf16["rows"]):
        line = [case.replace("_", " ")]
        for content, peers, suffix in contenders:
            rows = [row for row in content["rows"] if row["case"] == case + suffix]
            values = {row["metric"]: row["value"] for row in rows}
            line += [number(metric, values.get(metric)) for metric in ("fwd_bwd_us", "fwd_bwd_tflops")]
            ratios = {row["peer"]: row["ratio"] for row in rows if row["metric"] == "fwd_bwd_us"}
            line += [times(ratios.get(peer)) for peer in peers]
        lines.append(line)
    head = ["layer"]
    for precision, (_, peers, _) in zip(("BF16", "FP8"), contenders, strict=True):
        head += [f"{precision}, µs", "TFLOP/s", *(f"vs {_NAMES[peer]}" for peer in peers)]
    sources = f"BF16: {origin(bf16)}. FP8: {origin(fp8)}."
    if any("sonicmoe" in peers for _, peers, _ in contenders):
        sources = f"*vs SonicMoE*: its layer, in BF16, in the same process. {sources}"
    sections = [markdown(head, lines), " ".join([sources, *_grouped_gemms(folder)])]
    return "\n\n".join(sections + infer_page.in_short(_inference_files(folder)))


def _grouped_gemms(folder: Path) -> list[str]:
    """How the plain grouped GEMMs compare with DeepGEMM's, where both were measured."""
    found = []
    for precision in ("bf16", "fp8"):
        path = folder / f"gemm-{precision}.json"
        content = read(path) if path.is_file() else {"rows": []}
        ratios = [
            row["ratio"]
            for row in content["rows"]
            if (row["peer"], row["metric"]) == ("deep_gemm", "us") and not row["case"].endswith("_accumulate")
        ]
        if ratios:
            where = f"{len(ratios)} shapes, {commit_and_day(content)}"
            found.append(f"{mean(ratios)} in {precision.upper()} ({where})")
    if not found:
        return []
    return [f"Grouped GEMMs alone against DeepGEMM, geometric mean within one run: {', '.join(found)}."]


# ---- docs/performance.md: beside other libraries ---------------------------------------------------------------------

NO_LIBRARY = """\
Not measured beside other libraries in one process yet. On an H200, with them on the path:

```bash
supersonic-moe bench layer --peers sonicmoe,liger --pairs 20 --json layer-bf16.json
supersonic-moe bench layer --recipe fp8 --peers sonicmoe,liger,torchao --pairs 20 --json layer-fp8.json
```"""

_NAMES = {
    "sonicmoe": "SonicMoE",
    "liger": "Liger",
    "torchao": "torchao",
    "grouped_mm": "torch",
    "ours-BF16": "our BF16",
}
LIBRARIES = ("sonicmoe", "liger", "torchao")


def performance(folder: Path) -> str:
    """A table for each of ``layer-bf16.json`` and ``layer-fp8.json`` and each library that ran beside it."""
    sections = []
    for precision in ("bf16", "fp8"):
        path = folder / f"layer-{precision}.json"
        content = read(path) if path.is_file() else {"rows": []}
        for library in _measured_peers(content, LIBRARIES):
            sections += [f"### {precision.upper()} beside {_NAMES[library]}", f"{origin(content)}."]
            sections.append(_beside([Row(**row) for row in content["rows"]], library))
    return "\n\n".join(sections) or NO_LIBRARY


def _measured_peers(content: dict[str, Any], peers: Iterable[str]) -> list[str]:
    compared = {row["peer"] for row in content["rows"] if row["metric"] == "fwd_bwd_us" and row["ratio"] is not None}
    return [peer for peer in peers if peer in compared]


def _beside(rows: list[Row], library: str) -> str:
    found = {(row.case, row.metric): row for row in rows if row.peer == library}
    passes = {metric: label for metric, label in _PASSES.items() if any(name == metric for _, name in found)}
    cases = dict.fromkeys(case for case, metric in found if metric in passes)
    lines = [
        [f"`{case}`", *(cell for metric in passes for cell in _both(found.get((case, metric)), metric))]
        for case in cases
    ]
    if len(cases) > 1:
        means = (mean([getattr(found.get((case, metric)), "ratio", None) for case in cases]) for metric in passes)
        lines.append(["geometric mean", *(cell for ratio in means for cell in ("", "", ratio))])
    heads = (cell for name in passes.values() for cell in (f"{name}: ours, µs", f"{_NAMES[library]}, µs", "ratio"))
    return "\n\n".join([markdown(["case", *heads], lines), _judged(list(found.values()), passes, _NAMES[library])])


def _judged(rows: list[Row], passes: dict[str, str], library: str) -> str:
    """Where the library takes less time, and where its interval does not say who does."""
    behind: list[str] = []
    unsure: list[str] = []
    for row in rows:
        if row.metric in passes and row.ratio is not None:
            low, high = row.interval or (row.ratio, row.ratio)
            if low <= 1:
                (behind if high < 1 else unsure).append(f"{passes[row.metric]} at `{row.case}`")
    text = f"{library} takes less time: {'; '.join(behind)}." if behind else f"{library} takes less time in no case."
    return text + (f" Not told apart, for 1 is in the interval: {'; '.join(unsure)}." if unsure else "")


_PASSES = {"fwd_us": "forward", "fwd_bwd_us": "forward + backward", "held_us": "the same, weights quantized before"}


def _both(row: Row | None, metric: str) -> tuple[str, str, str]:
    """Our time, theirs, and how many times longer theirs is, with its interval."""
    if row is None:
        return "–", "–", "–"
    ends = f" ({row.interval[0]:.3f}–{row.interval[1]:.3f})" if row.interval else ""
    ratio = "missing" if row.ratio is None else f"{row.ratio:.3f}{ends}"
    return number(metric, row.value), number(metric, row.peer_value), ratio


# ---- docs/inference.md, docs/expert-parallel.md: pages of their own --------------------------------------------------


def inference(folder: Path) -> str:
    """Each file of the inference suite, ``infer_page.py``."""
    return infer_page.page(_inference_files(folder))


def _inference_files(folder: Path) -> dict[str, dict[str, Any]]:
    return _files(folder, infer_page.NAMES)


def _files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Those that there are, by name."""
    return {name: read(path) for name in names if (path := folder / f"{name}.json").is_file()}


def _serving(root: Path) -> str:
    one, two = (root / RESULTS / f"{name}.json" for name in (mega_page.NAME, mega_page.ON_TWO))
    figure = one.with_name(f"{mega_page.NAME}-timeline.png")
    shown = os.path.relpath(figure, root / "docs") if figure.is_file() else None
    of_one = mega_page.page(read(one) if one.is_file() else None, shown)
    return "\n\n".join(filter(None, [of_one, mega_page.on_two(read(two) if two.is_file() else None)]))


def _training(root: Path) -> dict[str, dict[str, Any]]:
    return _files(root / RESULTS, ep_page.files())


# ---- docs/transformers.md: experts backends --------------------------------------------------------------------------

NO_TRANSFORMERS = """\
Not measured with the kernels of this commit yet. On an H200, with Liger on the path:

```bash
supersonic-moe bench transformers --what layers --json transformers-layers.json
supersonic-moe bench transformers --what model --json transformers-model.json
```"""

_KINDS = {
    "/layers/train_": ("Training step of two layers of experts", ("fwd_bwd_us",)),
    "/model/train_": ("Training step of a whole model of two layers", ("fwd_bwd_us",)),
    "/layers/decode_": ("Decode of two layers of experts", ("infer_us", "graph_us")),
    "/model/decode_": ("Decode of a whole model of two layers", ("infer_us", "graph_us")),
}
_OURS_TOO = ("ours-FP8", "swiglu")  # contenders that are ours, for comparison


def transformers(folder: Path) -> str:
    """A table for each kind of case, from all files of the suite, and the cases in which another backend is ahead. Of
    what was timed in pairs, too, those tell whether it is.
    """
    contents = [read(path) for path in sorted(folder.glob("transformers*.json"))]
    rows = [Row(**row) for content in contents for row in content["rows"]]
    if not rows:
        return NO_TRANSFORMERS
    sections = [" ".join(dict.fromkeys(f"{origin(content)}." for content in contents))]
    pairs = [row for row in rows if row.interval is not None and row.metric == "fwd_bwd_us"]
    known = {(row.case, row.metric, row.peer) for row in pairs}
    rows = [row for row in rows if row not in pairs]
    for kind, (title, metrics) in _KINDS.items():
        if of_kind := [row for row in rows if kind in row.case and row.metric in metrics]:
            sections += [f"**{title}**", _backends(of_kind, metrics)]
    if pairs:
        sections += ["**Training steps in alternating pairs** (median, 95 % interval)", _pairs(pairs)]
    last = [*pairs, *(row for row in rows if (row.case, row.metric, row.peer) not in known)]
    behind = [row for row in last if row.metric in _WORDS and row.peer not in _OURS_TOO and (row.ratio or 1.0) < 1.0]
    named = [f"{row.peer} at `{row.case}`{_WORDS[row.metric]} ({row.ratio:.2f}×)" for row in behind]
    sections.append(
        f"Ahead of ours: {'; '.join(named)}." if named else "No other backend is ahead of ours in any case."
    )
    return "\n\n".join(sections)


_WORDS = {"fwd_bwd_us": "", "infer_us": "", "graph_us": " in a CUDA graph"}


def _backends(rows: list[Row], metrics: tuple[str, ...]) -> str:
    """Ours in µs and how many times longer the others take, eager, then in a CUDA graph."""
    found = {(row.case, row.metric, row.peer): row for row in rows}
    head, columns = ["model"], []
    for metric in metrics:
        peers = dict.fromkeys(row.peer for row in rows if row.metric == metric and row.ratio is not None)
        head += ["ours, µs" if metric != "graph_us" else "in a graph: ours, µs", *(f"vs {peer}" for peer in peers)]
        columns.append((metric, peers))
    cases = {case: (case.partition("/")[0], int(case.rpartition("_T")[2])) for case in (row.case for row in rows)}
    models = list(dict.fromkeys(model for model, _ in cases.values()))
    lines = []
    for case, (model, tokens) in sorted(cases.items(), key=lambda item: (models.index(item[1][0]), item[1][1])):
        line = [f"{model}, T {tokens}"]
        for metric, peers in columns:
            of_case = [found.get((case, metric, peer)) for peer in peers]
            line.append(number(metric, next((row.value for row in of_case if row), None)))
            line += [f"{row.ratio:.2f}×" if row and row.ratio is not None else "–" for row in of_case]
        lines.append(line)
    return markdown(head, lines)


def _pairs(rows: list[Row]) -> str:
    """Ours in µs, and each other one's time over it."""
    peers = list(dict.fromkeys(row.peer for row in rows))
    found = {(row.case, row.peer): row for row in rows}
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [found.get((case, peer)) for peer in peers]
        us = next(row.value for row in of_case if row)
        cells = [
            f"{r.ratio:.3f} ({r.interval[0]:.3f}–{r.interval[1]:.3f})" if r and r.interval else "–" for r in of_case
        ]
        lines.append([f"`{case}`", number("fwd_bwd_us", us), *cells])
    return markdown(["case", "ours, µs", *(f"vs {peer}" for peer in peers)], lines)


# ---- the pages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    path: Path
    block: str
    text: Callable[[Path], str]
    """The block's text, given the root of the repository."""


PAGES = (
    Page(Path("README.md"), "headline", lambda root: headline(root / RESULTS)),
    Page(Path("docs/expert-parallel.md"), "serving", _serving),
    Page(Path("docs/expert-parallel.md"), "one-rank", lambda root: ep_page.one_rank(_training(root))),
    Page(Path("docs/expert-parallel.md"), "ranks", lambda root: ep_page.ranks(_training(root))),
    Page(Path("docs/inference.md"), "inference", lambda root: inference(root / RESULTS)),
    Page(Path("docs/performance.md"), "performance", lambda root: performance(root / RESULTS)),
    Page(Path("docs/results.md"), "results", lambda root: results(root / RESULTS, root / "docs/results.md")),
    Page(Path("docs/transformers.md"), "transformers", lambda root: transformers(root / RESULTS)),
)


def main() -> None:
    for page in PAGES:
        if not page.path.is_file():
            sys.exit(f"{page.path} must be in {Path.cwd()}. Run this in the root of the repository.")
    try:
        texts = [page.text(Path()) for page in PAGES]  # all of them before any page changes
        for page, text in zip(PAGES, texts, strict=True):
            changed = put(page.path, page.block, text)
            print(f"{page.path}, {page.block}: {'updated' if changed else 'nothing to change'}")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
