"""The expert-parallel suite: a layer spread over R ranks against the layer of one GPU with the same load.

A case T, H, I, E, K is the load of one rank: T tokens and E experts on each. So the spread layer has R·E experts, and
one rank computes T·K rows on average, as the plain layer of E experts does on every rank meanwhile. What is left is the
price of travel. With one rank nothing travels, and the ratio says what the code around it costs. Over several ranks a
layer written by hand takes part (``ep_contenders.py``), once it is known to compute the same.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m supersonic_moe bench ep

Times are those of the slowest rank (``ranks.py``). After any error of one rank but that of a contender's call they may
be in different calls, so a case without a result is the last one where there are several ranks; torchrun ends those
that wait when one is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from supersonic_moe.bench.ep_contenders import BY_HAND, Numbers, contenders, disagreement
from supersonic_moe.bench.ep_parts import run_parts
from supersonic_moe.bench.ep_timeline import Timeline, timeline
from supersonic_moe.bench.ranks import SlowestRank, group_of_ranks
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.spans import marks_for
from supersonic_moe.bench.timing import (
    ROUNDS,
    Clock,
    LastCaseError,
    Missing,
    NoResultError,
    clock_for,
    host_us,
    measure,
    paired,
    required,
)
from supersonic_moe.config.recipe import Fp8Recipe, Recipe
from supersonic_moe.kernels import registry
from supersonic_moe.parallel import ExpertParallel
from supersonic_moe.parallel.traffic import Load
from supersonic_moe.perf_model import LayerShape, layer_flops

HOST_CALLS = 30


@dataclass
class EpResult(CaseResult):
    timeline: Timeline | None = None
    """Of a forward and backward of this rank; None where nothing travels."""
    in_parts: list[CaseResult] = field(default_factory=list)
    """Of an FP8 layer on one rank: its products in parts."""

    def cases(self) -> list[CaseResult]:
        return [self, *self.in_parts]


@dataclass(frozen=True)
class EpConfig:
    """What all cases of one run share."""

    numbers: Numbers
    transport: str
    wire: str
    warm_ms: float
    min_ms: float
    pairs: int = ROUNDS

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    @property
    def recipe(self) -> Recipe:
        return self.numbers.recipe

    @property
    def fp8(self) -> bool:
        return isinstance(self.recipe, Fp8Recipe)


class Runner:
    """Measures cases over the ranks of torchrun, or in one process alone."""

    def __init__(self, config: EpConfig) -> None:
        self.config = config
        self.clock = clock_for(config.device)
        self._host: dist.ProcessGroup | None = None

    @contextmanager
    def over_ranks(self) -> Iterator[None]:
        """What all cases run inside."""
        with group_of_ranks(self.config.device) as self._host:
            if self._host is not None:
                self.clock = SlowestRank(self.clock, self._host)
            yield

    def run(self, shape: LayerShape, progress: Callable[[str], None]) -> EpResult:
        try:
            return required(str(shape), partial(self._run, shape, progress))  # type: ignore[no-any-return]
        except NoResultError as error:
            if dist.get_world_size() == 1:
                raise
            raise LastCaseError(str(error)) from error

    def _run(self, shape: LayerShape, progress: Callable[[str], None]) -> EpResult:
        progress("building both layers")
        config, size = self.config, dist.get_world_size()
        wire = config.wire if size > 1 else "exact"
        assert dist.group.WORLD is not None
        ep = ExpertParallel(
            dist.group.WORLD,
            num_experts=size * shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=shape.tokens,
            transport=config.transport,  # type: ignore[arg-type]
            wire=wire,  # type: ignore[arg-type]
        )
        with closing(ep):
            return _measured(shape, config, ep, self.clock, self._host, progress)


def _measured(
    shape: LayerShape,
    config: EpConfig,
    ep: ExpertParallel,
    clock: Clock,
    host: dist.ProcessGroup | None,
    progress: Callable[[str], None],
) -> EpResult:
    size = ep.size
    found = contenders(shape, config.numbers, ep)
    result = EpResult(_name(shape, config, ep), {name: {} for name in found})
    if BY_HAND in found:
        progress("comparing with what is written by hand")
        if differs := disagreement(found, config.fp8, host):
            result.missing[BY_HAND] = f"computes something else: {differs}"
            del found[BY_HAND]
    for mode in ("fwd", "fwd_bwd"):
        progress(f"timing {mode}")
        calls = {name: getattr(contender, mode) for name, contender in found.items()}
        timings = measure(calls, clock, warm_ms=config.warm_ms, min_ms=config.min_ms, rounds=config.pairs)
        for name, timing in timings.items():
            if not isinstance(timing, Missing):
                flops = layer_flops(shape, gated=True)[mode == "fwd_bwd"]
                metrics = result.metrics[name]
                metrics[f"{mode}_us"], metrics[f"{mode}_spread"] = timing.us, timing.spread
                metrics[f"{mode}_tflops"] = flops / timing.us / 1e6
                if name != OURS and (pair := paired(timing, timings[OURS])):  # type: ignore[arg-type]
                    result.pairs[f"{mode}_us", name] = pair
            elif name == BY_HAND:
                result.missing[name] = f"{mode}: {timing.reason}"
                del found[name]
            else:
                raise NoResultError(f"{result.case}, {mode}: {name}: {timing.reason}.")
    for name, us in host_us({name: c.fwd_bwd for name, c in found.items()}, config.device, HOST_CALLS).items():
        result.metrics[name]["host_us"] = us
    if size > 1:
        sizes = (shape.tokens, shape.hidden, ep.num_experts, shape.top_k, size)
        fixed = None if ep.transport == "all_to_all" else shape.tokens
        sent = Load(*sizes, ep.wire, fixed, pushed=ep.transport == "push").sent
        if config.numbers.remote is None:  # of uniform routing
            result.metrics[OURS]["sent_bytes"] = sum(sent)
        progress("finding out when rows travel")
        result.timeline = timeline(found[OURS].fwd_bwd, marks_for(config.device), ep.ranks)
    elif isinstance(config.recipe, Fp8Recipe) and _has_parts(shape, config):
        progress("timing products in parts")
        kernels = registry.fp8_kernels("sm90")
        times = {"warm_ms": config.warm_ms, "min_ms": config.min_ms}
        result.in_parts = run_parts(shape, kernels, config.recipe, config.device, **times)
    result.metrics = {name: metrics for name, metrics in result.metrics.items() if metrics}
    return result


def _name(shape: LayerShape, config: EpConfig, ep: ExpertParallel) -> str:
    odd = [f"{shape}_R{ep.size}"]
    if config.fp8:
        odd.append("fp8")
    if ep.size > 1:
        odd += [ep.transport] * (ep.transport != "all_to_all") + ["fp8-wire"] * (ep.wire == "fp8")
        odd += [] if config.numbers.remote is None else [f"remote{config.numbers.remote:.3g}"]
    return "_".join(odd)


def _has_parts(shape: LayerShape, config: EpConfig) -> bool:
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate}
    return registry.choose_fp8(config.device, **sizes, backend="auto").name == "sm90"
