"""The mega suite on one page: each case against its bar as a table, speed-ups and shares of the floor as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.table import Table

from supersonic_moe.bench.bar_chart import COLOURS
from supersonic_moe.bench.infer import InferResult
from supersonic_moe.bench.mega_cases import DEEP_GEMM, OPERATOR, MegaShape, must
from supersonic_moe.bench.report import OURS, short


def bars(results: Sequence[InferResult]) -> Table:
    """A row for each case: what the class adds to the operator, the peer's time over ours, what it must be, errors."""
    table = Table(title="against the bars", title_justify="left", title_style="bold")
    table.add_column("case", no_wrap=True)
    headings = ("µs", "of floor", "host over operator, µs", "peer µs", "ratio", "must", "calc_diff, peer", "row, peer")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        own, peer = result.metrics[OURS], result.metrics.get(DEEP_GEMM, {})
        operator = result.metrics.get(OPERATOR, {})
        host = f"{own['host_us'] - operator['host_us']:+.1f}" if operator else "-"
        bar, ratio = _bar(result), _ratio(result)
        cells = [short(own["replay_us"]), f"{own['of_floor']:.0%}", host]
        cells += [short(peer["replay_us"]) if peer else "-", f"{ratio:.2f}x" if ratio else "-"]
        met = ratio is not None and bar is not None and ratio >= bar
        cells.append("-" if bar is None else f"[{'green' if met else 'red'}]{bar:.2f}x[/]")
        cells += [", ".join(short(m[name]) for m in (own, peer) if m) for name in ("calc_diff", "worst_row")]
        table.add_row(result.case, *cells)
    return table


def _ratio(result: InferResult) -> float | None:
    peer = result.metrics.get(DEEP_GEMM)
    return None if peer is None else peer["replay_us"] / result.metrics[OURS]["replay_us"]


def _bar(result: InferResult) -> float | None:
    """None for data that is there for its errors."""
    assert result.of is not None and isinstance(result.of.shape, MegaShape)
    return None if result.of.shape.positive else must(result.of.tokens)


def draw(results: Sequence[InferResult], title: str) -> Figure:
    """Over tokens: the peer's time over ours above the bars, and floor over time of ours (solid) and of the peer."""
    shapes: dict[str, list[InferResult]] = {}
    for result in results:
        if _bar(result) is not None and result.of is not None:
            shapes.setdefault(result.of.shape.name, []).append(result)
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, group), colour in zip(shapes.items(), COLOURS, strict=False):
        tokens = [result.of.tokens for result in group if result.of is not None]
        ratios = [(t, ratio) for t, result in zip(tokens, group, strict=True) if (ratio := _ratio(result)) is not None]
        left.plot([t for t, _ in ratios], [ratio for _, ratio in ratios], marker="o", color=colour, label=name)
        for contender, style in ((OURS, "-"), (DEEP_GEMM, "--")):
            of_floor = [(t, r.metrics[contender]["of_floor"]) for t, r in zip(tokens, group, strict=True)
                        if contender in r.metrics]  # fmt: skip
            label = f"{name}{', peer' if contender == DEEP_GEMM else ''}"
            right.plot([t for t, _ in of_floor], [s for _, s in of_floor], style, marker="o", color=colour, label=label)
    every = sorted({result.of.tokens for group in shapes.values() for result in group if result.of is not None})
    left.plot(every, [must(t) for t in every], color="black", drawstyle="steps-mid", linewidth=1, label="must")
    left.set_ylabel(f"time of {DEEP_GEMM} over ours")
    right.set(ylabel="floor over time", ylim=(0, 1.05))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(every, [str(t) for t in every])
        axis.set_xlabel("tokens")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
