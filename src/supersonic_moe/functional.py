"""Functional entry points, from the whole layer down to rows that a dispatcher has already sorted by expert.

    moe_layer            router weights -> logits -> top-k -> experts -> weighted sum
    topk_experts         (T, K) expert ids and scores from your own router (Hugging Face, torchtitan, vLLM)
    routed_experts       (token, expert, score) triples, any number of experts per token
    dispatched_experts   rows already sorted by expert, with cumulative offsets (expert parallelism)

Shapes: T tokens, H hidden, I expert intermediate, E experts, K choices a token, N1 = 2I for gated activations, else I.
    x (T, H) · w1 (E, N1, H) · b1 (E, N1) · w2 (E, H, I) · b2 (E, H)
Weights stored transposed, (E, H, N1) or (E, I, H), are passed as ``w.transpose(1, 2)``: a view, never a copy.
``layout`` says how the N1 rows of w1 hold gate and up. Biases may be given for one projection only. Scores are kept in
fp32 whatever the dtype of x.

``accumulate_into_main_grad=True`` adds the gradients of w1 and w2 to their fp32 ``main_grad`` where they are computed,
and leaves ``.grad`` alone: Megatron's gradient accumulation fusion (``training/main_grad.py``). Biases and router keep
ordinary gradients.

``recipe=Fp8Recipe()`` multiplies in e4m3 (``config/recipe.py``; bfloat16 inputs or autocast to it). The weights are
quantised in every call, unless ``weight_cache`` holds their FP8 copies: one cache for each pair of weights
(``quantization/weight_cache.py``).

``inference=True`` saves nothing for backward and returns a tensor without gradient. ``validate=True`` adds the checks
that only device data can answer (NaN logits, repeated or out-of-range expert ids, offsets that do not add up); they
cost a host synchronisation, so they are off by default, and such values then have a memory-safe result: a bad id is
skipped, a NaN stays in its token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation, as_layout
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe, Recipe, as_recipe
from supersonic_moe.config.router import TokenRounding, TopKRouter, as_router
from supersonic_moe.kernels import registry
from supersonic_moe.quantization.weight_cache import WeightCache
from supersonic_moe.routing.plan import plan_from_offsets, plan_from_sorted_triples, plan_from_topk, plan_from_triples
from supersonic_moe.routing.token_rounding import token_rounding
from supersonic_moe.routing.topk import route
from supersonic_moe.training.experts import run_experts
from supersonic_moe.training.experts_fp8 import run_experts_fp8
from supersonic_moe.training.router_linear import router_linear


class MoEOutput(NamedTuple):
    output: Tensor
    """(T, H), dtype of x."""
    router_logits: Tensor
    """(T, E), dtype of x; feed them to the auxiliary losses."""
    expert_counts: Tensor
    """(E,) int32 rows that each expert computed."""


def moe_layer(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    w1: Tensor,
    w2: Tensor,
    num_experts_per_tok: int,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    router: TopKRouter | TokenRounding | str = "softmax_after_topk",
    correction_bias: Tensor | None = None,
    rounding_step: Tensor | int = 0,
    activation: Activation | ActivationType | str = ActivationType.SWIGLU,
    layout: GateUpLayout | str = GateUpLayout.INTERLEAVED,
    recipe: Recipe | None = None,
    weight_cache: WeightCache | None = None,
    inference: bool = False,
    accumulate_into_main_grad: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> MoEOutput:
    """The whole MoE block: ``logits = x @ router_weight.T``, routing, experts, weighted sum.

    Args:
        router_weight_EH: (E, H). Other shapes: module docstring.
        num_experts_per_tok: K, 1 <= K <= E.
        router: a config of ``routing.topk`` or a TokenRounding (which then rounds, in training or not), or a name.
        correction_bias: (E,) fp32, only with SigmoidGroupedTopK.
        rounding_step: which draw of the sampled modes of token rounding, see :func:`token_rounding`.
    """
    experts = _checked(
        x_TH, w1, b1, w2, b2, activation, layout, recipe, weight_cache, backend, accumulate_into_main_grad
    )
    _check_router_weight(x_TH, router_weight_EH, w1)
    policy = as_router(router)
    logits_TE, x_for_experts = router_linear(experts.x, router_weight_EH.to(experts.x.dtype))
    experts = experts._replace(x=x_for_experts)
    if validate:
        checks.finite_logits(logits_TE)
    num_experts = w1.shape[0]
    if isinstance(policy, TokenRounding):
        rounded = token_rounding(
            logits_TE,
            num_experts_per_tok,
            policy,
            step=rounding_step,
            correction_bias=correction_bias,
            backend=_router_backend(backend),
        )
        plan = plan_from_sorted_triples(
            rounded.token_indices, rounded.expert_indices, rounded.token_offsets, num_experts
        )
        scores, counts_E = rounded.scores, rounded.counts
    else:
        scores, ids_TK = route(
            logits_TE, num_experts_per_tok, policy, correction_bias=correction_bias, backend=_router_backend(backend)
        )
        plan = plan_from_topk(ids_TK, num_experts)
        counts_E = plan.expert_counts
    return MoEOutput(experts.run(scores, plan, inference), logits_TE, counts_E)


def topk_experts(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_scores_TK: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: Activation | ActivationType | str = ActivationType.SWIGLU,
    layout: GateUpLayout | str = GateUpLayout.INTERLEAVED,
    recipe: Recipe | None = None,
    weight_cache: WeightCache | None = None,
    inference: bool = False,
    accumulate_into_main_grad: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """``out[t] = sum_j scores[t, j] * expert[ids[t, j]](x[t])`` for ids (T, K) int32/int64 and scores (T, K) float;
    differentiable in the scores.

    Ids outside [0, E) are skipped (masked, not multiplied by zero): -1, or the sentinel E of expert parallelism.
    """
    experts = _checked(
        x_TH, w1, b1, w2, b2, activation, layout, recipe, weight_cache, backend, accumulate_into_main_grad
    )
    checks.ids("topk_ids", topk_ids_TK, 2)
    checks.size("topk_ids", "one row per token,", topk_ids_TK.shape[0], x_TH.shape[0], "the rows of x")
    checks.same_shape("topk_ids", topk_ids_TK, "topk_scores", topk_scores_TK)
    _check_scores("topk_scores", topk_scores_TK, x_TH, validate)
    checks.same_device("topk_ids", topk_ids_TK, "x", x_TH)
    plan = plan_from_topk(topk_ids_TK, w1.shape[0], validate=validate)
    return experts.run(topk_scores_TK, plan, inference)


def routed_experts(
    x_TH: Tensor,
    token_indices_S: Tensor,
    expert_indices_S: Tensor,
    scores_S: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: Activation | ActivationType | str = ActivationType.SWIGLU,
    layout: GateUpLayout | str = GateUpLayout.INTERLEAVED,
    recipe: Recipe | None = None,
    weight_cache: WeightCache | None = None,
    inference: bool = False,
    accumulate_into_main_grad: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """``out[t] = sum over triples (t, e, s) of s * expert[e](x[t])``: three (S,) tensors in any order, any number of
    experts per token.

    Triples with a token outside [0, T) or an expert outside [0, E) are skipped; a token without experts gets zeros.
    """
    experts = _checked(
        x_TH, w1, b1, w2, b2, activation, layout, recipe, weight_cache, backend, accumulate_into_main_grad
    )
    checks.ids("token_indices", token_indices_S, 1)
    checks.same_shape("token_indices", token_indices_S, "scores", scores_S)
    _check_scores("scores", scores_S, x_TH, validate)
    checks.same_device("token_indices", token_indices_S, "x", x_TH)
    plan = plan_from_triples(token_indices_S, expert_indices_S, x_TH.shape[0], w1.shape[0], validate=validate)
    return experts.run(scores_S, plan, inference)


def dispatched_experts(
    x_RH: Tensor,
    offs_E: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    scores_R: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: Activation | ActivationType | str = ActivationType.SWIGLU,
    layout: GateUpLayout | str = GateUpLayout.INTERLEAVED,
    recipe: Recipe | None = None,
    weight_cache: WeightCache | None = None,
    inference: bool = False,
    accumulate_into_main_grad: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """Experts on rows already sorted by expert: rows [offs[e-1], offs[e]) belong to expert e; returns (R, H) in the
    same order.

    Args:
        offs_E: (E,) int32/int64 cumulative ends on the device of x, as in ``torch.nn.functional.grouped_mm``.
        scores_R: (R,) optional row weights, applied to the outputs. Rows at and past ``offs[-1]`` are not computed and
            come out as zeros.
    """
    experts = _checked(
        x_RH, w1, b1, w2, b2, activation, layout, recipe, weight_cache, backend, accumulate_into_main_grad
    )
    checks.ids("offs", offs_E, 1)
    checks.size("offs", "length", offs_E.shape[0], w1.shape[0], "one cumulative end for each expert of w1")
    checks.same_device("offs", offs_E, "x", x_RH)
    if scores_R is None:
        scores_R = x_RH.new_ones(x_RH.shape[0], dtype=torch.promote_types(x_RH.dtype, torch.float32))
    checks.tensor("scores", scores_R, 1, "(R,)")
    checks.size("scores", "length", scores_R.shape[0], x_RH.shape[0], "the rows of x")
    _check_scores("scores", scores_R, x_RH, validate)
    plan = plan_from_offsets(offs_E, x_RH.shape[0], validate=validate)
    return experts.run(scores_R, plan, inference)


def experts_from_plan(
    x_TH: Tensor,
    scores_S: Tensor,
    plan: RoutingPlan,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: Activation | ActivationType | str = ActivationType.SWIGLU,
    layout: GateUpLayout | str = GateUpLayout.INTERLEAVED,
    recipe: Recipe | None = None,
    weight_cache: WeightCache | None = None,
    inference: bool = False,
    accumulate_into_main_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Experts under a ready :class:`RoutingPlan` (``plan_from_deepep``, tile-padded plans, one plan for several
    layers); scores (S,) by slot.
    """
    experts = _checked(
        x_TH, w1, b1, w2, b2, activation, layout, recipe, weight_cache, backend, accumulate_into_main_grad
    )
    checks.size("plan", "num_experts", plan.num_experts, w1.shape[0], "the experts of w1")
    checks.size("plan", "num_tokens", plan.num_tokens, x_TH.shape[0], "the rows of x")
    checks.tensor("scores", scores_S, 1, "(S,)")
    checks.size("scores", "length", scores_S.shape[0], plan.num_slots, "the slots of the plan")
    _check_scores("scores", scores_S, x_TH, validate=False)
    checks.same_device("plan", plan.expert_offsets, "x", x_TH)
    return experts.run(scores_S, plan, inference)


# ---- what every entry point does first -------------------------------------------------------------------------------


class _Experts(NamedTuple):
    """Checked operands of one call, in the dtype of the computation."""

    x: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: Activation
    layout: GateUpLayout
    recipe: Recipe
    weight_cache: WeightCache | None
    backend: str
    passed: tuple[Tensor, Tensor]
    """w1 and w2 as they were passed."""
    accumulate: bool
    """Their gradients go to their ``main_grad``."""

    def run(self, scores: Tensor, plan: RoutingPlan, inference: bool) -> Tensor:
        scores_S = scores if scores.dim() == 1 else scores.reshape(-1)
        if scores_S.dtype not in (torch.float32, torch.float64):
            scores_S = scores_S.float()
        arguments = (self.x, scores_S, self.w1, self.b1, self.w2, self.b2, plan, self.activation, self.layout)
        if isinstance(self.recipe, Fp8Recipe):
            return run_experts_fp8(
                *arguments,
                self.recipe,
                passed=self.passed,
                cache=self.weight_cache,
                backend=self.backend,
                inference=inference,
                accumulate=self.accumulate,
            )
        owners = self.passed if self.accumulate else None
        return run_experts(*arguments, backend=self.backend, inference=inference, owners=owners)


def _checked(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: Activation | ActivationType | str,
    layout: GateUpLayout | str,
    recipe: Recipe | None,
    weight_cache: WeightCache | None,
    backend: str,
    accumulate_into_main_grad: bool,
) -> _Experts:
    """Check everything that metadata shows. Under ``torch.autocast`` the layer computes in the autocast dtype, like a
    linear layer.
    """
    act, order, numerics = as_activation(activation), as_layout(layout), as_recipe(recipe)
    checks.tensor("x", x, 2, "(T, H)")
    checks.floating("x", x)
    checks.tensor("w1", w1, 3, "(E, N1, H)")
    checks.tensor("w2", w2, 3, "(E, H, I)")
    num_experts, n1, hidden = w1.shape
    intermediate = w2.shape[2]
    for name, value in (("the number of experts", num_experts), ("H", hidden), ("I", intermediate)):
        checks.positive(name, value)
    checks.size("w1", "hidden size (last dimension)", hidden, x.shape[1], "the last dimension of x")
    checks.size("w2", "expert count", w2.shape[0], num_experts, "the experts of w1")
    checks.size("w2", "hidden size (second dimension)", w2.shape[1], hidden, "the last dimension of w1")
    checks.size(
        "w1",
        "N1 (second dimension)",
        n1,
        act.fan * intermediate,
        f"{act.fan} I for {act.type.value}, and w2 has I = {intermediate}",
    )
    operands = {"x": x, "w1": w1, "w2": w2}
    for name, bias, columns in (("b1", b1, n1), ("b2", b2, hidden)):
        if bias is not None:
            shape = (num_experts, columns)
            checks.tensor(name, bias, 2, str(shape))
            checks.size(name, "shape", tuple(bias.shape), shape, f"one bias for each row of w{name[1]}")
            operands[name] = bias
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    for name, t in operands.items():
        checks.same_device(name, t, "x", x)
        checks.dense(name, t)
        if dtype is None:
            checks.same_dtype(name, t, "x", x)
        else:
            checks.floating(name, t)
    passed = (w1, w2)
    if isinstance(numerics, Fp8Recipe) and (dtype or x.dtype) is not torch.bfloat16:
        raise TypeError(
            f"Fp8Recipe needs bfloat16 inputs and weights; got x as {checks.describe(x)}. Convert the model with "
            ".to(torch.bfloat16), or run under torch.autocast(dtype=torch.bfloat16)."
        )
    if dtype is not None:
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
        b1, b2 = (None if b is None else b.to(dtype) for b in (b1, b2))
    checks.index_count("tokens", x.shape[0])
    if not torch.compiler.is_compiling():  # the op chooses again when it runs
        if isinstance(numerics, Fp8Recipe):
            registry.choose_fp8(x.device, hidden=hidden, intermediate=intermediate, backend=backend)
        else:
            registry.choose(x.device, x.dtype, hidden=hidden, intermediate=intermediate, backend=backend)
    return _Experts(x, w1, b1, w2, b2, act, order, numerics, weight_cache, backend, passed, accumulate_into_main_grad)


def _check_router_weight(x: Tensor, weight: Tensor, w1: Tensor) -> None:
    checks.tensor("router_weight", weight, 2, "(E, H)")
    checks.floating("router_weight", weight)
    checks.same_device("router_weight", weight, "x", x)
    if not torch.is_autocast_enabled(x.device.type):
        checks.same_dtype("router_weight", weight, "x", x)
    checks.size("router_weight", "hidden size", weight.shape[1], x.shape[1], "the last dimension of x")
    checks.size("router_weight", "expert count", weight.shape[0], w1.shape[0], "the experts of w1")


def _check_scores(name: str, scores: Tensor, x: Tensor, validate: bool) -> None:
    checks.floating(name, scores)
    checks.same_device(name, scores, "x", x)
    if validate:
        checks.finite_scores(name, scores)


def _router_backend(backend: str) -> str:
    """An explicit GEMM backend leaves routing to the device's best, except the reference, which is all or nothing."""
    return "reference" if backend == "reference" else "auto"
