"""Functional entry points, from the whole layer down to rows that a dispatcher has already sorted by expert.

    moe_layer            router weights -> logits -> top-k -> experts -> weighted sum
    topk_experts         (T, K) expert ids and scores from your own router (Hugging Face, torchtitan, vLLM)
    routed_experts       (token, expert, score) triples, any number of experts per token
    dispatched_experts   rows already sorted by expert, with cumulative offsets (expert parallelism)
    experts_from_plan    a ready routing plan

Shapes: T tokens, H hidden, I expert intermediate, E experts, K choices a token, N1 = 2I for gated activations, else I.
    x (T, H) · w1 (E, N1, H) · b1 (E, N1) · w2 (E, H, I) · b2 (E, H)
Weights stored transposed, (E, H, N1) or (E, I, H), are passed as ``w.transpose(1, 2)``: a view, never a copy. Scores
come in any float dtype and are read in fp32 (fp64 for fp64 x).

All take the keyword options of :class:`ExpertOptions` (``training/options.py``): biases, activation, layout, recipe,
weight_cache, inference, accumulate_into_main_grad, backend, validate. All raise TypeError or ValueError, with the
constraint, what was given and the fix, before any kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from supersonic_moe import checks, passed
from supersonic_moe.autocast import autocast_dtype
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.config.router import TokenRounding, TopKRouter, as_router
from supersonic_moe.inference import small_batch
from supersonic_moe.kernels import registry
from supersonic_moe.routing.plan import plan_from_offsets, plan_from_sorted_triples, plan_from_topk, plan_from_triples
from supersonic_moe.routing.token_rounding import token_rounding
from supersonic_moe.routing.topk import check_choice, encode, route
from supersonic_moe.training import layer as whole
from supersonic_moe.training.arguments import Weight
from supersonic_moe.training.bf16 import score_dtype
from supersonic_moe.training.experts import run_experts
from supersonic_moe.training.options import ExpertOptions, Options, lists_options
from supersonic_moe.training.router_linear import linear_in, router_linear


class MoEOutput(NamedTuple):
    output: Tensor
    """(T, H), dtype of x."""
    router_logits: Tensor
    """(T, E); feed them to the auxiliary losses. In the dtype of x, or in ``router_dtype``."""
    expert_counts: Tensor
    """(E,) int32 rows that each expert computed."""


@lists_options
def moe_layer(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    w1: Tensor,
    w2: Tensor,
    num_experts_per_tok: int,
    *,
    router: TopKRouter | TokenRounding | str = "softmax_after_topk",
    router_dtype: torch.dtype | None = None,
    correction_bias: Tensor | None = None,
    rounding_step: Tensor | int = 0,
    token_mask_T: Tensor | None = None,
    **options: Unpack[ExpertOptions],
) -> MoEOutput:
    """The whole MoE block: ``logits = x @ router_weight.T``, routing, experts, weighted sum.

    Args:
        router_weight_EH: (E, H). Other shapes: module docstring.
        num_experts_per_tok: K, 1 <= K <= E.
        router: a config of ``config.router`` or a TokenRounding (which then rounds, in training or not), or a name.
        router_dtype: compute the logits in this dtype (torch.float32, torch.float64) whatever that of x, also under
            autocast. None: in the dtype of x, or of autocast.
        correction_bias: (E,) fp32, only with SigmoidGroupedTopK.
        rounding_step: which draw of the sampled modes of token rounding, see :func:`token_rounding`.
        token_mask_T: (T,) bool, False where a token is padding: such a token is not read and not counted, goes to no
            expert and gets zeros. Not with a TokenRounding.
        options: :class:`ExpertOptions`.
    """
    projection = RouterWeight(router_weight_EH, router_dtype)
    selection = Selection(num_experts_per_tok, as_router(router), correction_bias, rounding_step, token_mask_T)
    layer = run_layer(x_TH, projection, w1, w2, selection, options)
    return MoEOutput(layer.output, layer.router_logits, layer.expert_counts)


class RouterWeight(NamedTuple):
    """``logits = x @ weight.T``."""

    weight_EH: Tensor
    dtype: torch.dtype | None = None
    """Of the logits; None: that of x, or of autocast."""


class Selection(NamedTuple):
    """How the tokens of a call get their experts: arguments of :func:`moe_layer`."""

    num_experts_per_tok: int
    router: TopKRouter | TokenRounding
    correction_bias: Tensor | None
    rounding_step: Tensor | int
    token_mask_T: Tensor | None
    with_loss: bool = False
    """Whether the Switch loss is wanted, from whoever has it at little cost."""

    def without_padding(self, x_TH: Tensor) -> Tensor:
        """Zeros for padding: what stands there, NaN perhaps, would reach the gradient of the router's weight."""
        assert self.token_mask_T is not None
        if isinstance(self.router, TokenRounding):
            raise ValueError(
                "token_mask cannot be combined with TokenRounding, which fills up tiles with tokens of its choice; got "
                f"{self.router}. Use its base router, or leave padding in."
            )
        checks.tensor("x", x_TH, 2, "(T, H)")
        checks.token_mask("token_mask", self.token_mask_T, x_TH)
        return x_TH.masked_fill(~self.token_mask_T[:, None], 0)

    def top_k(self, logits_TE: Tensor, router: TopKRouter, backend: str) -> tuple[Tensor, Tensor]:
        """Scores (T, K) and ids (T, K), -1 for padding."""
        k, bias = self.num_experts_per_tok, self.correction_bias
        scores_TK, ids_TK = route(logits_TE, k, router, correction_bias=bias, backend=_router_backend(backend))
        if self.token_mask_T is not None:
            ids_TK = ids_TK.masked_fill(~self.token_mask_T[:, None], -1)
        return scores_TK, ids_TK


class LayerOutput(NamedTuple):
    """:class:`MoEOutput` with the choice of experts."""

    output: Tensor
    router_logits: Tensor
    expert_counts: Tensor
    expert_ids: Tensor | None
    """(T, K) int32, -1 where a token is padding; None with token rounding."""
    balance_loss: Tensor | None = None
    """The Switch loss, if it was wanted and came with the rest."""


def run_layer(
    x_TH: Tensor,
    router_or_logits: RouterWeight | Callable[[Tensor], Tensor],
    w1: Tensor,
    w2: Tensor,
    selection: Selection,
    options: ExpertOptions,
) -> LayerOutput:
    """:func:`moe_layer`, for a router's weight or for any router, x (T, H) -> logits (T, E)."""
    if selection.token_mask_T is not None:
        x_TH = selection.without_padding(x_TH)
    read = Options.read(options)
    if isinstance(router_or_logits, RouterWeight) and router_or_logits.dtype is None:
        layer = _in_one(x_TH, router_or_logits.weight_EH, w1, w2, selection, read)
        if layer is not None:
            return layer
    experts = checked_experts(x_TH, w1, w2, read)
    k, policy, bias, step, *_ = selection
    num_experts, backend = w1.shape[0], experts.options.backend
    logits_TE, x_for_experts = router_logits(x_TH, experts.x, router_or_logits, num_experts)
    if experts.options.validate:
        checks.finite_logits(logits_TE)
    if isinstance(policy, TokenRounding):
        backend = _router_backend(backend)
        rounded = token_rounding(logits_TE, k, policy, step=step, correction_bias=bias, backend=backend)
        plan = plan_from_sorted_triples(
            rounded.token_indices, rounded.expert_indices, rounded.token_offsets, num_experts
        )
        output = experts.run(x_for_experts, rounded.scores, plan)
        return LayerOutput(output, logits_TE, rounded.counts, None)
    scores_TK, ids_TK = selection.top_k(logits_TE, policy, backend)
    if small_batch.suits(experts.x, w1, w2, k, experts.options):
        counts_E = small_batch.rows_of_experts(ids_TK, num_experts)
        return LayerOutput(experts.run_few(ids_TK, scores_TK), logits_TE, counts_E, ids_TK)
    plan = plan_from_topk(ids_TK, num_experts)
    return LayerOutput(experts.run(x_for_experts, scores_TK, plan), logits_TE, plan.expert_counts, ids_TK)


def _in_one(
    x_TH: Tensor, router_weight_EH: Tensor, w1: Tensor, w2: Tensor, selection: Selection, options: Options
) -> LayerOutput | None:
    """:func:`run_layer` by ``training/layer.py``; None where the call is none for it."""
    k, policy, bias, _, mask_T, with_loss = selection
    if mask_T is not None or not isinstance(policy, TopKRouter) or type(k) is not int:
        return None
    tensors = (x_TH, router_weight_EH, w1, w2, options.b1, options.b2, bias)
    key = passed.key_of(tensors, options, k, policy)
    if key is None:
        return None
    if not passed.has_passed(key):
        experts = checked_experts(x_TH, w1, w2, options)
        if small_batch.suits(experts.x, w1, w2, k, options):
            return None
        _check_router_weight(experts.x, router_weight_EH, w1.shape[0], None)
        check_choice(experts.x, w1.shape[0], k, policy, bias)
        if experts.x is x_TH:
            passed.remember(key)
        x_TH = experts.x
    choice = whole.Choice(bias, k, *encode(policy, k), "auto", with_loss)
    return LayerOutput(*whole.run_layer(x_TH, router_weight_EH, choice, Weight(w1, w1), Weight(w2, w2), options))


def router_logits(
    x_TH: Tensor, cast_TH: Tensor, router: RouterWeight | Callable[[Tensor], Tensor], num_experts: int
) -> tuple[Tensor, Tensor]:
    """(logits (T, E), x for the experts). ``cast_TH``: x in the dtype of the computation."""
    if not isinstance(router, RouterWeight):
        logits_TE = router(x_TH)
        _check_router_logits(logits_TE, x_TH, num_experts)
        return logits_TE, cast_TH
    weight_EH, dtype = router
    _check_router_weight(cast_TH, weight_EH, num_experts, dtype)
    if dtype is not None:
        return linear_in(x_TH, weight_EH, dtype), cast_TH
    if weight_EH.dtype is not cast_TH.dtype:
        weight_EH = weight_EH.to(cast_TH.dtype)
    return router_linear(cast_TH, weight_EH)


@lists_options
def topk_experts(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_scores_TK: Tensor,
    w1: Tensor,
    w2: Tensor,
    **options: Unpack[ExpertOptions],
) -> Tensor:
    """``out[t] = sum_j scores[t, j] * expert[ids[t, j]](x[t])`` for ids (T, K) int32/int64 and scores (T, K) float;
    differentiable in the scores. Returns (T, H) in the dtype of x.

    Ids outside [0, E) are skipped (masked, not multiplied by zero): -1, or the sentinel E of expert parallelism.
    Options: :class:`ExpertOptions`.
    """
    read = Options.read(options)
    key = passed.key_of((x_TH, topk_ids_TK, topk_scores_TK, w1, w2, read.b1, read.b2), read)
    if key is not None and passed.has_passed(key):
        weights = Weight(w1, w1), read.b1, Weight(w2, w2), read.b2
        return whole.run_ids(x_TH, topk_ids_TK, topk_scores_TK, *weights, read)
    experts = checked_experts(x_TH, w1, w2, read)
    validate = experts.options.validate
    checks.ids("topk_ids", topk_ids_TK, 2)
    checks.size("topk_ids", "one row per token,", topk_ids_TK.shape[0], x_TH.shape[0], "the rows of x")
    checks.same_shape("topk_ids", topk_ids_TK, "topk_scores", topk_scores_TK)
    _check_scores("topk_scores", topk_scores_TK, x_TH, validate)
    checks.same_device("topk_ids", topk_ids_TK, "x", x_TH)
    if small_batch.suits(experts.x, w1, w2, topk_ids_TK.shape[1], experts.options):
        if validate:
            checks.valid_topk_ids(topk_ids_TK, w1.shape[0])
        return experts.run_few(topk_ids_TK, topk_scores_TK)
    if not validate and whole.suits(experts.x, experts.options.backend):
        checks.index_count("routed rows", topk_ids_TK.numel())
        if key is not None and experts.x is x_TH:
            passed.remember(key)
        operands = experts.w1, experts.b1, experts.w2, experts.b2
        return whole.run_ids(experts.x, topk_ids_TK, topk_scores_TK, *operands, experts.options)
    plan = plan_from_topk(topk_ids_TK, w1.shape[0], validate=validate)
    return experts.run(experts.x, topk_scores_TK, plan)


@lists_options
def routed_experts(
    x_TH: Tensor,
    token_indices_S: Tensor,
    expert_indices_S: Tensor,
    scores_S: Tensor,
    w1: Tensor,
    w2: Tensor,
    **options: Unpack[ExpertOptions],
) -> Tensor:
    """``out[t] = sum over triples (t, e, s) of s * expert[e](x[t])``: three (S,) tensors in any order, any number of
    experts per token. Returns (T, H) in the dtype of x.

    Triples with a token outside [0, T) or an expert outside [0, E) are skipped; a token without experts gets zeros.
    Options: :class:`ExpertOptions`.
    """
    experts = checked_experts(x_TH, w1, w2, Options.read(options))
    validate = experts.options.validate
    checks.ids("token_indices", token_indices_S, 1)
    checks.same_shape("token_indices", token_indices_S, "scores", scores_S)
    _check_scores("scores", scores_S, x_TH, validate)
    checks.same_device("token_indices", token_indices_S, "x", x_TH)
    plan = plan_from_triples(token_indices_S, expert_indices_S, x_TH.shape[0], w1.shape[0], validate=validate)
    return experts.run(experts.x, scores_S, plan)


@lists_options
def dispatched_experts(
    x_RH: Tensor,
    offs_E: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    scores_R: Tensor | None = None,
    **options: Unpack[ExpertOptions],
) -> Tensor:
    """Experts on rows already sorted by expert: rows [offs[e-1], offs[e]) belong to expert e; returns (R, H) in the
    same order.

    Args:
        offs_E: (E,) int32/int64 cumulative ends on the device of x, as in ``torch.nn.functional.grouped_mm``.
        scores_R: (R,) optional row weights, applied to the outputs. Rows at and past ``offs[-1]`` are not computed and
            come out as zeros.
        options: :class:`ExpertOptions`.
    """
    experts = checked_experts(x_RH, w1, w2, Options.read(options))
    validate = experts.options.validate
    checks.ids("offs", offs_E, 1)
    checks.size("offs", "length", offs_E.shape[0], w1.shape[0], "one cumulative end for each expert of w1")
    checks.same_device("offs", offs_E, "x", x_RH)
    if scores_R is None:
        scores_R = x_RH.new_ones(x_RH.shape[0], dtype=torch.promote_types(x_RH.dtype, torch.float32))
    checks.tensor("scores", scores_R, 1, "(R,)")
    checks.size("scores", "length", scores_R.shape[0], x_RH.shape[0], "the rows of x")
    _check_scores("scores", scores_R, x_RH, validate)
    plan = plan_from_offsets(offs_E, x_RH.shape[0], validate=validate)
    return experts.run(experts.x, scores_R, plan)


@lists_options
def experts_from_plan(
    x_TH: Tensor,
    scores_S: Tensor,
    plan: RoutingPlan,
    w1: Tensor,
    w2: Tensor,
    **options: Unpack[ExpertOptions],
) -> Tensor:
    """Experts under a ready :class:`RoutingPlan` (``plan_from_deepep``, tile-padded plans, one plan for several
    layers); scores (S,) by slot. Returns (T, H) in the dtype of x. Options: :class:`ExpertOptions`; ``validate`` checks
    the scores, not the plan.
    """
    experts = checked_experts(x_TH, w1, w2, Options.read(options))
    if not isinstance(plan, RoutingPlan):
        raise TypeError(
            f"plan must be a RoutingPlan; got {checks.describe(plan)}. Build one, e.g. with plan_from_topk."
        )
    checks.size("plan", "num_experts", plan.num_experts, w1.shape[0], "the experts of w1")
    checks.size("plan", "num_tokens", plan.num_tokens, x_TH.shape[0], "the rows of x")
    checks.tensor("scores", scores_S, 1, "(S,)")
    checks.size("scores", "length", scores_S.shape[0], plan.num_slots, "the slots of the plan")
    _check_scores("scores", scores_S, x_TH, experts.options.validate)
    checks.same_device("plan", plan.expert_offsets, "x", x_TH)
    return experts.run(experts.x, scores_S, plan)


# ---- what every entry point does first -------------------------------------------------------------------------------


class CheckedExperts(NamedTuple):
    """Checked operands of one call, in the dtype of the computation."""

    x: Tensor
    w1: Weight
    b1: Tensor | None
    w2: Weight
    b2: Tensor | None
    options: Options

    def run(self, x: Tensor, scores: Tensor, plan: RoutingPlan) -> Tensor:
        """``x``: that of the experts, or what ``router_linear`` made of it."""
        scores_S = scores if scores.dim() == 1 else scores.reshape(-1)
        dtype = score_dtype(x.dtype)
        if scores_S.dtype is not dtype:
            scores_S = scores_S.to(dtype)
        return run_experts(x, scores_S, self.w1, self.b1, self.w2, self.b2, plan, self.options)

    def run_few(self, ids_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """Inference in FP8 with few rows an expert: nothing is sorted or saved."""
        return small_batch.run(self.x, ids_TK, scores_TK, self.w1, self.w2, self.options)


def checked_experts(x: Tensor, w1: Tensor, w2: Tensor, options: Options) -> CheckedExperts:
    """Check everything that metadata shows. Under ``torch.autocast`` the layer computes in the autocast dtype, like a
    linear layer.
    """
    options.check()
    b1, b2, activation, recipe = options.b1, options.b2, options.activation, options.recipe
    checks.tensor("x", x, 2, "(T, H)")
    checks.floating("x", x)
    checks.tensor("w1", w1, 3, "(E, N1, H)")
    checks.tensor("w2", w2, 3, "(E, H, I)")
    num_experts, n1, hidden = w1.shape
    intermediate = w2.shape[2]
    if not (num_experts and hidden and intermediate):
        for name, value in (("the number of experts", num_experts), ("H", hidden), ("I", intermediate)):
            checks.positive(name, value)
    checks.size("w1", "hidden size (last dimension)", hidden, x.shape[1], "the last dimension of x")
    checks.size("w2", "expert count", w2.shape[0], num_experts, "the experts of w1")
    checks.size("w2", "hidden size (second dimension)", w2.shape[1], hidden, "the last dimension of w1")
    fan = activation.fan
    if n1 != fan * intermediate:
        why = f"{fan} I for {activation.type.value}, and w2 has I = {intermediate}"
        checks.size("w1", "N1 (second dimension)", n1, fan * intermediate, why)
    operands = [("w1", w1), ("w2", w2)]
    for name, bias, columns in (("b1", b1, n1), ("b2", b2, hidden)):
        if bias is not None:
            checks.tensor(name, bias, 2, "(E, N1)" if name == "b1" else "(E, H)")
            if bias.shape != (num_experts, columns):
                why = f"one bias for each row of w{name[1]}"
                checks.size(name, "shape", tuple(bias.shape), (num_experts, columns), why)
            operands.append((name, bias))
    dtype = autocast_dtype(x)
    x = checks.dense_rows("x", x)
    for name, t in operands:
        if t.dtype is x.dtype and t.is_contiguous() and t.device == x.device:  # most are; what is wrong costs more
            continue
        checks.same_device(name, t, "x", x)
        checks.dense(name, t)
        if dtype is None:
            checks.same_dtype(name, t, "x", x)
        else:
            checks.floating(name, t)
    if isinstance(recipe, Fp8Recipe) and (dtype or x.dtype) is not torch.bfloat16:
        raise TypeError(
            f"Fp8Recipe needs bfloat16 inputs and weights; got x as {checks.describe(x)}. Convert the model with "
            ".to(torch.bfloat16), or run under torch.autocast(dtype=torch.bfloat16)."
        )
    first, second = Weight(w1, w1), Weight(w2, w2)
    if dtype is not None:
        x, first, second = x.to(dtype), Weight(w1, w1.to(dtype)), Weight(w2, w2.to(dtype))
        b1, b2 = [None if b is None else b.to(dtype) for b in (b1, b2)]
    checks.index_count("tokens", x.shape[0])
    if not torch.compiler.is_compiling():  # the op chooses again when it runs
        backend = options.backend
        if isinstance(recipe, Fp8Recipe):
            registry.choose_fp8(x.device, hidden=hidden, intermediate=intermediate, backend=backend)
        else:
            registry.choose(x.device, x.dtype, hidden=hidden, intermediate=intermediate, backend=backend)
    return CheckedExperts(x, first, b1, second, b2, options)


def _check_router_weight(x: Tensor, weight: Tensor, num_experts: int, dtype: torch.dtype | None) -> None:
    checks.tensor("router_weight", weight, 2, "(E, H)")
    checks.floating("router_weight", weight)
    checks.same_device("router_weight", weight, "x", x)
    if dtype is not None:
        checks.floating_dtype("router_dtype", dtype)
    elif weight.dtype is not x.dtype and autocast_dtype(x) is None:
        raise TypeError(
            f"router_weight and x must have one dtype; got {checks.describe(weight)} and {checks.describe(x)}. "
            "Convert one with .to(dtype), pass router_dtype=torch.float32 for logits in fp32, or run under "
            "torch.autocast."
        )
    checks.size("router_weight", "hidden size", weight.shape[1], x.shape[1], "the last dimension of x")
    checks.size("router_weight", "expert count", weight.shape[0], num_experts, "all experts")


def _check_router_logits(logits: Tensor, x: Tensor, num_experts: int) -> None:
    """What a router of any class returned."""
    checks.tensor("the router's output", logits, 2, "(T, E)")
    checks.floating("the router's output", logits)
    checks.same_device("the router's output", logits, "x", x)
    shape = (x.shape[0], num_experts)
    checks.size("the router's output", "shape", tuple(logits.shape), shape, "tokens of x, all experts")


def _check_scores(name: str, scores: Tensor, x: Tensor, validate: bool) -> None:
    checks.floating(name, scores)
    checks.same_device(name, scores, "x", x)
    if validate:
        checks.finite_scores(name, scores)


def _router_backend(backend: str) -> str:
    """An explicit GEMM backend leaves routing to the device's best, except the reference, which is all or nothing."""
    return "reference" if backend == "reference" else "auto"
