"""The chart of the layer and the GEMM suite: bars of TFLOP/s, case by case, under what the chip sustains."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from supersonic_moe.bench.report import CaseResult, label
from supersonic_moe.perf_model import Machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {  # of bars, and of the numbers in them; the first is ours
    "#0b6e4f": "white", "#c8553d": "white", "#8d99ae": "black", "#e0a458": "black", "#5c6bc0": "white",
    "#8fc0a9": "black", "#6d4c41": "white", "#d9c2e9": "black",
}  # fmt: skip
CEILING_STYLES = ("--", ":")
SHORT_BAR = 0.15  # of the axis; a shorter bar has its number beside it


@dataclass(frozen=True)
class Panel:
    """One group of bars a case: ``metric``, a rate in TFLOP/s, of each contender."""

    title: str
    metric: str
    results: Sequence[CaseResult]

    @property
    def contenders(self) -> list[str]:
        return list(dict.fromkeys(name for result in self.results for name in result.metrics))


def dense_products(machine: Machine | None, *, fp8: bool) -> dict[str, float]:
    """What dense products sustain on a chip, in TFLOP/s; in an FP8 chart of ours and of BF16 beside it."""
    if machine is None:
        return {}
    bf16 = {"dense BF16 product": machine.matrix_flops / 1e12}
    return {"dense FP8 product": machine.fp8_flops / 1e12, **bf16} if fp8 else bf16


def write_png(path: Path, panels: Sequence[Panel], title: str, ceilings: Mapping[str, float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, title, ceilings).savefig(path, dpi=150)
    return path


def draw(panels: Sequence[Panel], title: str, ceilings: Mapping[str, float]) -> Figure:
    """The panels side by side, and a line for each of the ``ceilings``, in TFLOP/s."""
    everyone = dict.fromkeys(name for panel in panels for name in panel.contenders)
    colours = dict(zip(everyone, itertools.cycle(COLOURS), strict=False))
    names = [[result.case.replace("_", " ") for result in panel.results] for panel in panels]
    shared = all(of_panel == names[0] for of_panel in names)
    rates = [
        m[panel.metric] for panel in panels for r in panel.results for m in r.metrics.values() if panel.metric in m
    ]
    right = 1.04 * max([*rates, *ceilings.values()])

    figure = Figure(figsize=(5.5 * len(panels), 1.7 + 0.9 * max(map(len, names))), layout="constrained")
    handles: dict[str, Any] = {}
    grid = figure.subplots(1, len(panels), sharey=shared, squeeze=False)[0]
    for axis, panel, of_panel in zip(grid, panels, names, strict=True):
        handles |= _bars(axis, panel, colours, right)
        for (what, tflops), style in zip(ceilings.items(), CEILING_STYLES, strict=False):
            handles[f"{what}: {label(tflops)} TFLOP/s"] = axis.axvline(
                tflops, color="black", linewidth=0.8, linestyle=style, zorder=0.5
            )
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.set(xlabel="TFLOP/s", xlim=(0, right), ylim=(len(of_panel) - 0.5, -0.5))
        axis.set_yticks(range(len(of_panel)), of_panel, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    bars_first = {name: handles[name] for name in dict.fromkeys([*everyone, *handles])}
    columns = min(len(handles), 3 * len(panels))
    figure.legend(bars_first.values(), bars_first, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _bars(axis: Axes, panel: Panel, colours: Mapping[str, str], right: float) -> dict[str, Any]:
    """A bar for each contender of each case, its rate at the end; by the name of the contender."""
    found: dict[str, Any] = {}
    width = 0.8 / len(panel.contenders)
    for i, name in enumerate(panel.contenders):
        places = [case + (i - (len(panel.contenders) - 1) / 2) * width for case in range(len(panel.results))]
        rates = [result.metrics.get(name, {}).get(panel.metric, 0.0) for result in panel.results]
        found[name] = axis.barh(places, rates, height=0.92 * width, color=colours[name])
        for place, rate, result in zip(places, rates, panel.results, strict=True):
            text = label(rate) if rate else "missing" * (name in result.missing)
            inside = rate > SHORT_BAR * right
            axis.annotate(
                text, (rate, place), (-3 if inside else 3, 0), textcoords="offset points", va="center",
                ha="right" if inside else "left", color=COLOURS[colours[name]] if inside else "black", fontsize=8,
            )  # fmt: skip
    return found
