"""The mega suite on one page: each case against its bar as a table, speed-ups and shares of the floor as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.table import Table

from supersonic_moe.bench.bar_chart import COLOURS
from supersonic_moe.bench.infer import InferResult
from supersonic_moe.bench.mega_cases import DEEP_GEMM, DIRECT, OPERATOR, MegaShape, at_most_us, must
from supersonic_moe.bench.report import OURS, short


def bars(results: Sequence[InferResult]) -> Table:
    """A row for each case: its times, the peer's time over the best of ours, what it must be, and the errors."""
    several = any(_shape(result).ranks > 1 for result in results)
    beside = ("direct µs", "at most µs", "of floor", "host µs") if several else ("of floor", "host over operator, µs")
    names = "direct, peer" if several else "peer"
    headings = ("µs", *beside, "peer µs", "ratio", "must", f"calc_diff, {names}", f"row, {names}")
    table = Table(title="against the bars", title_justify="left", title_style="bold")
    table.add_column("case", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        own, peer = result.metrics[OURS], result.metrics.get(DEEP_GEMM)
        cells = [short(own["replay_us"]), *(_of_ranks(result) if several else _of_one(result))]
        bar, ratio = _bar(result), _ratio(result)
        cells += [short(peer["replay_us"]) if peer else "-", f"{ratio:.2f}x" if ratio else "-"]
        cells.append("-" if bar is None else _judged(f"{bar:.2f}x", ratio is not None and ratio >= bar))
        shown = [m for m in (own, result.metrics.get(DIRECT), peer or result.untimed.get(DEEP_GEMM)) if m]
        cells += [", ".join(short(m[name]) for m in shown) for name in ("calc_diff", "worst_row")]
        table.add_row(result.case, *cells)
    return table


def _of_one(result: InferResult) -> list[str]:
    own, operator = result.metrics[OURS], result.metrics.get(OPERATOR)
    return [f"{own['of_floor']:.0%}", f"{own['host_us'] - operator['host_us']:+.1f}" if operator else "-"]


def _of_ranks(result: InferResult) -> list[str]:
    own, direct = result.metrics[OURS], result.metrics.get(DIRECT)
    at_most = None if result.of is None else at_most_us(_shape(result).name, result.of.tokens)
    return [
        short(direct["replay_us"]) if direct else "-",
        "-" if at_most is None else _judged(short(at_most), best_us(result) <= at_most),
        f"{own['of_floor']:.0%}",
        short(own["host_us"]),
    ]


def _judged(text: str, met: bool) -> str:
    return f"[{'green' if met else 'red'}]{text}[/]"


def best_us(result: InferResult) -> float:
    """Of the ways that a user of ours may choose."""
    return min(result.metrics[name]["replay_us"] for name in (OURS, DIRECT) if name in result.metrics)


def _ratio(result: InferResult) -> float | None:
    peer = result.metrics.get(DEEP_GEMM)
    return None if peer is None else peer["replay_us"] / best_us(result)


def _shape(result: InferResult) -> MegaShape:
    assert result.of is not None and isinstance(result.of.shape, MegaShape)
    return result.of.shape


def _bar(result: InferResult) -> float | None:
    """None for data that is there for its errors."""
    shape = _shape(result)
    return None if shape.positive or result.of is None else must(result.of.tokens, shape.ranks)


def draw(results: Sequence[InferResult], title: str) -> Figure:
    """Over tokens: the peer's time over the best of ours above the bars, and floor over time of ours (solid), of direct
    calls (dotted) and of the peer.
    """
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
        for contender, style, what in ((OURS, "-", ""), (DIRECT, ":", ", direct"), (DEEP_GEMM, "--", ", peer")):
            of_floor = [(t, r.metrics[contender]["of_floor"]) for t, r in zip(tokens, group, strict=True)
                        if contender in r.metrics]  # fmt: skip
            if not of_floor:
                continue
            label = f"{name}{what}"
            right.plot([t for t, _ in of_floor], [s for _, s in of_floor], style, marker="o", color=colour, label=label)
    every = sorted({result.of.tokens for group in shapes.values() for result in group if result.of is not None})
    ranks = max((_shape(result).ranks for result in results), default=1)
    left.plot(every, [must(t, ranks) for t in every], color="black", drawstyle="steps-mid", linewidth=1, label="must")
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
