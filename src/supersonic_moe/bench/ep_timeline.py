"""When the rows of a layer travel within one forward and backward of a rank, and the figure of it.

Each exchange is bracketed with marks on the stream that it runs on (CUDA events; on a CPU, the clock): it begins when
that stream reaches it, and ends when its rows are there, waits for other ranks included. One whose rows travel part by
part beside products is several: what the stream of the products does for it at its start and its end, and each part on
the stream beside. What is not travel is products, sums and routing; what runs beside them is drawn over them.

Its phase is what the watch of the ranks, which every exchange tells, heard last.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from supersonic_moe.bench.spans import Marks
from supersonic_moe.bench.timing import Call, NoResultError, covered
from supersonic_moe.parallel.collectives import Ranks
from supersonic_moe.parallel.copies import Copies, Departure
from supersonic_moe.parallel.watch import PHASES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM, RUNS = 10, 20  # the same on every rank: all of them make the same calls
COLOURS = dict(zip(PHASES, ("#0b6e4f", "#5c6bc0", "#c8553d", "#b8860b"), strict=True))
_EXCHANGES = ("gather", "exchange")
_IN_PARTS = ("gather_in_parts", "departure")  # their start; of Copies, as is what follows
_BESIDE = ("pull", "push")  # their parts, on the stream beside


class Exchange(NamedTuple):
    phase: str
    begin_us: float
    end_us: float


@dataclass
class Timeline:
    """Medians, from the start of a call."""

    exchanges: list[Exchange]
    end_us: float


def timeline(call: Call, marks: Marks, ranks: Ranks) -> Timeline:
    """Of ``call``, which is a forward and a backward over ``ranks``."""
    runs = []
    for _ in range(WARM):
        call()
    for _ in range(RUNS):
        with _recorded(ranks, marks.mark) as found:
            begin, _, end = marks.mark(), call(), marks.mark()
        runs.append((begin, found, end))
    marks.wait()
    phases = [phase for phase, _, _ in runs[0][1]]
    if any([phase for phase, _, _ in found] != phases for _, found, _ in runs):
        raise NoResultError("two calls of the same layer exchanged different rows")
    exchanges = []
    for number, phase in enumerate(phases):
        times = [[marks.us(begin, mark) for mark in found[number][1:]] for begin, found, _ in runs]
        exchanges.append(Exchange(phase, *(statistics.median(column) for column in zip(*times, strict=True))))
    return Timeline(exchanges, statistics.median(marks.us(begin, end) for begin, _, end in runs))


@contextmanager
def _recorded(ranks: Ranks, mark: Callable[[], Any]) -> Iterator[list[tuple[str, Any, Any]]]:
    """(phase, mark before, mark after) of every exchange of ``ranks`` inside the block, as they end."""
    found: list[tuple[str, Any, Any]] = []
    names = [*_EXCHANGES, *(_IN_PARTS + _BESIDE if isinstance(ranks, Copies) else ())]

    def bracketed(method: Any) -> Any:
        @wraps(method)
        def call(*args: Any) -> Any:
            stream = getattr(ranks, "stream", None) if method.__name__ in _BESIDE else None
            if stream is not None:  # which waits for that of the products first, as every part does
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                before = mark()
            result = method(*args)
            with torch.cuda.stream(stream):
                found.append((ranks.watch.activity.phase, before, mark()))
            if isinstance(result, Departure):
                vars(result)["arrived"] = bracketed(result.arrived)
            return result

        return call

    for name in names:
        vars(ranks)[name] = bracketed(getattr(ranks, name))
    try:
        yield found
    finally:
        for name in names:
            del vars(ranks)[name]


def draw(timelines: Sequence[tuple[str, Timeline]], title: str) -> Figure:
    """A bar for each case, as long as its forward and backward, with its exchanges on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.6 + 0.9 * len(timelines)), layout="constrained")
    axis = figure.subplots()
    for place, (_, found) in enumerate(timelines):
        axis.barh(place, found.end_us, height=0.4, color="#d9d9d9")
        for phase, begin, end in found.exchanges:
            axis.barh(place, end - begin, left=begin, height=0.7, color=COLOURS[phase], alpha=0.85)
        travel = covered((begin, end) for _, begin, end in found.exchanges)
        text = f"{found.end_us:,.0f} µs, of which exchanges {travel:,.0f}"
        axis.annotate(text, (found.end_us, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(timelines)), [case for case, _ in timelines], fontsize=8)
    axis.set(xlim=(0, 1.25 * max(found.end_us for _, found in timelines)), xlabel="µs from the start of a call, rank 0")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    handles = [axis.barh(0, 0, color=colour, label=phase) for phase, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    axis.set_title(title, loc="left", fontsize=10)
    return figure
