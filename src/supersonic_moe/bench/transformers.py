"""The transformers suite: experts backends of Hugging Face Transformers on models shaped like real ones.

    layers    two experts modules in a row, each added to its input, ids and weights of a uniform router
    model     a whole model of two layers, attention, router and head included

    train     forward and backward of T tokens: gradients of the input (layers) and of every parameter
    decode    forward of T sequences by one token each, under no_grad; the model's without a cache to read

Contenders are values of ``experts_implementation`` on the same module and tensors: ours, our FP8 recipe, the library's
own, and Liger's fused MoE where it can (SwiGLU without biases). ``swiglu`` is our layer on weights of a plain SwiGLU
with the same FLOPs, beside experts of another gate or order: what those cost. ``graph_us`` is the decode step as a CUDA
graph, of those that never wait for the GPU.

A peer is compared only if its output is ours: the median over tokens of its relative distance is checked first. FP8
and ``swiglu`` are exempt, because they compute something else. One that is far slower gets one timed call, and one that
ran out of memory is not tried with more tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import supersonic_moe.integrations.transformers  # noqa: F401  registers our names
from supersonic_moe.bench.layer import SAME_FUNCTION, Contender, median_distance
from supersonic_moe.bench.layer_peers import liger_function
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.shapes import HuggingFaceModel
from supersonic_moe.bench.timing import (
    ROUNDS,
    Missing,
    NoResultError,
    attempt,
    clock_for,
    graph_us,
    measure,
    paired,
    required,
)
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.functional import topk_experts
from supersonic_moe.integrations.transformers.gates import gate_of
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.perf_model import layer_flops

OURS_FP8, SWIGLU = "ours-FP8", "swiglu"
IMPLEMENTATIONS = {OURS: "supersonic", OURS_FP8: "supersonic_fp8"}  # any other contender is called by its own name
LAYERS = 2
PLAIN_SWIGLU = Gate(Activation(ActivationType.SWIGLU), GateUpLayout.GATE_UP)


@dataclass(frozen=True)
class TransformersCase:
    model: HuggingFaceModel
    what: Literal["layers", "model"]
    mode: Literal["train", "decode"]
    tokens: int

    @property
    def kind(self) -> str:
        """What it shares with the cases that differ in T only."""
        return f"{self.model.name}/{self.what}/{self.mode}"

    def __str__(self) -> str:
        return f"{self.kind}_T{self.tokens}"


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    peers: Sequence[str] = ("eager", "grouped_mm", "batched_mm", "liger")
    warm_ms: float = 300.0
    min_ms: float = 400.0
    pairs: int = ROUNDS
    models: dict[str, nn.Module] = field(default_factory=dict)
    """Of earlier cases of decode, and that of the last one, so that the next need not build it again."""
    out_of_memory: dict[tuple[str, str], int] = field(default_factory=dict)
    """By kind of case and peer: the fewest tokens with which it ran out of memory."""


def run_case(
    case: TransformersCase, settings: Settings, progress: Callable[[str], None] = lambda _: None
) -> CaseResult:
    """Measure every contender. Raises NoResultError where we have no result ourselves."""
    progress("building the model")
    if case.mode == "train":  # who runs out of memory has had all of it
        _forget_all_but(case.model, settings)
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()  # one case's fragments must not starve the next
    model = required(str(case), partial(_model, case.model, settings))
    contenders: dict[str, Contender] = required(str(case), partial(_contenders, case, model, settings))
    result = CaseResult(str(case), {name: {} for name in contenders})
    progress(f"first call of {OURS}")
    ours = required(str(case), contenders[OURS].infer)
    for name in list(contenders):
        progress(f"checking {name}")
        too_many = settings.out_of_memory.get((case.kind, name), math.inf)
        if case.tokens >= too_many:
            result.missing[name] = f"out of memory at T {too_many} already"
        elif isinstance(theirs := attempt(contenders[name].infer), Missing):
            _record_missing(name, theirs, result, case, settings)
        elif name not in (OURS_FP8, SWIGLU) and not (gap := median_distance(theirs, ours)) <= SAME_FUNCTION:
            result.missing[name] = f"computes something else: median relative distance of a token's output {gap:.3g}"
        if name in result.missing:
            del contenders[name]
    if OURS in result.missing:
        raise NoResultError(f"{case}: {result.missing[OURS]}.")

    mode = "fwd_bwd" if case.mode == "train" else "infer"
    warm_ms, min_ms = settings.warm_ms, settings.min_ms
    progress(f"timing {mode}")
    calls = {name: getattr(contender, mode) for name, contender in contenders.items()}
    rounds = settings.pairs if case.mode == "train" else ROUNDS
    clock = clock_for(settings.device)
    run = partial(measure, calls, clock, warm_ms=warm_ms, min_ms=min_ms, rounds=rounds, beside=OURS)
    timings = required(f"{case}, {mode}", run)
    for name, timing in timings.items():
        if isinstance(timing, Missing):
            if name == OURS:
                raise NoResultError(f"{case}, {mode}: {timing.reason}.")
            _record_missing(name, timing, result, case, settings)
            continue
        metrics = result.metrics[name]
        metrics[f"{mode}_us"], metrics[f"{mode}_spread"] = timing.us, timing.spread
        if timing.few:
            result.few_calls[f"{mode}_us", name] = timing.calls
        if case.mode == "train" and name != OURS and (pair := paired(timing, timings[OURS])):
            result.pairs[f"{mode}_us", name] = pair
        if case.what == "layers":
            flops = LAYERS * layer_flops(case.model.shape(case.tokens), gated=case.model.gated)[case.mode == "train"]
            metrics[f"{mode}_tflops"] = flops / timing.us / 1e6
        if case.mode == "decode" and settings.device.type == "cuda" and not timing.few:
            progress(f"{name} in a CUDA graph")
            in_graph = attempt(partial(graph_us, calls[name], timing.us, warm_ms=warm_ms, min_ms=min_ms))
            if not isinstance(in_graph, Missing):
                metrics["graph_us"] = in_graph
    result.metrics = {name: metrics for name, metrics in result.metrics.items() if metrics}
    return result


def _record_missing(
    name: str, missing: Missing, result: CaseResult, case: TransformersCase, settings: Settings
) -> None:
    result.missing[name] = missing.reason
    if missing.out_of_memory:
        settings.out_of_memory[case.kind, name] = case.tokens  # those with more are not tried, so none had fewer


def _forget_all_but(shape: HuggingFaceModel, settings: Settings) -> None:
    if others := settings.models.keys() - {shape.name}:
        for name in others:
            del settings.models[name]
        gc.collect()  # a model may refer to itself


def _model(shape: HuggingFaceModel, settings: Settings) -> nn.Module:
    if shape.name not in settings.models:
        config = AutoConfig.for_model(shape.model_type, **shape.config)
        torch.manual_seed(0)
        build: Any = AutoModelForCausalLM.from_config
        with torch.device(settings.device):
            built = build(config, dtype=settings.dtype, experts_implementation="supersonic")
        settings.models[shape.name] = built.eval()
    return settings.models[shape.name]


# ---- the contenders --------------------------------------------------------------------------------------------------


def _contenders(case: TransformersCase, model: Any, settings: Settings) -> dict[str, Contender]:
    register_liger()
    names = [OURS, OURS_FP8] if settings.dtype is torch.bfloat16 else [OURS]
    names += settings.peers
    build = _layers if case.what == "layers" else _whole_model
    contenders = {name: build(case, model, IMPLEMENTATIONS.get(name, name), settings) for name in names}
    if case.what == "layers" and not case.model.swiglu:
        contenders[SWIGLU] = _swiglu(case, settings)
    return contenders


def _layers(case: TransformersCase, model: Any, implementation: str, settings: Settings) -> Contender:
    experts = [module for module in model.modules() if hasattr(module, "is_concatenated")][:LAYERS]
    x, ids, scores, dout = routed_inputs(case, settings)

    def forward(_inference: bool) -> Tensor:
        model.config._experts_implementation = implementation
        h = x
        for module in experts:
            h = h + module(h, ids, scores)
        return h

    return Contender(forward, x, [p for module in experts for p in module.parameters()], dout)


def _swiglu(case: TransformersCase, settings: Settings) -> Contender:
    """Our layer on a plain SwiGLU of the same FLOPs."""
    shape = case.model.shape(case.tokens)
    width = shape.intermediate if case.model.gated else 2 * shape.intermediate // 3 // 8 * 8
    x, ids, scores, dout = routed_inputs(case, settings)
    sizes = (shape.experts, 2 * width, shape.hidden), (shape.experts, shape.hidden, width)
    weights = [
        0.02 * torch.randn(size, device=settings.device, dtype=settings.dtype) for _ in range(LAYERS) for size in sizes
    ]
    for w in weights:
        w.requires_grad_()

    def forward(inference: bool) -> Tensor:
        h = x
        for w1, w2 in zip(weights[0::2], weights[1::2], strict=True):
            h = h + topk_experts(h, ids, scores, w1, w2, inference=inference)
        return h

    return Contender(forward, x, weights, dout)


def routed_inputs(case: TransformersCase, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x (T, H), ids (T, K), scores (T, K), gradient of the output), the same for every contender."""
    shape = case.model.shape(case.tokens)
    torch.manual_seed(case.tokens)
    with torch.device(settings.device):
        x = torch.randn(shape.tokens, shape.hidden, dtype=settings.dtype).requires_grad_()
        scores, ids = torch.randn(shape.tokens, shape.experts).softmax(-1).topk(shape.top_k)
        return x, ids, scores.to(settings.dtype), torch.randn_like(x)


def _whole_model(case: TransformersCase, model: Any, implementation: str, settings: Settings) -> Contender:
    batch = case.tokens if case.mode == "decode" else max(1, case.tokens // 2048)
    torch.manual_seed(case.tokens)
    ids = torch.randint(case.model.vocabulary, (batch, case.tokens // batch), device=settings.device)
    embedding = model.get_input_embeddings().weight
    own_token = embedding.new_zeros(batch, 1, 1, 1)  # a mask that is added: the library asks the GPU nothing about it

    def forward(_inference: bool) -> Tensor:
        model.config._experts_implementation = implementation
        if case.mode == "decode":
            logits: Tensor = model(ids, attention_mask=own_token, use_cache=False).logits
            return logits.flatten(0, 1)
        loss: Tensor = model(ids, labels=ids, use_cache=False).loss
        return loss.view(1, 1)

    others = [p for p in model.parameters() if p.requires_grad and p is not embedding]
    return Contender(forward, embedding, others, torch.ones(1, 1, device=settings.device))


def register_liger() -> None:
    """Liger's fused MoE as an experts backend, if it is not one yet."""
    if "liger" not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register("liger", liger_experts_forward)


def liger_experts_forward(experts: Any, hidden_states: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    if gate_of(experts) != PLAIN_SWIGLU or experts.has_bias or experts.is_transposed:
        raise NotImplementedError("Liger's fused MoE is a SwiGLU without biases")
    return liger_function()(hidden_states, experts.gate_up_proj, experts.down_proj, ids.int(), scores)
