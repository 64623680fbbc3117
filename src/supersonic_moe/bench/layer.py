"""The layer suite: one MoE layer, router included, against the peers, on the same tensors and in the same rounds.

Timed calls, each eager and complete (router product, routing, metadata, experts, weighted sum):

    infer    forward in inference mode, under no_grad
    fwd      forward that saves for backward, auxiliary loss of our module included
    fwd_bwd  fwd, then autograd.grad of the output with respect to x and every parameter (fresh gradients)

``host_us`` is what a call of fwd_bwd keeps the host that finds the GPU idle, ``host_one_thread_us`` the same where
backward runs in the calling thread. ``busy_us`` is the GPU-busy part of fwd_bwd, ``wall_us`` what a row of such calls
takes each, both with this contender alone on the GPU; ``graph_us`` is what the same call of our layer takes as a CUDA
graph. Saved bytes are the distinct storages that a forward packs for backward, x included, parameters not; FP8 copies
of weights that it keeps are counted apart. Peak bytes are the allocator's peak over one fwd_bwd, minus what was
resident before (parameters and x): saved activations, transients and gradients. TFLOP/s counts 6 or 4 R H I forward and
three times that with backward, R the rows of all experts: T K but for token rounding. MFU divides by the datasheet's
989 TFLOP/s, for a layer in FP8 by 1979.

Under token rounding, ``plain_topk`` is one of the contenders: our layer with the same weights, routed by the base
router, as in evaluation. What rounding is worth is the ratio of the two TFLOP/s, because R differs a little.

With an FP8 recipe, ``ours-BF16`` is one of the contenders: our layer with the same weights and Bf16Recipe. Weights
are quantized in every forward, as in a training step without micro-batches. ``held_us`` is what fwd_bwd takes with
micro-batches, inside ``constant_weights``, where they were quantized before; it runs in the same rounds, and beside it
stand what the peers take for their fwd_bwd, to whom the number of micro-batches is all one.

A peer is only compared if it computes the same function (:func:`_same_function`), output and gradients: with an FP8
recipe as ``ours-BF16`` does, else as we do. ``plain_topk`` is exempt: it is there because it computes something else.

Where ``pairs`` slices of each contender alternate, the ratio of a peer's time to ours is the median of the pairs, with
its 95 % interval (``timing.paired``). A peer that is far slower has two calls instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor

from supersonic_moe import ActivationType, KernelBackendMoE, MoE, constant_weights
from supersonic_moe.bench.layer_peers import FP8, INTERLEAVED, PEERS
from supersonic_moe.bench.report import OURS, CaseResult, Metrics
from supersonic_moe.bench.spans import marks_for, measure_spans
from supersonic_moe.bench.timing import (
    ROUNDS,
    Missing,
    NoResultError,
    Timing,
    attempt,
    clock_for,
    graph_us,
    host_us,
    measure,
    paired,
    required,
    wall_and_busy_us,
)
from supersonic_moe.config.activation import as_activation
from supersonic_moe.config.recipe import Bf16Recipe, Fp8Recipe, Recipe
from supersonic_moe.config.router import TokenRounding, as_router
from supersonic_moe.perf_model import H200, LayerShape, Machine, layer_flops, saved_activation_bytes
from supersonic_moe.quantization.block_format import E4M3
from supersonic_moe.quantization.weight_cache import WeightCache

PLAIN = "plain_topk"
OURS_BF16 = "ours-BF16"
HELD = "weights held"  # our layer again, where they are; it has no row of its own but ``held_us``
SAME_FUNCTION = 0.03  # median relative distance of a token's output; bf16 rounding alone gives 0.005
SAME_FUNCTION_FP8 = 0.1  # rounding four operands to e4m3 gives 0.06
HOST_CALLS = 20
OTHER_TOKEN = 2.0  # times the limit of the median, from where a token's output counts as that of another choice
GRADIENT = 2.0  # times the limit, of gradients: each product adds its rounding


@dataclass(frozen=True)
class LayerConfig:
    """What all cases of one run share."""

    device: torch.device
    dtype: torch.dtype
    activation: str = "swiglu"
    router: str = "softmax_after_topk"
    recipe: Recipe = field(default_factory=Bf16Recipe)
    skew: float = 0.0  # spread of the experts' popularity, in standard deviations of a router logit
    backend: str = "auto"
    peers: Sequence[str] = ("torch_loop", "grouped_mm")
    warm_ms: float = 300.0
    min_ms: float = 400.0
    pairs: int = ROUNDS
    cold_l2: bool = False

    def check(self) -> None:
        """Raise ValueError for a name that does not exist, before anything is built."""
        as_activation(self.activation)
        as_router(self.router)
        for what, name, known in (
            ("backend", self.backend, list(KernelBackendMoE.__members__)),
            *(("peer", peer, list(PEERS)) for peer in self.peers),
        ):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(known)}.")

    @property
    def fp8(self) -> bool:
        return isinstance(self.recipe, Fp8Recipe)

    @property
    def dtype_name(self) -> str:
        return recipe_name(self.recipe) if self.fp8 else str(self.dtype).removeprefix("torch.")

    def case_name(self, shape: LayerShape) -> str:
        """The shape, then whatever differs from a uniformly routed bf16 SwiGLU layer."""
        usual = {"activation": "swiglu", "router": "softmax_after_topk"}
        odd = [getattr(self, name) for name, value in usual.items() if getattr(self, name) != value]
        if self.fp8 or self.dtype is not torch.bfloat16:
            odd.append(self.dtype_name)
        if self.skew:
            odd.append(f"skew{self.skew:g}")
        return "_".join([str(shape), *odd])


def recipe_name(recipe: Recipe) -> str:
    """ "bf16", or "fp8" with what differs from the default FP8 recipe: "fp8_z-bf16_wgrad-fp8"."""
    if not isinstance(recipe, Fp8Recipe):
        return "bf16"
    usual, short = Fp8Recipe(), {"save_preactivation": "z", "keep_transposed": "kept"}
    pairs = [(f.name, getattr(recipe, f.name)) for f in fields(recipe)]
    odd = [f"{short.get(name, name)}-{value}" for name, value in pairs if value != getattr(usual, name)]
    return "_".join(["fp8", *odd])


@dataclass
class LayerResult(CaseResult):
    load_ratio: float = 1.0  # rows of the busiest expert over the mean

    @property
    def title(self) -> str:
        return f"{self.case}   busiest expert {self.load_ratio:.2f}x the mean"


@dataclass(frozen=True)
class Contender:
    forward: Callable[[bool], Tensor]  # argument: inference mode
    x: Tensor
    parameters: Sequence[Tensor]
    dout: Tensor

    gate_up: bool = False  # w1 is [gate; up], else they alternate

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.forward(True)

    def fwd(self) -> Tensor:
        return self.forward(False)

    def fwd_bwd(self) -> tuple[Tensor, ...]:
        return self.gradients(self.dout)

    def gradients(self, dout_TH: Tensor) -> tuple[Tensor, ...]:
        """Of x, router, w1 and w2, each as the contender keeps it."""
        return torch.autograd.grad(self.forward(False), [self.x, *self.parameters], dout_TH)


def run_case(shape: LayerShape, config: LayerConfig, progress: Callable[[str], None] = lambda _: None) -> LayerResult:
    """Measure every contender at one shape. Raises NoResultError where we have no result ourselves."""
    case = config.case_name(shape)
    progress("building the layer and its peers")
    layer, contenders = required(case, partial(prepare, shape, config))
    result = LayerResult(case, {name: {} for name in contenders}, load_ratio=_load_ratio(layer.expert_counts))
    progress("checking that all compute the same function")
    contenders = _same_function(contenders, result.missing, SAME_FUNCTION_FP8 if config.fp8 else SAME_FUNCTION)
    if OURS in result.missing:
        raise NoResultError(f"{case}: our own layer: {result.missing[OURS]}.")

    clock = clock_for(config.device, cold_l2=config.cold_l2)
    rows = dict.fromkeys(contenders, shape.rows) | {OURS: _rows(layer.expert_counts)}
    gated = layer.activation.gated
    for mode in ("infer", "fwd", "fwd_bwd"):
        progress(f"timing {mode}")
        calls = {name: getattr(contender, mode) for name, contender in contenders.items()}
        rounds = ROUNDS if mode == "infer" else config.pairs  # pairs are for the passes of training
        run = partial(measure, calls, clock, warm_ms=config.warm_ms, min_ms=config.min_ms, rounds=rounds, beside=OURS)
        holds = config.fp8 and mode == "fwd_bwd"
        with _held(layer, config, contenders[OURS], calls) if holds else nullcontext():
            timings: dict[str, Timing | Missing] = required(f"{case}, {mode}", run)
        if holds:
            _record_held(result, timings.pop(HELD), timings)
        for name, timing in timings.items():
            if not isinstance(timing, Missing):
                flops = layer_flops(shape, gated=gated, rows=rows[name])
                fp8 = config.fp8 and name in (OURS, *FP8)
                _record_timing(result.metrics[name], mode, timing, flops, config, fp8=fp8)
                if timing.few:
                    result.few_calls[f"{mode}_us", name] = timing.calls
                if name != OURS and (pair := paired(timing, timings[OURS])):  # type: ignore[arg-type]
                    result.pairs[f"{mode}_us", name] = pair
            elif name == OURS:
                raise NoResultError(f"{case}, {mode}: {timing.reason}.")
            else:
                result.missing[name] = f"{mode}: {timing.reason}"
                del contenders[name]

    for name, contender in contenders.items():
        progress(f"memory and GPU-busy time of {name}")
        result.metrics[name]["rows"] = rows[name]
        _record_state(result.metrics[name], contender, config)
        if config.device.type == "cuda" and name in (OURS, OURS_BF16):
            _record_graph(result.metrics[name], contender, config)
            _record_host(result.metrics[name], contender, config)
    if config.fp8:
        formula = saved_activation_bytes(shape, gated=gated)
        for name in contenders:
            result.metrics[name]["saved_of_formula"] = result.metrics[name]["saved_bytes"] / max(formula, 1)
        progress("every function of a step")
        spans = measure_spans(
            contenders[OURS].fwd_bwd, marks_for(config.device), warm_ms=config.warm_ms, min_ms=config.min_ms
        )
        result.metrics[OURS]["quantize_share"] = spans.quantize_share
    result.metrics = {name: metrics for name, metrics in result.metrics.items() if metrics}
    return result


@contextmanager
def _held(layer: MoE, config: LayerConfig, ours: Contender, calls: dict[str, Callable[[], object]]) -> Iterator[None]:
    """``calls`` with HELD, a copy of our layer with the same parameters that quantizes them once."""
    held = copy(layer)
    held.weight_cache = WeightCache()
    with constant_weights(held):
        calls[HELD] = replace(ours, forward=_forward_of(held, ours.x, config)).fwd_bwd
        yield


def _record_held(result: LayerResult, held: Timing | Missing, timings: dict[str, Timing | Missing]) -> None:
    """Ours with weights that are held, beside what each peer takes."""
    if isinstance(held, Missing):
        result.missing[HELD] = held.reason
        return
    result.metrics[OURS]["held_us"] = held.us
    for name, timing in timings.items():
        if name != OURS and not isinstance(timing, Missing):
            result.metrics[name]["held_us"] = timing.us
            if pair := paired(timing, held):
                result.pairs["held_us", name] = pair


def _record_timing(
    metrics: Metrics, mode: str, timing: Timing, flops: tuple[int, int], config: LayerConfig, *, fp8: bool
) -> None:
    work = flops[1] if mode == "fwd_bwd" else flops[0]
    metrics[f"{mode}_us"] = timing.us
    metrics[f"{mode}_spread"] = timing.spread
    metrics[f"{mode}_tflops"] = work / timing.us / 1e6
    if mode != "fwd_bwd":
        return
    if machine := machine_of(config.device, config.dtype):
        metrics["mfu"] = work / (timing.us * 1e-6) / machine.peak_flops(fp8=fp8)
    metrics.update(timing.energy(work))


def _record_state(metrics: Metrics, contender: Contender, config: LayerConfig) -> None:
    metrics["saved_bytes"], weight_copies = saved_bytes(contender.fwd, contender.parameters)
    if weight_copies:
        metrics["weight_copy_bytes"] = weight_copies
    if config.device.type != "cuda":
        return
    metrics["peak_bytes"] = peak_bytes(contender.fwd_bwd, config.device)
    wall_us, busy_us = wall_and_busy_us(
        contender.fwd_bwd, metrics["fwd_bwd_us"], warm_ms=config.warm_ms, min_ms=config.min_ms
    )
    metrics["wall_us"], metrics["busy_us"], metrics["wall_over_busy"] = wall_us, busy_us, wall_us / busy_us


def _record_graph(metrics: Metrics, contender: Contender, config: LayerConfig) -> None:
    """Nothing, where the call cannot be captured: the reference and torch's grouped GEMM may ask the host."""
    times = dict(warm_ms=config.warm_ms, min_ms=config.min_ms)
    outcome = attempt(partial(graph_us, contender.fwd_bwd, metrics["fwd_bwd_us"], **times))
    if not isinstance(outcome, Missing):
        metrics["graph_us"] = outcome


def _record_host(metrics: Metrics, contender: Contender, config: LayerConfig) -> None:
    """Torch hands a backward to a thread of the GPU and waits for it: once in a model, not once a layer."""
    metrics.update(host_us({"host_us": contender.fwd_bwd}, config.device, HOST_CALLS))
    with torch.autograd.set_multithreading_enabled(False):
        metrics.update(host_us({"host_one_thread_us": contender.fwd_bwd}, config.device, HOST_CALLS))


def machine_of(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """The ceilings to compare with: known for 16-bit products on Hopper only."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return H200 if torch.cuda.get_device_capability(device) == (9, 0) else None


# ---- the contenders ------------------------------------------------------------------------------------------------


def prepare(shape: LayerShape, config: LayerConfig) -> tuple[MoE, dict[str, Contender]]:
    """Our layer, which has counted the rows of its experts, and everyone who runs on its weights."""
    if config.device.type == "cuda":
        torch.cuda.empty_cache()  # one shape's fragments must not starve the next
    layer = _build_layer(shape, config)
    contenders = _contenders(shape, config, layer)
    contenders[OURS].infer()
    return layer, contenders


def _build_layer(shape: LayerShape, config: LayerConfig) -> MoE:
    """Our layer, with unit-variance logits; under skew, a constant first feature gives each expert its popularity."""
    with torch.device(config.device):
        layer = MoE(
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            activation_function=config.activation,
            add_bias=False,
            std=0.02,
            router=config.router,
            recipe=config.recipe,
        ).to(config.dtype)
    with torch.no_grad():
        layer.router.weight.normal_(0, shape.hidden**-0.5)
        if config.skew:
            quantile_E = (torch.randperm(shape.experts, device=config.device) + 0.5) / shape.experts
            layer.router.weight[:, 0] = config.skew * math.sqrt(2) * torch.erfinv(2 * quantile_E - 1)
    return layer


def _forward_of(moe: MoE, x_TH: Tensor, config: LayerConfig) -> Callable[[bool], Tensor]:
    backend = KernelBackendMoE[config.backend]

    def forward(inference: bool) -> Tensor:
        out_TH: Tensor = moe(x_TH, backend, is_inference_mode=inference)[0]
        return out_TH

    return forward


def _contenders(shape: LayerShape, config: LayerConfig, layer: MoE) -> dict[str, Contender]:
    x_TH = torch.randn(shape.tokens, shape.hidden, device=config.device, dtype=config.dtype)
    if config.skew:
        x_TH[:, 0] = 1
    x_TH.requires_grad_()
    dout_TH = torch.randn_like(x_TH)

    def ours(moe: MoE) -> Contender:
        return Contender(_forward_of(moe, x_TH, config), x_TH, list(layer.parameters()), dout_TH)

    contenders = {OURS: ours(layer)}
    if isinstance(layer.routing, TokenRounding):
        plain = copy(layer).eval()  # shares the parameters
        contenders[PLAIN] = ours(plain)
    if config.fp8:
        bf16 = copy(layer)
        bf16.recipe = Bf16Recipe()
        contenders[OURS_BF16] = ours(bf16)
    hugging_face = [layer.router.weight, hugging_face_w1(layer), layer.c_proj.weight]
    for name in config.peers:
        parameters = list(layer.parameters()) if name in INTERLEAVED else hugging_face
        call = partial(PEERS[name], x_TH, *parameters, shape.top_k, config.router, ActivationType(config.activation))
        gate_up = layer.activation.gated and name not in INTERLEAVED
        contenders[name] = Contender(lambda _inference, call=call: call(), x_TH, parameters, dout_TH, gate_up)  # type: ignore[misc]

    return contenders


def _rows(counts_E: Tensor | None) -> int:
    return 0 if counts_E is None else int(counts_E.sum())


def _load_ratio(counts_E: Tensor | None) -> float:
    rows = _rows(counts_E)
    return int(counts_E.max()) * counts_E.shape[0] / rows if counts_E is not None and rows else 1.0


def hugging_face_w1(layer: MoE) -> Tensor:
    """Our interleaved (E, 2I, H) as a leaf [gate; up], the peers' own layout."""
    w1_ENH = layer.c_fc.weight.detach()
    if layer.activation.gated:
        w1_ENH = torch.cat([w1_ENH[:, 0::2], w1_ENH[:, 1::2]], 1)
    return w1_ENH.requires_grad_()


def _same_function(contenders: dict[str, Contender], missing: dict[str, str], limit: float) -> dict[str, Contender]:
    """The contenders that compute what we do; ``missing`` gets a reason for each of the others."""
    judge = contenders.get(OURS_BF16, contenders[OURS])
    out_TH = judge.infer()
    kept = {}
    for name, contender in contenders.items():
        differs = attempt(partial(_difference, contender, judge, out_TH, limit)) if name != PLAIN else None
        if isinstance(differs, Missing):
            missing[name] = differs.reason
        elif differs:
            missing[name] = f"computes something else: {differs}"
        else:
            kept[name] = contender
    return kept


def _difference(contender: Contender, judge: Contender, out_TH: Tensor, limit: float) -> str | None:
    """What a contender computes otherwise than the judge, whose output is given; the first thing that is."""
    found = differences(contender, judge, out_TH, limit)
    return next((f"{what} {gap:.3g}" for what, gap, most in found if not gap <= most), None)  # NaN is not


def differences(
    contender: Contender, judge: Contender, out_TH: Tensor, limit: float
) -> Iterator[tuple[str, float, float]]:
    """(what is compared, how far apart it is, how far it may be), one after the other: each is computed when it is
    asked for. ``out_TH`` is the judge's output.

    Of the output and the gradient of x, the median over tokens of the relative distance counts, because a tie between
    two equal bf16 logits may legally be broken either way: with 128 experts an eighth of the tokens has one at its last
    choice. Such tokens get no gradient of the output, so that the gradients of the weights can be compared as a whole.
    """
    distance_T = _distances(contender.infer(), out_TH)
    yield "median relative distance of a token's output", _median(distance_T), limit
    dout_TH = judge.dout * (distance_T <= OTHER_TOKEN * limit)[:, None]
    expected, got = judge.gradients(dout_TH), contender.gradients(dout_TH)
    for name, theirs, ours in zip(("x", "the router", "w1", "w2"), got, expected, strict=True):
        if name == "w1" and contender.gate_up:
            theirs = torch.stack(theirs.chunk(2, 1), 2).flatten(1, 2)
        by_token = name == "x"
        gap = median_distance(theirs, ours) if by_token else _relative(theirs, ours)
        yield f"{'median ' if by_token else ''}relative distance of the gradient of {name}", gap, GRADIENT * limit


def median_distance(a_TH: Tensor, b_TH: Tensor) -> float:
    return _median(_distances(a_TH, b_TH))


def _distances(a_TH: Tensor, b_TH: Tensor) -> Tensor:
    gap_T, size_T = (a_TH - b_TH).detach().float().norm(dim=1), b_TH.detach().float().norm(dim=1)
    return torch.div(gap_T, size_T.clamp(min=1e-30))


def _median(values_T: Tensor) -> float:
    return float(values_T.median()) if values_T.numel() else 0.0


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm().clamp(min=1e-30))


# ---- memory --------------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[int, int]:
    """(bytes of the distinct storages that autograd keeps for backward, those of FP8 copies of weights), parameters in
    neither.
    """
    with _packed_storages(parameters) as storages:
        out = forward()  # keeps the graph, hence every packed tensor, alive until the sums are taken
        copies = sum(size for size, is_weight in storages.values() if is_weight)
        total = sum(size for size, _ in storages.values())
    del out
    return total - copies, copies


@contextmanager
def _packed_storages(parameters: Sequence[Tensor]) -> Iterator[dict[int, tuple[int, bool]]]:
    """Storage address -> (bytes of what is packed inside the block, whether it is an (E, rows, columns) FP8 weight)."""
    resident = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, tuple[int, bool]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in resident:
            storages[storage.data_ptr()] = storage.nbytes(), t.dtype is E4M3 and t.dim() == 3
        return t.detach()  # an output that kept its own node alive would keep the whole graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield storages


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak of the CUDA allocator during one call, above what was allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
