"""The expert-parallel suite: a layer spread over R ranks against the layer of one GPU with the same load.

A case T, H, I, E, K is the load of one rank: T tokens and E experts on each. So the spread layer has R·E experts, and
one rank computes T·K rows on average, as the plain layer of E experts does on every rank meanwhile. What is left is the
price of travel. With one rank nothing travels, and the ratio says what the code around it costs.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m supersonic_moe bench ep

Times are those of the slowest rank (``ranks.py``). After any error of one rank but that of a contender's call they may
be in different calls, so a case without a result is the last one where there are several ranks; torchrun ends those
that wait when one is gone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from supersonic_moe import MoE
from supersonic_moe.bench.ep_parts import run_parts
from supersonic_moe.bench.ep_timeline import Timeline, timeline
from supersonic_moe.bench.layer import Contender
from supersonic_moe.bench.ranks import SlowestRank, group_of_ranks
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.spans import marks_for
from supersonic_moe.bench.timing import (
    Call,
    Clock,
    LastCaseError,
    Missing,
    NoResultError,
    clock_for,
    measure,
    required,
)
from supersonic_moe.config.recipe import Fp8Recipe, Recipe
from supersonic_moe.kernels import registry
from supersonic_moe.parallel import ExpertParallel
from supersonic_moe.parallel.traffic import Load
from supersonic_moe.perf_model import LayerShape, layer_flops

ONE_GPU = "one-gpu"
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

    device: torch.device
    dtype: torch.dtype
    recipe: Recipe
    transport: str
    wire: str
    warm_ms: float
    min_ms: float


class Runner:
    """Measures cases over the ranks of torchrun, or in one process alone."""

    def __init__(self, config: EpConfig) -> None:
        self.config = config
        self.clock = clock_for(config.device)

    @contextmanager
    def over_ranks(self) -> Iterator[None]:
        """What all cases run inside."""
        with group_of_ranks(self.config.device) as host:
            if host is not None:
                self.clock = SlowestRank(self.clock, host)
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
            return _measured(shape, config, ep, self.clock, progress)


def _measured(
    shape: LayerShape, config: EpConfig, ep: ExpertParallel, clock: Clock, progress: Callable[[str], None]
) -> EpResult:
    size = ep.size
    contenders = {OURS: _contender(shape, config, ep), ONE_GPU: _contender(shape, config, None)}
    odd = {
        "fp8": isinstance(config.recipe, Fp8Recipe),
        "gather": ep.transport == "gather",
        "fp8-wire": ep.wire == "fp8",
    }
    case = "_".join([f"{shape}_R{size}", *(name for name, on in odd.items() if on)])
    result = EpResult(case, {name: {} for name in contenders})
    for mode in ("fwd", "fwd_bwd"):
        progress(f"timing {mode}")
        calls = {name: getattr(contender, mode) for name, contender in contenders.items()}
        for name, timing in measure(calls, clock, warm_ms=config.warm_ms, min_ms=config.min_ms).items():
            if isinstance(timing, Missing):
                raise NoResultError(f"{case}, {mode}: {name}: {timing.reason}.")
            flops = layer_flops(shape, gated=True)[mode == "fwd_bwd"]
            metrics = result.metrics[name]
            metrics[f"{mode}_us"], metrics[f"{mode}_spread"] = timing.us, timing.spread
            metrics[f"{mode}_tflops"] = flops / timing.us / 1e6
    for name, contender in contenders.items():
        result.metrics[name]["host_us"] = _host_us(contender.fwd_bwd, config.device)
    if size > 1:
        sizes = (shape.tokens, shape.hidden, ep.num_experts, shape.top_k, size)
        sent = Load(*sizes, ep.wire, shape.tokens if ep.transport == "gather" else None).sent
        result.metrics[OURS]["sent_bytes"] = sum(sent)
        progress("finding out when rows travel")
        result.timeline = timeline(contenders[OURS].fwd_bwd, marks_for(config.device), ep.ranks)
    elif isinstance(config.recipe, Fp8Recipe) and _has_parts(shape, config):
        progress("timing products in parts")
        kernels = registry.fp8_kernels("sm90")
        times = {"warm_ms": config.warm_ms, "min_ms": config.min_ms}
        result.in_parts = run_parts(shape, kernels, config.recipe, config.device, **times)
    return result


def _has_parts(shape: LayerShape, config: EpConfig) -> bool:
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate}
    return registry.choose_fp8(config.device, **sizes, backend="auto").name == "sm90"


def _contender(shape: LayerShape, config: EpConfig, ep: ExpertParallel | None) -> Contender:
    torch.manual_seed(0)
    experts = shape.experts if ep is None else ep.num_experts
    sizes = (experts, shape.top_k, shape.hidden, shape.intermediate)
    with torch.device(config.device):
        layer = MoE(*sizes, "swiglu", False, 0.02, recipe=config.recipe, expert_parallel=ep).to(config.dtype)
        with torch.no_grad():
            layer.router.weight.normal_(0, shape.hidden**-0.5)
        torch.manual_seed(1 + dist.get_rank())
        x_TH = torch.randn(shape.tokens, shape.hidden, dtype=config.dtype).requires_grad_()
        dout_TH = torch.randn_like(x_TH)
    return Contender(
        lambda inference: layer(x_TH, is_inference_mode=inference)[0], x_TH, list(layer.parameters()), dout_TH
    )


def _host_us(call: Call, device: torch.device) -> float:
    """Host time of a call that finds the device idle, so that no queue is full: median."""
    times = []
    for _ in range(HOST_CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)
