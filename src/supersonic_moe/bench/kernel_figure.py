"""The figure of the kernels suite: a roofline, and every kernel's time against its floor.

    python -m supersonic_moe.bench.kernel_figure RESULTS.json FIGURE.png     draws a file of ``bench kernels`` again

Roofline, both axes logarithmic: TFLOP/s over FLOPs per compulsory byte, under the two ceilings that were measured in
the same rounds. Matrix products crowd under the flat roof, so they are labelled in a zoom. Kernels without FLOPs worth
counting have no place on such a plot but a distance to the copy bandwidth: hollow points, that far below the slanted
roof, side by side in the order of the table.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from supersonic_moe.bench.kernels import GROUPS, KernelsResult, results_of
from supersonic_moe.bench.report import label, part_of_a_run, short

COLOURS = dict(zip(GROUPS, ("#6c757d", "#0b6e4f", "#c8553d", "#5c6bc0"), strict=True))
DPI = 130


def write_figures(path: Path, content: Mapping[str, Any]) -> list[Path]:
    """A figure for each shape in a document of the suite: ``path``, or one with the shape in its name for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results, written = results_of(content["rows"]), []
    commit, dash, dirty = content["commit"].partition("-")
    source = f"{content['device']} · torch {content['torch']} · commit {commit[:12]}{dash}{dirty}"
    path.parent.mkdir(parents=True, exist_ok=True)
    for result in results:
        figure = draw(result, f"Kernels of one MoE layer, each alone · {result.case}\n{source}")
        written.append(path.with_stem(f"{path.stem}-{result.case}") if len(results) > 1 else path)
        figure.savefig(written[-1])
        plt.close(figure)
    return written


def draw(result: KernelsResult, title: str) -> Any:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 8), dpi=DPI, width_ratios=(5, 4), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    names = {name: group for group, members in GROUPS.items() for name in members if name in result.metrics}
    _bars(right, result, names)
    _roofline(left, result, names)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(linewidth=0.4, alpha=0.5)
        axis.set_axisbelow(True)
    return figure


def _bars(axis: Any, result: KernelsResult, names: Mapping[str, str]) -> None:
    """Bars of µs, a black tick at the floor. Logarithmic: a matrix product takes as long as hundreds of routings."""
    metrics = [result.metrics[name] for name in names]
    times, floors = [m["us"] for m in metrics], [m["floor_us"] for m in metrics]
    places = range(len(names))
    axis.barh(places, times, height=0.7, color=[COLOURS[group] for group in names.values()], alpha=0.75)
    axis.scatter(floors, places, marker="|", s=330, linewidths=2.5, color="black", zorder=3)
    for place, time, floor in zip(places, times, floors, strict=True):
        text = f"{label(time)} µs · {floor / time:.0%}"
        at = max(time, floor), place
        axis.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=8)
    least, most = min(times + floors), max(times + floors)
    axis.set(xscale="log", xlim=(least / 2, most * (2 * most / least) ** 0.25), ylim=(len(names) - 0.4, -0.6))
    axis.set_yticks(places, list(names), fontsize=8.5)
    axis.set_xlabel("µs; beside each bar its time, and the floor as a share of it")
    axis.set_title("time of a call (bar) and its floor (black)", loc="left", fontsize=10)


# ---- roofline --------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: float
    y: float
    label: str
    colour: str


def _roofline(axis: Any, result: KernelsResult, names: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    slope, top = result.metrics["copy"]["gbps"] / 1e3, result.metrics["matmul"]["tflops"]  # TFLOP/s at 1 FLOP a byte
    ridge = top / slope
    products = list(_products(result, names))
    others = list(_without_flops(result, names, ridge))
    everyone = products + others
    left, right = min(ridge / 300, *(p.x / 2 for p in everyone)), max(ridge * 40, *(p.x * 4 for p in everyone))
    low, high = min(left * slope, *(p.y for p in everyone)) / 2, max(top, *(p.y for p in everyone)) * 1.8
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    axis.set(xlabel="FLOPs per byte that must move", ylabel="TFLOP/s")
    axis.set_title(f"ceilings: copy {slope:.3g} TB/s, matmul {short(top)} TFLOP/s", loc="left", fontsize=10)
    handles = [axis.plot([], [], "o", color=colour, label=group)[0] for group, colour in COLOURS.items()]
    hollow = {"color": "black", "markerfacecolor": "white", "label": "no FLOPs: share of the copy bandwidth"}
    roof = axis.plot([], [], color="black", linewidth=1.2, label="roof of the two ceilings")
    axis.legend(
        handles=[*handles, *axis.plot([], [], "o", **hollow), *roof], loc="upper left", fontsize=9, frameon=False
    )

    axes = {axis: everyone}
    if products:
        zoom = axis.inset_axes((0.5, 0.07, 0.49, 0.5))
        zoom.set(xscale="log", yscale="log", xlim=_widened([p.x for p in products]))
        zoom.set_ylim(_widened([top, *(p.y for p in products)]))
        for scale in (zoom.xaxis, zoom.yaxis):
            scale.set(major_locator=MaxNLocator(6), major_formatter=ScalarFormatter(), minor_locator=NullLocator())
        zoom.set_title("the framed part, TFLOP/s beside each name", loc="left", fontsize=9)
        zoom.tick_params(labelsize=8)
        axis.plot(*_outline(zoom), color="black", linewidth=0.8)
        axes[zoom] = products
    for where, points in axes.items():
        for roof in (([left, ridge], [left * slope, top]), ([ridge, right], [top, top])):
            where.plot(*roof, color="black", linewidth=1.2, label="roof")
        for p in points:
            face = "white" if p in others else p.colour
            where.plot(p.x, p.y, "o", markersize=7, color=p.colour, markerfacecolor=face, markeredgewidth=1.5)

    axis.figure.draw_without_rendering()
    axis.figure.set_layout_engine("none")  # labels go where the axes are now
    place_labels(axis, others, [part.get_tightbbox() for part in (axis.get_legend(), *axis.child_axes)])
    if products:
        place_labels(zoom, products, [])


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values and, on a logarithmic axis, a quarter of it on both sides: room for labels."""
    room = max(max(values) / min(values), 1.1) ** 0.25
    return min(values) / room, max(values) * room


def _outline(zoom: Any) -> tuple[list[float], list[float]]:
    (left, right), (low, high) = zoom.get_xlim(), zoom.get_ylim()
    return [left, right, right, left, left], [low, low, high, high, low]


def _products(result: KernelsResult, names: Mapping[str, str]) -> Iterator[Point]:
    for name, group in names.items():
        m = result.metrics[name]
        if m["flops"]:
            yield Point(m["flops"] / m["bytes"], m["tflops"], f"{name} {short(m['tflops'])}", COLOURS[group])


def _without_flops(result: KernelsResult, names: Mapping[str, str], ridge: float) -> Iterator[Point]:
    """At equal distances from 1/200 to 1/4 of the way to the ridge: room for a label below each."""
    found = [name for name in names if not result.metrics[name]["flops"]]
    for i, name in enumerate(found):
        x, gbps = ridge / 200 * 50 ** (i / len(found)), result.metrics[name]["gbps"]
        share = gbps / result.metrics["copy"]["gbps"]
        yield Point(x, x * gbps / 1e3, f"{name} {share:.0%}", COLOURS[names[name]])


# ---- labels ----------------------------------------------------------------------------------------------------------

Pixels = tuple[float, float]
GAPS = range(4, 400, 6)  # from a marker to its label, in points
ANGLES = [math.radians(-45 + side * turn) for turn in range(0, 181, 15) for side in (1, -1)]  # the lower right first


class Box(NamedTuple):
    left: float
    low: float
    right: float
    high: float

    @classmethod
    def around(cls, centre: Pixels, width: float, height: float) -> Box:
        (x, y), across, up = centre, width / 2, height / 2
        return cls(x - across, y - up, x + across, y + up)

    def overlaps(self, other: Box) -> bool:
        beside = self.right < other.left or other.right < self.left
        return not (beside or self.high < other.low or other.high < self.low)

    def holds(self, dot: Pixels) -> bool:
        return self.left <= dot[0] <= self.right and self.low <= dot[1] <= self.high


def place_labels(axis: Any, points: Sequence[Point], obstacles: Sequence[Any]) -> None:
    """Write a label near each point, and draw a line to it; the rightmost point first."""
    unit, to_pixels = axis.figure.dpi / 72, axis.transData.transform
    centres: list[Pixels] = [tuple(to_pixels((p.x, p.y))) for p in points]
    markers = [Box.around(centre, 9 * unit, 9 * unit) for centre in centres]
    boxes = [*markers, *(Box(*obstacle.extents) for obstacle in obstacles)]
    roofs = [_dots(*to_pixels(line.get_xydata())) for line in axis.lines if line.get_label() == "roof"]
    taken = _Taken(Box(*axis.get_window_extent().extents), boxes, [dot for roof in roofs for dot in roof], unit)
    for point, centre, marker in sorted(zip(points, centres, markers, strict=True), key=lambda it: it[1], reverse=True):
        label = axis.annotate(
            point.label, (point.x, point.y), (0, 0), textcoords="offset points", ha="center", va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": point.colour, "shrinkB": 4},
        )  # fmt: skip
        size = label.get_window_extent()
        x, y = taken.find(centre, marker, size.width + 4 * unit, size.height + 2 * unit)
        label.set_position(((x - centre[0]) / unit, (y - centre[1]) / unit))


@dataclass
class _Taken:
    """What is drawn already, in pixels: boxes of markers and labels, dots along the lines."""

    frame: Box
    boxes: list[Box]
    dots: list[Pixels]
    unit: float  # pixels a point

    def find(self, centre: Pixels, marker: Box, width: float, height: float) -> Pixels:
        """Claim the nearest place for a label of that size which covers nothing and whose line crosses no other label
        or marker. Where there is none, the place right beside the marker.
        """
        places = [
            (
                centre[0] + math.cos(angle) * (gap * self.unit + width / 2),
                centre[1] + math.sin(angle) * (gap * self.unit + height / 2),
            )
            for gap in GAPS
            for angle in ANGLES
        ]
        free = (p for p in places if self._is_free(Box.around(p, width, height), _dots(centre, p), marker))
        found = next(free, places[0])
        self.boxes.append(Box.around(found, width, height))
        self.dots += _dots(centre, found)
        return found

    def _is_free(self, place: Box, line: Sequence[Pixels], marker: Box) -> bool:
        return (
            self.frame.holds(place[:2])
            and self.frame.holds(place[2:])
            and not any(place.overlaps(box) for box in self.boxes)
            and not any(place.holds(dot) for dot in self.dots)
            and not any(box.holds(dot) for box in self.boxes if box is not marker for dot in line)
        )


def _dots(start: Pixels, end: Pixels) -> list[Pixels]:
    """Along a line, about every four pixels."""
    (x0, y0), (x1, y1) = start, end
    steps = max(1, round(math.dist(start, end) / 4))
    return [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m supersonic_moe.bench.kernel_figure RESULTS.json FIGURE.png")
    source, target = map(Path, sys.argv[1:])
    content = json.loads(source.read_text(encoding="utf-8"))
    if reason := part_of_a_run(content):
        sys.exit(f"{source} {reason}")
    for path in write_figures(target, content):
        print(path)


if __name__ == "__main__":
    main()
