"""How long each function of a backend takes inside a layer: spans between marks.

The functions of the backend modules are bracketed with marks (CUDA events; on a CPU, the clock) while a layer runs as
it always does, under sustained load and called back to back. So a span is a call as a layer makes it: with caches as
its predecessors left them, and all launches of a function together. It includes what the GPU waits between those
launches; a pair of events costs it about two microseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch

from supersonic_moe.bench.timing import Call, NoResultError, estimate_calls
from supersonic_moe.jit.tape import without_tapes
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import CAPABILITIES, functions_of
from supersonic_moe.private_api import gpu_sleep

QUANTIZING = ("quantize_rows", "quantize_weights", "quantize_columns", "quantize_both_orders", "pad_segments")
CYCLES_PER_US = 2000  # at least those of any clock that a GPU has today


class Span(NamedTuple):
    function: str
    us: float  # median


class Spans(NamedTuple):
    """One call: its functions in order, and how long all of it takes."""

    parts: list[Span]
    us: float

    @property
    def quantize_share(self) -> float:
        """Of the whole call, what passes take that only quantize or transpose."""
        return sum(span.us for span in self.parts if span.function in QUANTIZING) / self.us


class Marks:
    """Points in time on a CPU, where work is done when a call returns."""

    def mark(self) -> Any:
        return time.perf_counter()

    def us(self, begin: Any, end: Any) -> float:
        return float(end - begin) * 1e6

    def wait(self) -> None:
        """Until every mark has happened."""

    def delay(self, us: float) -> None:
        """Let what follows start that much later than the host enqueues it."""


class CudaMarks(Marks):
    """Events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def us(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) * 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def delay(self, us: float) -> None:
        gpu_sleep(int(us * CYCLES_PER_US))


def marks_for(device: torch.device) -> Marks:
    return CudaMarks(device) if device.type == "cuda" else Marks()


def measure_spans(call: Call, clock: Marks, *, warm_ms: float, min_ms: float) -> Spans:
    """Medians over at least ``min_ms`` of calls, after ``warm_ms`` of them."""

    def recorded() -> tuple[list[tuple[str, Any, Any]], Any, Any]:
        with _recorded(clock.mark) as marks:
            begin, _, end = clock.mark(), call(), clock.mark()
        return marks, begin, end

    call()  # the first compiles
    clock.wait()
    start = time.perf_counter()
    _, begin, end = recorded()
    host_us = (time.perf_counter() - start) * 1e6
    clock.wait()
    estimate_us = max(clock.us(begin, end), 1.0)
    # Where the host needs as long as the GPU, gaps would count as work: let the host get ahead. A GPU that limits is
    # never made to wait, because that would cool it.
    head_start_us = 2 * host_us if estimate_us < 1.25 * host_us else 0.0
    for _ in range(estimate_calls(warm_ms * 1e3, estimate_us)):
        call()
    runs = []
    for _ in range(estimate_calls(min_ms * 1e3, estimate_us)):
        if head_start_us:
            clock.delay(head_start_us)
        runs.append(recorded())
    clock.wait()

    names = [name for name, _, _ in runs[0][0]]
    if any([name for name, _, _ in marks] != names for marks, _, _ in runs):
        raise NoResultError("two calls of the same layer called different functions")
    columns = zip(*([clock.us(a, b) for _, a, b in marks] for marks, _, _ in runs), strict=True)
    parts = [Span(name, statistics.median(times)) for name, times in zip(names, columns, strict=True)]
    return Spans(parts, statistics.median(clock.us(begin, end) for _, begin, end in runs))


@contextmanager
def _recorded(mark: Callable[[], Any]) -> Iterator[list[tuple[str, Any, Any]]]:
    """(function, mark before, mark after) of every call of a backend's function inside the block."""
    marks: list[tuple[str, Any, Any]] = []
    originals: list[tuple[Any, str, Any]] = []

    def bracketed(name: str, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = mark()
            result = function(*args, **kwargs)
            marks.append((name, before, mark()))
            return result

        return call

    for module, name in _functions():
        originals.append((module, name, getattr(module, name)))
        setattr(module, name, bracketed(name, originals[-1][2]))
    try:
        with without_tapes():
            yield marks
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def _functions() -> set[tuple[Any, str]]:
    """Module and name of every function of the backends that are installed."""
    found = {
        "reference": True,
        "triton": registry.HAS_TRITON,
        "sm90": registry.HAS_TRITON and registry.HAS_DRIVER_BINDINGS,
    }
    return {
        (module, function)
        for backend, present in found.items()
        if present
        for capability, protocol in CAPABILITIES.items()
        if (module := getattr(registry.kernels(backend), capability)) is not None
        for function in functions_of(protocol)
    }
