"""The inference suite on one page: a table of who is fastest, and time against floor as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from supersonic_moe.bench.bar_chart import COLOURS
from supersonic_moe.bench.infer import InferResult, best_peer
from supersonic_moe.bench.report import OURS, short


def winners(results: Sequence[InferResult]) -> Table:
    """A row for each case: experts hit, rows, ours, floor, and the fastest of the others by name."""
    table = Table(title="fastest of the others", title_justify="left", title_style="bold")
    table.add_column("case", no_wrap=True)
    for heading in ("hits", "rows", "µs", "floor µs", "eager µs", "host µs", "best peer µs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("who", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for result in results:
        ours = result.metrics[OURS]
        cells = [short(ours[name]) for name in ("replay_us", "floor_us", "eager_us", "host_us")]
        peer = best_peer(result)
        against = (short(peer[1]), peer[0], f"{peer[1] / ours['replay_us']:.2f}x") if peer else ("-", "-", "-")
        table.add_row(result.case, str(result.hits), str(result.rows), *cells, *against)
    return table


def write_png(path: Path, figure: Figure) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def draw(results: Sequence[InferResult], title: str) -> Figure:
    """A panel for each shape and routing: µs of every contender against the floor, both logarithmic."""
    panels: dict[str, list[InferResult]] = {}
    for result in results:
        if result.of is not None:
            panels.setdefault(f"{result.of.shape.name}, {result.of.routing}", []).append(result)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 0.8 + 4 * rows), layout="constrained")
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    colours = dict(zip(names, list(COLOURS) * len(names), strict=False))
    handles = {}
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (heading, of_panel) in zip(grid.flat, panels.items(), strict=False):
        for name in reversed(names):  # ours on top
            points = sorted(
                (r.metrics[OURS]["floor_us"], r.metrics[name]["replay_us"]) for r in of_panel if name in r.metrics
            )
            if points:
                (handles[name],) = axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, linewidth=1.0, color=colours[name]
                )
        floors = sorted(r.metrics[OURS]["floor_us"] for r in of_panel)
        (handles["floor"],) = axis.plot(floors, floors, color="black", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel="floor, µs", ylabel="time, µs")
        axis.set_title(heading, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    shown = {name: handles[name] for name in (*names, "floor") if name in handles}
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=min(4, len(shown)), fontsize=8, frameon=False
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
