"""The inference suite: the whole FP8 operator, router logits to combined rows, ours and others' in one process.

Every contender's output is checked before it is timed: against the reference in fp32 that does not quantize between the
products, on up to ``CHECKED`` tokens of the batch. One that is wrong has its errors in the file and no time. Times are
those of a CUDA graph of one call, replayed with a cold L2 (the cache is overwritten before each, outside the events; an
event pair alone reads 1.3 µs of them), contenders interleaved. Beside them stand the eager call, timed the same way,
which waits for the host where the host is slower, and the host's own time for a call.

Where all batches are small, time is what reading the hit experts takes: ``fits`` reports it as fixed + slope × hits for
each contender and routing.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.bench import infer_parts, infer_peers
from supersonic_moe.bench.infer_cases import InferCase, InferShape, Workload, random_experts, workload
from supersonic_moe.bench.infer_parts import Call
from supersonic_moe.bench.report import OURS, CaseResult, Metrics
from supersonic_moe.bench.timing import Clock, Missing, NoResultError, attempt, clock_for, host_us, measure
from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.kernels.reference.inference import Fp8Experts, moe_fp8

CHECKED = 256  # tokens of a batch, evenly spread
LIMIT = 0.03  # relative Frobenius error of ours; quantizing between the products costs 0.023
PEER_LIMIT = 0.04  # of the others, most of which round the first product to bf16
FIT_TOKENS = 80  # of a fit: beyond, time is not that of the experts' bytes alone
EAGER_CALLS, HOST_CALLS = 20, 50


@dataclass
class InferResult(CaseResult):
    hits: int = 0
    rows: int = 0
    of: InferCase | None = field(default=None)

    @property
    def title(self) -> str:
        return f"{self.case}   {self.hits} experts hit, {self.rows} rows"

    @property
    def failed(self) -> list[str]:
        return [name for name in self.missing if name == OURS]


class Runner:
    """Measures cases; keeps the weights of one shape while its cases follow each other."""

    def __init__(self, device: torch.device, *, warm_ms: float, min_ms: float, peers: Sequence[str]) -> None:
        self.device, self.peers, self.warm_ms, self.min_ms = device, peers, warm_ms, min_ms
        self._experts: tuple[InferShape, Fp8Experts] | None = None

    def run(self, case: InferCase, progress: Callable[[str], None]) -> InferResult:
        progress("random experts")
        work = self.workload_of(case)
        moved, floor_us = case.shape.floor(case.tokens, work.hits, work.rows)
        facts = {"hits": work.hits, "rows": work.rows, "bytes": moved, "floor_us": floor_us}
        result = InferResult(str(case), hits=work.hits, rows=work.rows, of=case)

        expected, checked = self._reference(work)
        calls: dict[str, Call] = {}
        for name, build in self._contenders().items():
            progress(f"checking {name}")
            found = self._attempt(lambda: self._checked(build(work), expected, checked))  # noqa: B023
            verdict = found if isinstance(found, Missing) else self._attempt(lambda: self._judge(name, found[1]))  # noqa: B023
            if isinstance(verdict, Missing):
                if name == OURS:
                    raise NoResultError(f"{case}: {verdict.reason}.")
                result.missing[name] = verdict.reason
                if found is not verdict:
                    result.untimed[name] = found[1]
            else:
                calls[name], errors = found
                result.metrics[name] = errors | (facts if name == OURS else {})

        progress("timing " + ", ".join(calls))
        for name, metrics in self.timed(calls).items():
            if isinstance(metrics, Missing):
                result.missing[name] = metrics.reason
                result.untimed[name] = result.metrics.pop(name)
            else:
                result.metrics[name] |= metrics
        for metrics in result.metrics.values():
            metrics |= {"of_floor": floor_us / metrics["replay_us"], "gbps": moved / metrics["replay_us"] / 1e3}
        if OURS not in result.metrics:
            raise NoResultError(f"{case}: {result.missing[OURS]}.")
        return result

    def workload_of(self, case: InferCase) -> Workload:
        return workload(case, self._weights(case.shape), self.device)

    def _reference(self, work: Workload) -> tuple[Tensor, Tensor]:
        return reference(work, requantize=False)

    def _checked(self, call: Call, expected: Tensor, checked: Tensor) -> tuple[Call, Metrics]:
        """The call and the errors of its second result."""
        call()
        return call, self._errors(call()[checked].float(), expected)

    def _errors(self, got: Tensor, expected: Tensor) -> Metrics:
        size = float(expected.norm())
        error = float((got - expected).norm()) / size if size else float(got.norm())  # NaN stays NaN
        return {"rel_fro": error, "matched": matched(got, expected)}

    def _judge(self, name: str, errors: Metrics) -> None:
        """Raises ArithmeticError if they are those of a wrong result."""
        error, limit = errors["rel_fro"], LIMIT if name == OURS else PEER_LIMIT
        if not error <= limit:
            raise ArithmeticError(
                f"wrong result: its relative Frobenius error is {error:.2g}, over the limit of {limit:g}"
            )

    def _weights(self, shape: InferShape) -> Fp8Experts:
        if self._experts is None or self._experts[0] != shape:
            self._experts = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            torch.manual_seed(0)
            self._experts = shape, random_experts(shape, self.device)
        return self._experts[1]

    def _contenders(self) -> Mapping[str, Callable[[Workload], Call]]:
        known = infer_peers.PEERS if self.device.type == "cuda" else {}
        return {OURS: infer_parts.ours} | {name: known[name] for name in self.peers if name in known}

    def _attempt(self, action: Callable[[], Any]) -> Any:
        return attempt(action)

    def clock(self) -> Clock:
        return clock_for(self.device, cold_l2=True)

    def timed(self, calls: Mapping[str, Call]) -> dict[str, Metrics | Missing]:
        """Of each contender: replayed, eager, and the host's time."""
        clock = self.clock()
        found: dict[str, Metrics | Missing] = {}
        replays: dict[str, Callable[[], object]] = {}
        for name, call in calls.items():
            replay = self._attempt(lambda: _replay(call, self.device))  # noqa: B023
            if isinstance(replay, Missing):
                found[name] = replay
            else:
                replays[name] = replay
        for name, timing in measure(replays, clock, warm_ms=self.warm_ms, min_ms=self.min_ms).items():
            if isinstance(timing, Missing):
                found[name] = timing
                continue
            eager = clock.slice(calls[name], 3, EAGER_CALLS)
            found[name] = {
                "replay_us": timing.us,
                "replay_spread": timing.spread,
                "eager_us": statistics.median(eager.times_us),
                "host_us": host_us({name: calls[name]}, self.device, HOST_CALLS)[name],
            }
        return found


def reference(work: Workload, *, requantize: bool) -> tuple[Tensor, Tensor]:
    """(rows (N, H) in fp32, the tokens they are of)."""
    tokens = work.case.tokens
    checked = torch.arange(0, tokens, max(1, tokens // CHECKED), device=work.x.device)
    x = work.x.view(torch.uint8)[checked].view(work.x.dtype)
    rows = moe_fp8(
        x, work.x_scale.t()[checked], work.experts, work.weights[checked], work.local_ids()[checked],
        order=GateUpLayout.UP_GATE, requantize=requantize,
    )  # fmt: skip
    return rows, checked


def matched(got: Tensor, expected: Tensor) -> float:
    """The contest's own measure, far weaker than the error: the share of elements off by at most 1 or by 30 %."""
    off = (got - expected).abs()
    return 1 - float(((off > 1) & (off > 0.3 * (expected.abs() + 1e-8))).float().mean())


def _replay(call: Call, device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph that is replayed; on a CPU the call."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# ---- fixed + slope × hits --------------------------------------------------------------------------------------------


def fits(results: Iterable[InferResult]) -> list[CaseResult]:
    """A case for each shape and routing with three small batches or more: least squares of µs over hits."""
    groups: dict[str, list[InferResult]] = {}
    for result in results:
        if result.of is not None and result.of.tokens <= FIT_TOKENS:
            groups.setdefault(f"{result.of.shape.name}_fit_{result.of.routing}", []).append(result)
    found = []
    for name, group in groups.items():
        case = CaseResult(name)
        for contender in group[0].metrics:
            points = [(r.hits, r.metrics[contender]["replay_us"]) for r in group if contender in r.metrics]
            if len({hits for hits, _ in points}) >= 3:
                fixed, slope = line(points)
                case.metrics[contender] = {"fixed_us": fixed, "hit_us": slope}
        if OURS in case.metrics:
            found.append(case)
    return found


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(value at 0, slope) of the least-squares line."""
    x_mean = statistics.fmean(x for x, _ in points)
    y_mean = statistics.fmean(y for _, y in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
    return y_mean - slope * x_mean, slope


def best_peer(result: CaseResult, metric: str = "replay_us") -> tuple[str, float] | None:
    """The fastest of the others and its time."""
    times = [(metrics[metric], name) for name, metrics in list(result.metrics.items())[1:] if metric in metrics]
    return (min(times)[1], min(times)[0]) if times else None
