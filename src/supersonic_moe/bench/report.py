"""Results as a table on the terminal, a JSON file of evidence and a chart.

The file is ``{"suite", "command", "device", "torch", "commit", "date", "rows"}``; a row is ``{"case", "metric",
"value", "unit", "peer", "peer_value", "ratio"}``, one for each metric and peer. ``ratio`` > 1 means that we are
better; it is null for facts without a better or worse, such as a clock. A metric without any peer has one row with
``peer`` null; a peer that is missing has ``peer_value`` null.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.table import Table

if TYPE_CHECKING:
    from supersonic_moe.bench.layer import CaseResult


@dataclass(frozen=True)
class Metric:
    name: str
    label: str  # on the terminal; metrics without one are only in the file
    unit: str
    better: Literal["lower", "higher"] | None
    shown_in: float = 1.0  # the table shows value / shown_in


MIB = 2.0**20

METRICS = (
    Metric("infer_us", "inference forward, µs", "us", "lower"),
    Metric("infer_tflops", "  TFLOP/s", "TFLOP/s", "higher"),
    Metric("infer_spread", "", "fraction", None),
    Metric("fwd_us", "forward, µs", "us", "lower"),
    Metric("fwd_tflops", "  TFLOP/s", "TFLOP/s", "higher"),
    Metric("fwd_spread", "", "fraction", None),
    Metric("fwd_bwd_us", "forward + backward, µs", "us", "lower"),
    Metric("fwd_bwd_tflops", "  TFLOP/s", "TFLOP/s", "higher"),
    Metric("fwd_bwd_spread", "", "fraction", None),
    Metric("mfu", "  MFU, % of 989 TFLOP/s", "fraction", "higher", shown_in=0.01),
    Metric("wall_us", "  wall per call, µs", "us", "lower"),
    Metric("busy_us", "  GPU busy, µs", "us", "lower"),
    Metric("wall_over_busy", "  wall / busy", "ratio", "lower"),
    Metric("saved_bytes", "saved for backward, MiB", "bytes", "lower", shown_in=MIB),
    Metric("peak_bytes", "peak of one step, MiB", "bytes", "lower", shown_in=MIB),
    Metric("sm_mhz", "SM clock, MHz", "MHz", None),
    Metric("watts", "board power, W", "W", None),
    Metric("pj_per_flop", "energy, pJ/FLOP", "pJ/FLOP", "lower"),
)


@dataclass(frozen=True)
class Row:
    case: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None


def ratio(metric: Metric, ours: float, theirs: float) -> float | None:
    """How many times better we are."""
    if metric.better is None or ours <= 0 or theirs <= 0:
        return None
    return theirs / ours if metric.better == "lower" else ours / theirs


def rows(result: CaseResult) -> list[Row]:
    """All rows of one case: a row for each metric of ours and each peer, measured or missing."""
    (_ours_name, ours), *measured = result.metrics.items()
    peers = dict(measured) | {name: {} for name in result.missing if name not in result.metrics}
    found: list[Row] = []
    for metric in METRICS:
        if metric.name not in ours:
            continue
        value = _rounded(ours[metric.name])
        if not peers:
            found.append(Row(result.case, metric.name, value, metric.unit))
        for peer, theirs in peers.items():
            row = Row(result.case, metric.name, value, metric.unit, peer)
            if metric.name in theirs:
                better = ratio(metric, ours[metric.name], theirs[metric.name])
                row = replace(row, peer_value=_rounded(theirs[metric.name]), ratio=better and _rounded(better))
            found.append(row)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def document(
    suite: str, results: Sequence[CaseResult], device: torch.device, commit: str | None = None
) -> dict[str, object]:
    return {
        "suite": suite,
        "command": shlex.join(["supersonic-moe", *sys.argv[1:]]),
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit or tree_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for result in results for row in rows(result)],
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
    table = Table(
        title=f"{result.case}   busiest expert {result.load_ratio:.2f}x the mean",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    for i, name in enumerate(result.metrics):
        table.add_column(name, justify="right", no_wrap=True, style="bold" if i == 0 else "")
    (_ours_name, ours), *_peers = result.metrics.items()
    for metric in METRICS:
        if metric.label and metric.name in ours:
            cells = [_cell(metric, metrics, ours if i else None) for i, metrics in enumerate(result.metrics.values())]
            table.add_row(metric.label, *cells)
    return table


def _cell(metric: Metric, metrics: dict[str, float], ours: dict[str, float] | None) -> str:
    value = metrics.get(metric.name)
    if value is None:
        return "[dim]-[/dim]"
    text = short(value / metric.shown_in)
    spread = metrics.get(metric.name.removesuffix("_us") + "_spread") if metric.name.endswith("_us") else None
    if ours is None:
        return text if spread is None else f"{text} [dim]±{spread / 2:.1%}[/dim]"
    better = ratio(metric, ours[metric.name], value)
    if better is None or metric.better == "higher":  # a rate repeats the ratio of its time
        return text
    return f"{text} [{'green' if better >= 1 else 'red'}]({better:.2f}x)[/]"


def summary_table(results: Sequence[CaseResult]) -> Table:
    """All cases on one line each: forward + backward, and the speed-up over every peer with its geometric mean."""
    peers = sorted({name for r in results for name in list(r.metrics)[1:]})
    table = Table(title="forward + backward", title_justify="left", title_style="bold")
    table.add_column("case", no_wrap=True)
    for heading in ("µs", "TFLOP/s", *(f"vs {peer}" for peer in peers)):
        table.add_column(heading, justify="right", no_wrap=True)
    speedups: dict[str, list[float]] = {peer: [] for peer in peers}
    for r in results:
        (_ours_name, ours), *theirs = r.metrics.items()
        times = {name: metrics["fwd_bwd_us"] for name, metrics in theirs if "fwd_bwd_us" in metrics}
        cells = []
        for peer in peers:
            if peer in times:
                speedups[peer].append(times[peer] / ours["fwd_bwd_us"])
                cells.append(f"{speedups[peer][-1]:.2f}x")
            else:
                cells.append("[dim]missing[/dim]")
        table.add_row(r.case, short(ours["fwd_bwd_us"]), short(ours["fwd_bwd_tflops"]), *cells)
    if len(results) > 1 and peers:
        means = [f"{geomean(s):.2f}x" if s else "[dim]-[/dim]" for s in speedups.values()]
        table.add_section()
        table.add_row("geometric mean", "", "", *means, style="bold")
    return table


def short(value: float) -> str:
    """Four digits are what a median is worth: 9,245 · 602.1 · 52.18 · 3.046 · 0.0042."""
    if abs(value) >= 1000 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


# ---- chart ---------------------------------------------------------------------------------------------------------


def write_png(path: Path, results: Sequence[CaseResult], title: str, ceiling_tflops: float | None = None) -> None:
    """Bars of TFLOP/s, forward and forward + backward, grouped by case; a line at what the chip sustains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for r in results for name in r.metrics))
    colours = ["#0b6e4f", "#c8553d", "#8d99ae", "#e0a458"]
    bar = 0.8 / len(names)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.7 + 0.9 * len(results)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, metric, panel in zip(
        axes, ("fwd_tflops", "fwd_bwd_tflops"), ("forward", "forward + backward"), strict=True
    ):
        for i, name in enumerate(names):
            places = [case + (i - (len(names) - 1) / 2) * bar for case in range(len(results))]
            values = [r.metrics.get(name, {}).get(metric, 0.0) for r in results]
            bars = axis.barh(places, values, height=0.92 * bar, color=colours[i % len(colours)], label=name)
            axis.bar_label(bars, [f"{v:.3g}" if v else "missing" for v in values], padding=3, fontsize=8)
        if ceiling_tflops:
            axis.axvline(ceiling_tflops, color="black", linewidth=0.8, linestyle="--", label="dense product, sustained")
        axis.set_title(panel, loc="left", fontsize=10)
        axis.set_xlabel("TFLOP/s")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(results)), [r.case.replace("_", " ") for r in results], fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names) + 1,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
