"""Results as a table on the terminal and as a JSON file of evidence.

The file is ``{"suite", "command", "device", "torch", "commit", "date", "rows"}``; a row is ``{"case", "metric",
"value", "unit", "peer", "peer_value", "ratio"}``, one for each metric and peer. ``ratio`` > 1 means that we are
better; it is null for facts without a better or worse, such as a clock. A metric without any peer has one row with
``peer`` null; a peer that is missing has ``peer_value`` null, but for what is known of it without a time. Where both
were timed in pairs, ``ratio`` is the median of the pairs' ratios, and the row has one field more: ``interval``, the
ends of its 95 % interval. A peer's time of few calls (``timing.Timing.few``) has ``calls``, how many.

The file is written after every case. While the command has cases without a result, and for ever if it ended so, one key
more stands before ``rows``: ``missing_cases``, their names. Nothing that reads files takes such a one for a whole one.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from supersonic_moe.bench.timing import Paired

OURS = "supersonic-moe"

Metrics = dict[str, float]  # by the names of METRICS


@dataclass
class CaseResult:
    """Metrics by contender, ours first; ``missing`` says why a contender, or one of its metrics, has none; ``untimed``
    has what is known of one that is missing.
    """

    case: str
    metrics: dict[str, Metrics] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    untimed: dict[str, Metrics] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Paired] = field(default_factory=dict)  # by (metric, peer)
    few_calls: dict[tuple[str, str], int] = field(default_factory=dict)  # by (metric, peer), of peers far slower

    @property
    def title(self) -> str:
        return self.case

    @property
    def peers(self) -> list[str]:
        """Measured or missing."""
        return list(dict.fromkeys([*list(self.metrics)[1:], *self.missing]))

    @property
    def failed(self) -> list[str]:
        """Those of ``missing`` that are ours: what a run must not end well without."""
        return []

    def cases(self) -> list[CaseResult]:
        """The cases of the file: this one, or one for each part of it."""
        return [self]

    def each_alone(self, separator: str) -> list[CaseResult]:
        """A case of the file for each entry of ``metrics``, where nobody is the other's peer."""
        return [CaseResult(f"{self.case}{separator}{name}", {OURS: metrics}) for name, metrics in self.metrics.items()]


@dataclass(frozen=True)
class Metric:
    name: str
    label: str  # on the terminal; metrics without one are only in the file
    unit: str
    better: Literal["lower", "higher"] | None
    shown_in: float = 1.0  # the table shows value / shown_in


MIB = 2.0**20

METRICS = (
    Metric("rows", "rows of all experts", "rows", None),
    Metric("hits", "experts hit", "experts", None),
    Metric("replay_us", "CUDA graph, cold L2, µs", "us", "lower"),
    Metric("replay_spread", "", "fraction", None),
    Metric("eager_us", "  eager, µs", "us", "lower"),
    Metric("host_us", "  host, µs a call", "us", "lower"),
    Metric("host_one_thread_us", "  the same, backward in the calling thread", "us", "lower"),
    Metric("products_us", "FP8 products, µs", "us", "lower"),
    Metric("fixed_us", "fixed, µs", "us", "lower"),
    Metric("hit_us", "  + µs an expert hit", "us", "lower"),
    Metric("infer_us", "inference forward, µs", "us", "lower"),
    Metric("infer_tflops", "  TFLOP/s", "TFLOP/s", "higher"),
    Metric("infer_spread", "", "fraction", None),
    Metric("fwd_us", "forward, µs", "us", "lower"),
    Metric("fwd_tflops", "  TFLOP/s", "TFLOP/s", "higher"),
    Metric("fwd_spread", "", "fraction", None),
    Metric("fwd_bwd_us", "forward + backward, µs", "us", "lower"),
    Metric("fwd_bwd_tflops", "  TFLOP/s", "TFLOP/s", "higher"),
    Metric("fwd_bwd_spread", "", "fraction", None),
    Metric("held_us", "  weights quantized before, µs", "us", "lower"),
    Metric("mfu", "  MFU, % of 989 or 1979 TFLOP/s", "fraction", "higher", shown_in=0.01),
    Metric("wall_us", "  wall per call, µs", "us", "lower"),
    Metric("busy_us", "  GPU busy, µs", "us", "lower"),
    Metric("wall_over_busy", "  wall / busy", "ratio", "lower"),
    Metric("sent_bytes", "sent by a rank, uniform routing, MB", "bytes", None, shown_in=1e6),
    Metric("graph_us", "  in a CUDA graph, µs", "us", "lower"),
    Metric("quantize_share", "  quantizing or transposing, %", "fraction", None, shown_in=0.01),
    Metric("share", "", "fraction", None),
    Metric("us", "time, µs", "us", "lower"),
    Metric("tflops", "TFLOP/s", "TFLOP/s", "higher"),
    Metric("gbps", "GB/s", "GB/s", "higher"),
    Metric("of_copy", "of a copy of as many bytes, %", "fraction", "higher", shown_in=0.01),
    Metric("slowdown", "time / alone", "ratio", "lower"),
    Metric("floor_us", "floor, µs", "us", None),
    Metric("of_floor", "floor / time, %", "fraction", "higher", shown_in=0.01),
    Metric("flops", "", "FLOP", None),
    Metric("bytes", "", "bytes", None),
    Metric("spread", "", "fraction", None),
    Metric("first_call_s", "first forward + backward, s", "s", "lower"),
    Metric("library_s", "  import of supersonic_moe, s", "s", "lower"),
    Metric("build_s", "  layer and inputs, s", "s", "lower"),
    Metric("call_s", "  the call, s", "s", "lower"),
    Metric("again_s", "the call once more, s", "s", "lower"),
    Metric("total_s", "process start to result, s", "s", "lower"),
    Metric("start_s", "  Python, s", "s", "lower"),
    Metric("import_s", "  import of torch, s", "s", "lower"),
    Metric("context_s", "  CUDA context, s", "s", "lower"),
    Metric("backward_s", "  torch's first backward, s", "s", "lower"),
    Metric("saved_bytes", "saved for backward, MiB", "bytes", "lower", shown_in=MIB),
    Metric("saved_of_formula", "  % of the BF16 formula", "fraction", "lower", shown_in=0.01),
    Metric("weight_copy_bytes", "  FP8 weights kept beside, MiB", "bytes", None, shown_in=MIB),
    Metric("peak_bytes", "peak of one step, MiB", "bytes", "lower", shown_in=MIB),
    Metric("sm_mhz", "SM clock, MHz", "MHz", None),
    Metric("watts", "board power, W", "W", None),
    Metric("pj_per_flop", "energy, pJ/FLOP", "pJ/FLOP", "lower"),
    Metric("rel_fro", "relative error", "fraction", None),  # checked against a limit, not raced: so are the next two
    Metric("matched", "contest's matched ratio, %", "fraction", None, shown_in=0.01),
    Metric("calc_diff", "calc_diff", "fraction", None),
    Metric("worst_row", "worst row, relative error", "fraction", None),
    Metric("held_out_bpb", "held-out bits per byte", "bits", "lower"),
    Metric("train_bpb", "training bits per byte", "bits", "lower"),
    Metric("gap", "above BF16, %", "fraction", None, shown_in=0.01),
    Metric("gap_error", "  standard error of it, %", "fraction", None, shown_in=0.01),
    Metric("gap_in_bf16", "  judged in BF16, %", "fraction", None, shown_in=0.01),
    Metric("steps", "optimizer steps", "steps", None),
    Metric("rrmse", "relative RMS error", "fraction", None),
    Metric("cos", "cosine", "ratio", None),
)

_METRICS = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Row:
    case: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    calls: int | None = None


def ratio(metric: Metric, ours: float, theirs: float) -> float | None:
    """How many times better we are."""
    if metric.better is None or ours <= 0 or theirs <= 0:
        return None
    return theirs / ours if metric.better == "lower" else ours / theirs


def rows(result: CaseResult) -> list[Row]:
    """All rows of one case: a row for each metric of ours and each peer, measured or missing."""
    ours = next(iter(result.metrics.values()))
    known = result.untimed | result.metrics
    peers = {name: known.get(name, {}) for name in result.peers}
    found: list[Row] = []
    for metric in METRICS:
        if metric.name not in ours:
            continue
        value = _rounded(ours[metric.name])
        if not peers:
            found.append(Row(result.case, metric.name, value, metric.unit))
        for peer, theirs in peers.items():
            row = Row(result.case, metric.name, value, metric.unit, peer)
            if math.isfinite(theirs.get(metric.name, math.nan)):
                better = ratio(metric, ours[metric.name], theirs[metric.name])
                row = replace(row, peer_value=_rounded(theirs[metric.name]), ratio=better and _rounded(better))
                if pair := result.pairs.get((metric.name, peer)):
                    row = replace(row, ratio=_rounded(pair.ratio), interval=(_rounded(pair.low), _rounded(pair.high)))
                row = replace(row, calls=result.few_calls.get((metric.name, peer)))
            found.append(row)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def document(
    suite: str,
    results: Sequence[CaseResult],
    device: torch.device,
    commit: str | None = None,
    missing: Sequence[str] = (),
) -> dict[str, object]:
    """``missing``: names of the command's cases that have no result."""
    return {
        "suite": suite,
        "command": shlex.join(["supersonic-moe", *sys.argv[1:]]),
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit or tree_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({_MISSING: list(missing)} if missing else {}),
        "rows": [_fields(row) for result in results for row in rows(result)],
    }


def _fields(row: Row) -> dict[str, object]:
    return {name: value for name, value in asdict(row).items() if name not in ("interval", "calls") or value}


def part_of_a_run(content: Mapping[str, Any]) -> str | None:
    """What to say of a file that lacks cases of its command, behind its name; None of a whole one."""
    missing = content.get(_MISSING)
    if not missing:
        return None
    return f"is of a run without a result for {', '.join(missing)}. Measure it again: {content['command']}"


_MISSING = "missing_cases"


def write_json(path: Path, content: dict[str, object]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Beside the file, and then under its name: whatever ends the process leaves a whole file, the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or a pipe is not to be replaced by a file
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # what a link leads to, not the link
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def tree_commit() -> str:
    """Commit of the source tree this runs from, ``-dirty`` if files differ from it, ``unknown`` outside a checkout.

    Result files do not make a tree dirty: a run that has just written one can be followed by another.
    """

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    here = Path(__file__)
    try:
        git(
            "ls-files", "--error-unmatch", here.name
        )  # else this is an installed copy inside somebody else's repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- terminal ------------------------------------------------------------------------------------------------------


def case_table(result: CaseResult) -> Table:
    """One case: a row for each metric, a column for each contender; beside a peer's cost, what it is in ours."""
    table = _titled(result.title)
    table.add_column("", no_wrap=True)
    for i, name in enumerate(result.metrics):
        table.add_column(name, justify="right", no_wrap=True, style="bold" if i == 0 else "")
    (_ours_name, ours), *_peers = result.metrics.items()
    for metric in METRICS:
        if metric.label and metric.name in ours:
            cells = [
                _cell(metric, metrics, ours if i else None, result.few_calls.get((metric.name, name)))
                for i, (name, metrics) in enumerate(result.metrics.items())
            ]
            table.add_row(metric.label, *cells)
    return table


def _cell(metric: Metric, metrics: Metrics, ours: Metrics | None, calls: int | None = None) -> str:
    value = metrics.get(metric.name)
    if value is None:
        return "[dim]-[/dim]"
    text = short(value / metric.shown_in)
    spread = metrics.get(metric.name.removesuffix("us") + "spread") if metric.name.endswith("us") else None
    if ours is None:
        return text if spread is None else f"{text} [dim]±{spread / 2:.1%}[/dim]"
    better = ratio(metric, ours[metric.name], value)
    if better is None or metric.better == "higher":  # a rate repeats the ratio of its time
        return text
    of_few = f", {calls} call{'s' if calls > 1 else ''}" if calls else ""
    return f"{text} [{'green' if better >= 1 else 'red'}]({better:.2f}x{of_few})[/]"


def contender_table(result: CaseResult) -> Table:
    """One case with few metrics and many contenders: a row for each, and its time over that of the first."""
    table = _titled(result.title, box=None, pad_edge=False)
    first = next(iter(result.metrics))
    shown = [metric for metric in METRICS if metric.label and any(metric.name in m for m in result.metrics.values())]
    table.add_column("", no_wrap=True)
    for heading in (*(metric.label.replace(",", "") for metric in shown), f"time ÷ {first}"):
        table.add_column(heading.replace(" ", "\n"), justify="right", vertical="bottom", no_wrap=True)
    for name, metrics in result.metrics.items():
        times = f"{metrics['us'] / result.metrics[first]['us']:.2f}x"
        table.add_row(name, *(_cell(metric, metrics, None) for metric in shown), times)
    return table


def facts_table(result: CaseResult) -> Table:
    """One case without a comparison: a row for each metric, a column for each of its states."""
    table = _titled(result.title)
    table.add_column("", no_wrap=True)
    for state in result.metrics:
        table.add_column(state, justify="right")
    for metric in METRICS:
        if metric.label and all(metric.name in metrics for metrics in result.metrics.values()):
            table.add_row(metric.label, *(_cell(metric, metrics, None) for metrics in result.metrics.values()))
    return table


def summary_tables(results: Sequence[CaseResult], time: str, rate: str) -> list[Table]:
    """All cases on one line each: a time, its rate, and the speed-up over every peer with its geometric mean.

    Cases share a table, and so a mean, with those that meet the same peers.
    """
    groups: dict[frozenset[str], list[CaseResult]] = {}
    for result in results:
        groups.setdefault(frozenset(result.peers), []).append(result)
    return [_summary_table(group, time, rate) for group in groups.values() if len(group) > 1]


def _summary_table(results: Sequence[CaseResult], time: str, rate: str) -> Table:
    peers = sorted(results[0].peers)
    table = _titled(_METRICS[time].label.partition(",")[0])
    table.add_column("case", no_wrap=True)
    for heading in ("µs", "TFLOP/s", *(f"vs {peer}" for peer in peers)):
        table.add_column(heading, justify="right", no_wrap=True)
    speedups: dict[str, list[float]] = {peer: [] for peer in peers}
    for result in results:
        ours = next(iter(result.metrics.values()))
        cells = []
        for peer in peers:
            theirs = result.metrics.get(peer, {}).get(time)
            if theirs is not None:
                speedups[peer].append(theirs / ours[time])
            cells.append("[dim]missing[/dim]" if theirs is None else f"{speedups[peer][-1]:.2f}x")
        table.add_row(result.case, short(ours[time]), short(ours[rate]), *cells)
    if peers:
        means = [f"{geomean(s):.2f}x" if s else "[dim]-[/dim]" for s in speedups.values()]
        table.add_section()
        table.add_row("geometric mean", "", "", *means, style="bold")
    return table


def _titled(title: str, **style: Any) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", **style)


def short(value: float) -> str:
    """Four digits are what a median is worth: 9,245 · 602.1 · 52.18 · 3.046 · 0.0042."""
    if abs(value) >= 1000 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def label(value: float) -> str:
    """A whole number at a bar, where a reader compares lengths; two digits below ten."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))
