"""Products while something else runs beside them, or on fewer multiprocessors: for ``exchange_ranks.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.bench.timing import Call, Clock, NoResultError, Slice
from supersonic_moe.kernels.sm90 import gemm_config

OUTLAST = 1.5
"""Times as long as the products beside it a load is to last."""


def on_fewer(count: int, product: Callable[[], Tensor]) -> Tensor:
    """``product`` by our kernels, launched on ``count`` multiprocessors less than there are."""
    every = gemm_config.multiprocessors
    gemm_config.multiprocessors = lambda device: every(device) - count  # type: ignore[assignment]
    try:
        return product()
    finally:
        gemm_config.multiprocessors = every


@dataclass(frozen=True)
class Load:
    """What runs beside products, on a stream of its own."""

    unit: Callable[[int], None]
    """So many moves."""
    us: float
    """Of one alone."""
    side: Any

    def start(self, us: float) -> Any:
        """For at least so long. Returns the event of its end."""
        with torch.cuda.stream(self.side):
            self.unit(math.ceil(us / self.us))
            end: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record(self.side)
        return end


@dataclass
class Beside:
    """A product under a load."""

    product: Call
    load: Load
    us: float
    """Of a call, three times as long to begin with."""

    def __post_init__(self) -> None:
        self.us *= 3

    def __call__(self) -> object:
        return self.product()


class LoadedClock:
    """A clock that starts the load of :class:`Beside` before a slice, and waits for its end after it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def slice(self, call: Call, settle: int, calls: int) -> Slice:
        if not isinstance(call, Beside):
            return self.clock.slice(call, settle, calls)
        end = call.load.start(OUTLAST * (settle + calls) * call.us)
        found = self.clock.slice(call, settle, calls)
        over = end.query()
        end.synchronize()
        call.us = statistics.median(found.times_us)
        if over:
            raise NoResultError("what was to run beside it ended first")
        return found
