"""Timing contenders against each other on a GPU whose limit is power.

Under load an H200 sits at its 700 W cap: a matrix product that runs at 760-780 TFLOP/s for its first 60 ms sustains
672-680. A short window therefore measures the boost clock, and whoever runs first on a cool chip wins. So
:func:`measure`

1. warms up under the contenders' own load for at least ``warm_ms``,
2. times at least ``min_ms`` of each contender, in ``ROUNDS`` or more slices interleaved with the others', in
   rotating order, forwards and backwards in turn (:func:`in_turns`), so that nobody always runs behind a contender that
   leaves the chip cool: slices of one round make a pair (:func:`paired`),
3. runs every slice for half of ``warm_ms`` untimed first, while clock and power settle from the neighbour's level to
   its own: after a contender that leaves the chip cool, boost lasts for about 60 ms,
4. reports medians with the 10th and 90th percentile, and the SM clock and board power while the slice was running,
5. where one contender is what the others are compared with (``beside``), leaves those out of warm-up and rounds that
   are far slower: the one timed call of the probe, which has the second call of each, is their result. To know that
   something takes 40 times as long that is enough; in rounds it would take most of the time of a run.

A single run scatters by 2 to 5 % and cannot see half a per cent; twenty pairs can, because what drifts from round to
round is common to a pair.

Every timed call has its own pair of events, recorded in stream order, so times are those of eager calls enqueued back
to back: if the host is too slow to keep the GPU fed, that shows. :func:`wall_and_busy_us` sets such a time against
the part of it in which the GPU does run a kernel. That part comes from the profiler's kernel trace (the union of kernel
intervals, as kernels may overlap), not from replaying a CUDA graph: a graph would count the gaps between launches as
busy, and a contender that synchronises with the host cannot be captured at all.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from supersonic_moe.bench.sensor import Reading, Sensor

Call = Callable[[], object]

ROUNDS = 4
SETTLE = 0.5  # untimed load before the timed calls of a slice, as a share of ``warm_ms``: 150 ms of 300
SLOWEST_CALL_S = 10.0  # a contender slower than this is reported missing: a sustained median would take minutes
FAR_SLOWER = 10.0  # times as long as the contender that it is compared with, and
LONG_CALL_US = 20e3  # this long: shorter calls cost a run no more than anybody's
POLL_S = 0.005  # between two NVML readings; the power sensor itself refreshes every few milliseconds


@dataclass(frozen=True)
class Slice:
    """Consecutive calls of one contender."""

    times_us: list[float]  # of each call
    readings: list[Reading]  # clock and power meanwhile


class Clock(Protocol):
    def slice(self, call: Call, settle: int, calls: int) -> Slice:
        """Run ``settle`` untimed calls, then ``calls`` timed ones; return when they are done."""
        ...


class WallClock:
    """For work that is done when the call returns (CPU). ``now`` returns seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def slice(self, call: Call, settle: int, calls: int) -> Slice:
        for _ in range(settle):
            call()
        times_us = []
        for _ in range(calls):
            start = self._now()
            call()
            times_us.append((self._now() - start) * 1e6)
        return Slice(times_us, [])


class CudaClock:
    """CUDA events on the current stream; reads the sensors while the GPU works off what was enqueued.

    ``cold_l2`` reads four times the L2 cache before every call, outside its events: for sizes that a cache would
    otherwise serve. Reads and not writes, so that the cache holds nothing that the call would have to write back first:
    50 MB of such lines cost a call that streams from memory 12 to 30 us.
    """

    def __init__(self, device: torch.device, *, cold_l2: bool = False) -> None:
        self._sensor = Sensor.open(device)
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.zeros(l2_bytes, dtype=torch.int32, device=device) if cold_l2 else None

    def slice(self, call: Call, settle: int, calls: int) -> Slice:
        for _ in range(settle):
            call()
        events = [(_event(), _event()) for _ in range(calls)]
        for start, end in events:
            if self._flush is not None:
                self._flush.sum()
            start.record()
            call()
            end.record()
        last = events[-1][1]
        readings = [self._sensor.read()] if self._sensor else []
        while not last.query():
            time.sleep(POLL_S)
            if self._sensor and not last.query():
                readings.append(self._sensor.read())
        return Slice([start.elapsed_time(end) * 1e3 for start, end in events], readings)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_for(device: torch.device, *, cold_l2: bool = False) -> Clock:
    return CudaClock(device, cold_l2=cold_l2) if device.type == "cuda" else WallClock()


@dataclass(frozen=True)
class Timing:
    us: float  # median
    p10_us: float
    p90_us: float
    calls: int
    sm_mhz: float | None
    watts: float | None
    slices_us: tuple[float, ...] = ()  # median of each slice, in the order of the rounds
    few: bool = False  # far slower than what it is compared with: the call of the probe, and no part of the rounds

    @property
    def spread(self) -> float:
        """Width of the middle 80 % over the median; a smaller difference between contenders is noise."""
        return (self.p90_us - self.p10_us) / self.us if self.us else 0.0

    def energy(self, flops: int) -> dict[str, float]:
        """SM clock, board power and energy a FLOP, by the names of their metrics; empty without a sensor."""
        if self.sm_mhz is None or self.watts is None:
            return {}
        pj_per_flop = self.watts * self.us * 1e6 / flops if flops else 0.0
        return {"sm_mhz": self.sm_mhz, "watts": self.watts, "pj_per_flop": pj_per_flop}


@dataclass(frozen=True)
class Paired:
    """How many times longer a contender takes than another, from slices that ran side by side."""

    ratio: float  # median of the pairs
    low: float
    high: float  # an interval that holds the true median in 95 of 100 runs


@dataclass(frozen=True)
class Missing:
    """A contender that was not measured, and why."""

    reason: str
    out_of_memory: bool = False


class NoResultError(RuntimeError):
    """What a case is about could not run itself, so there is nothing to report."""


class LastCaseError(NoResultError):
    """Nor can any case after it."""


def measure(
    contenders: Mapping[str, Call],
    clock: Clock,
    *,
    warm_ms: float,
    min_ms: float,
    rounds: int = ROUNDS,
    beside: str | None = None,
) -> dict[str, Timing | Missing]:
    """Time the contenders side by side in ``rounds`` or more slices each; one that raises or is too slow comes back as
    :class:`Missing`. ``beside`` names the contender that the others are compared with: those that are far slower
    get one timed call (:attr:`Timing.few`).
    """
    results: dict[str, Timing | Missing] = {}
    estimate_us: dict[str, float] = {}
    probes: dict[str, Slice] = {}
    for name, call in contenders.items():
        probe = attempt(partial(clock.slice, call, 1, 1))
        if isinstance(probe, Missing):
            results[name] = probe
        elif probe.times_us[0] > SLOWEST_CALL_S * 1e6:
            seconds = probe.times_us[0] / 1e6
            results[name] = Missing(f"one call takes {seconds:.0f} s, over the limit of {SLOWEST_CALL_S:.0f} s")
        else:
            estimate_us[name] = max(probe.times_us[0], 1e-3)
            probes[name] = probe
    few = _far_slower(estimate_us, beside)
    results |= {name: replace(summarise([probes[name]]), few=True) for name in few}
    running = [name for name in estimate_us if name not in few]
    if not running:
        return results

    warm_slice_us = warm_ms * 1e3 / len(running)
    for name in running:
        warmed_us = 0.0
        while warmed_us < warm_slice_us:
            calls = estimate_calls(warm_slice_us - warmed_us, estimate_us[name])
            part = clock.slice(contenders[name], 0, calls)
            estimate_us[name] = max(statistics.median(part.times_us), 1e-3)
            warmed_us += max(sum(part.times_us), 1.0)

    slices: dict[str, list[Slice]] = {name: [] for name in running}
    done = 0
    while done < rounds or any(_timed_us(s) < min_ms * 1e3 * (1 - 1e-6) for s in slices.values()):
        for name in in_turns(running, done):
            calls = estimate_calls(min_ms * 1e3 / rounds, estimate_us[name])
            settle = estimate_calls(SETTLE * warm_ms * 1e3, estimate_us[name])
            slices[name].append(clock.slice(contenders[name], settle, calls))
        done += 1
    results |= {name: summarise(of) for name, of in slices.items()}
    return {name: results[name] for name in contenders}


def in_turns(names: Sequence[str], round_number: int) -> list[str]:
    """The order of a round: of two contenders AB, BA, BA, AB; of more, whoever ran behind another runs before it in the
    next round.
    """
    turn = round_number // 2 % len(names)
    order = [*names[turn:], *names[:turn]]
    return order[::-1] if round_number % 2 else order


def _far_slower(estimate_us: Mapping[str, float], beside: str | None) -> list[str]:
    if beside is None or beside not in estimate_us:
        return []
    limit_us = max(FAR_SLOWER * estimate_us[beside], LONG_CALL_US)
    return [name for name, us in estimate_us.items() if us > limit_us and name != beside]


def attempt(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or :class:`Missing` if the contender cannot do it: out of memory, not installed, ..."""
    try:
        return action()
    except Exception as error:  # a peer is anybody's code: a failed assertion or a missing compiler is a reason too
        return missing(error)


def missing(error: Exception) -> Missing:
    """Because of that error."""
    *_, of_the_host = str(error).rpartition("DefaultCPUAllocator: ")  # what torch says behind its own line of code
    if isinstance(error, torch.OutOfMemoryError) or of_the_host != str(error):
        return Missing(f"out of memory: {_first_sentence(of_the_host)}", out_of_memory=True)
    if isinstance(error, NoResultError):  # says what and why already
        return Missing(str(error).rstrip("."))
    place = f" ({_place(error)})" if isinstance(error, _OF_PROGRAMMERS) or not str(error) else ""
    return Missing(f"{type(error).__name__}: {_first_sentence(str(error))}{place}")


def required(what: str, action: Callable[[], Any]) -> Any:
    """What ``action`` returns; a failure of ours ends the case, in one sentence."""
    outcome = attempt(action)
    if isinstance(outcome, Missing):
        raise NoResultError(f"{what}: {outcome.reason}.")
    return outcome


_OF_PROGRAMMERS = (AssertionError, AttributeError, LookupError, NameError, StopIteration)
"""Errors whose message helps nobody who does not see the line."""


def _place(error: BaseException) -> str:
    """File and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _first_sentence(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return lines[0].split(". ")[0].rstrip(".")[:160]


def estimate_calls(target_us: float, estimate_us: float) -> int:
    """Calls that take at least ``target_us`` together, one at least."""
    return max(1, math.ceil(target_us / estimate_us))


def _timed_us(slices: Iterable[Slice]) -> float:
    return sum(sum(s.times_us) for s in slices)


def summarise(slices: list[Slice]) -> Timing:
    times = sorted(t for s in slices for t in s.times_us)
    readings = [r for s in slices for r in s.readings]
    return Timing(
        us=statistics.median(times),
        p10_us=times[int(0.1 * (len(times) - 1))],
        p90_us=times[math.ceil(0.9 * (len(times) - 1))],
        calls=len(times),
        sm_mhz=statistics.median(r.sm_mhz for r in readings) if readings else None,
        watts=statistics.fmean(r.watts for r in readings) if readings else None,
        slices_us=tuple(statistics.median(s.times_us) for s in slices),
    )


def paired(theirs: Timing, ours: Timing) -> Paired | None:
    """Their time over ours, pair by pair; None for fewer than six pairs, whose order says too little, and where
    one of both took no part in the rounds.

    The interval needs no idea of how pairs scatter: of n pairs, each lies below the true median with probability 1/2,
    so the ends are the order statistics beyond which fewer than 2.5 % of binomial draws fall (of 20 the sixth from
    either end).
    """
    if theirs.few or ours.few:
        return None
    ratios = sorted(a / b for a, b in zip(theirs.slices_us, ours.slices_us, strict=True))
    n, below, outside = len(ratios), 0.0, -1
    while (below := below + math.comb(n, outside + 1) / 2**n) <= 0.025:
        outside += 1
    if outside < 0:
        return None
    return Paired(statistics.median(ratios), ratios[outside], ratios[-1 - outside])


def wall_and_busy_us(call: Call, estimate_us: float, *, warm_ms: float, min_ms: float) -> tuple[float, float]:
    """What a call takes on a GPU in a row of such calls, gaps included, and how much of that some kernel or copy runs.

    They cannot come from one pass: the profiler slows the host down. So passes alternate, each after the same load by
    the same contender alone, and the medians are what counts: from one pass to the next the clock drifts by several
    per cent, which would read as gaps.
    """
    heat, calls = estimate_calls(warm_ms * 1e3, estimate_us), estimate_calls(min_ms * 1e3 / ROUNDS, estimate_us)
    passes = [(_wall_us(call, heat, calls), _busy_us(call, heat, calls)) for _ in range(ROUNDS)]
    wall_us, busy_us = zip(*passes, strict=True)
    return statistics.median(wall_us), statistics.median(busy_us)


def graph_us(call: Call, estimate_us: float, *, warm_ms: float, min_ms: float) -> float:
    """What a call takes when it is captured in a CUDA graph and replayed: nothing waits for the host. Median.

    A call that waits for the GPU is refused before the capture: one that fails leaves torch's random numbers on that
    GPU, and so every later case, unusable.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), _refused_to_wait():
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    heat, calls = estimate_calls(warm_ms * 1e3, estimate_us), estimate_calls(min_ms * 1e3 / ROUNDS, estimate_us)
    return statistics.median(_wall_us(graph.replay, heat, calls) for _ in range(ROUNDS))


GRAPH_US = 1000.0  # from here on the host is ahead of the GPU, and two events cost nothing


def in_graphs(call: Call, clock: Clock, graphs: bool) -> tuple[Call, int]:
    """What to time, and how many calls that is: with ``graphs``, so many of a short call in a CUDA graph that a replay
    takes ``GRAPH_US``. The first call compiles; nothing may compile during a capture.
    """
    call()
    repeats = math.ceil(GRAPH_US / max(statistics.median(clock.slice(call, 1, 3).times_us), 1.0))
    if not graphs or repeats == 1:
        return call, 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay, repeats


def of_a_call(timing: Timing, repeats: int) -> Timing:
    """Of one of ``repeats`` calls, which were timed together."""
    times = {name: getattr(timing, name) / repeats for name in ("us", "p10_us", "p90_us")}
    return replace(timing, calls=timing.calls * repeats, **times)


@contextmanager
def _refused_to_wait() -> Iterator[None]:
    """What waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_us(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Host time of calls that find the device idle, so that no queue is full: medians, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in in_turns(list(calls), number):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(of) for name, of in times.items()}


def _wall_us(call: Call, heat: int, calls: int) -> float:
    start, end = _event(), _event()
    for _ in range(heat):
        call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / calls


def _busy_us(call: Call, heat: int, calls: int) -> float:
    from torch.profiler import ProfilerActivity, profile, schedule

    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as trace:
        for repeats in (heat, calls):  # only the second pass is recorded
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
            trace.step()
    return covered(gpu_intervals(trace.events())) / calls


def gpu_intervals(events: Iterable[Any]) -> list[tuple[float, float]]:
    """(start, end) in µs of the device activities of a profile; annotations span gaps, so they are left out."""
    return [
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type.name == "CUDA" and not e.is_user_annotation and not e.name.startswith("ProfilerStep")
    ]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
