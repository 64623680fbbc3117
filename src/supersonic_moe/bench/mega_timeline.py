"""When the kernels of one call run, as torch's profiler sees them; on a CPU, the calls of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from supersonic_moe.bench.bar_chart import COLOURS
from supersonic_moe.bench.timing import Call

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM = 3
PALETTE = tuple(COLOURS)
SHORTEST_LABEL = 0.04  # of the longest call: a bar with room for its name


class Span(NamedTuple):
    """Of a kernel, in µs from the start of the first one."""

    name: str
    begin_us: float
    end_us: float


def spans_of(call: Call, device: torch.device) -> list[Span]:
    """The kernels of one call, in order of their start."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    for _ in range(WARM):
        call()
    with profile(activities=[activity]) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    ran = [e for e in found.events() or () if e.device_type.name == activity.name and e.cpu_parent is None]
    ran.sort(key=lambda e: e.time_range.start)
    return [
        Span(e.name, e.time_range.start - ran[0].time_range.start, e.time_range.end - ran[0].time_range.start)
        for e in ran
    ]


def draw(timelines: Sequence[tuple[str, Sequence[Span]]], title: str) -> Figure:
    """A row for each case, a bar for each kernel; kernels of one name have one colour."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(span.name for _, spans in timelines for span in spans))
    colours = {name: PALETTE[at % len(PALETTE)] for at, name in enumerate(names)}
    longest = max(span.end_us for _, spans in timelines for span in spans)
    figure = Figure(figsize=(12, 1.6 + 0.35 * len(timelines)), layout="constrained")
    axis = figure.subplots()
    for place, (_, spans) in enumerate(timelines):
        for span in spans:
            width = span.end_us - span.begin_us
            axis.barh(place, width, left=span.begin_us, height=0.7, color=colours[span.name])
            if width >= SHORTEST_LABEL * longest:
                axis.text(span.begin_us + width / 2, place, f"{width:,.0f}", ha="center", va="center", fontsize=7)
    axis.set_yticks(range(len(timelines)), [case for case, _ in timelines], fontsize=8)
    axis.set(xlim=(0, 1.02 * longest), xlabel="µs from the start of the first kernel")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    handles = [axis.barh(0, 0, color=colour, label=name[:60]) for name, colour in colours.items()]
    axis.legend(handles=handles, loc="lower right", fontsize=7, frameon=False)
    axis.set_title(title, loc="left", fontsize=10)
    return figure
