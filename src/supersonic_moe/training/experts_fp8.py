"""Forward and backward of the expert MLPs in FP8 as a list of kernel calls: ``training/experts.py`` with every product
but the weight gradients in e4m3 (``config/recipe.py``; the arithmetic alone: ``tests/support/fp8_layer.py``).

    q: e4m3, 1 x 128 scales for rows, 128 x 128 for weights    ~: rows read through an index inside a GEMM's loads

    forward                                            backward
    q(W1), q(W2)    with their transposes              q(dO)           at T rows
    q(x)            at T rows                          dA = q(dO~) q(W2)
    H  = q(x~) q(W1)^T           saved as q(H)         A  = act(H + b1)               recomputed
    q(A), A = act(H + b1)                              dS = <dA, A> + <dO~, b2>       dH = act'(H + b1) * (s dA)
    Y  = q(A) q(W2)^T                                  dW2 = dO~^T (s A)              dW1 = dH^T x~
    O  = sum over the token's rows of s (Y + b2)       db1, db2: sums over rows
                                                       dx = sum over the token's rows of q(dH) q(W1)

Weight gradients multiply in bf16, or with ``wgrad="fp8"`` in e4m3 scaled along tokens: their operands are transposed
and each expert's rows padded to whole blocks of 128 positions (``pad_segments``). dO and x have a scale for each
column; s A and dH one for each tile of 128 x 128, which costs a product no more than the scales of a weight do, and
lets one quantisation of dH serve dx as it lies and dW1 transposed. Where both weights need a gradient, the kernel that
computes dH and s A quantises them itself (``down_backward_fp8_quantised``). Not so with a gradient of b1, which is a
sum of dH before: then both are stored in bf16 and quantised in passes of their own.

Saved for backward: x in bf16, H, s, the plan and the transposed weights: 2 T H + R N1 (1 + 4/128) bytes and 1
a weight, 57 % of the BF16 layer's 2 T H + 2 R N1 at T 8192, H 3072, I 1536, K 8. ``save_preactivation`` and
``keep_transposed`` trade those bytes for precision or time.

Hopper's FP8 products contract along the contiguous dimension of both operands, so backward takes W1 and W2 transposed.
They are quantised outside the op pair, so that ``quantization/weight_cache.py`` may keep them from one forward to the
next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.autograd import apply
from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Fp8Experts, Gate, Quantized, Rows
from supersonic_moe.quantization.block_format import blocks, empty_e4m3, empty_scales, padded_capacity
from supersonic_moe.quantization.weight_cache import Fp8Weight, WeightCache
from supersonic_moe.training.main_grad import main_grads, stand_ins
from supersonic_moe.training.op_arguments import (
    PLAN_SCHEMA,
    STATIC_SCHEMA,
    PlanArgs,
    StaticArgs,
    gradients_or_empty,
    plan_args,
    static_args,
    without_autocast,
)

_RECIPE_SCHEMA = "str scale, str save_preactivation, str wgrad"

torch.library.define("supersonic_moe::quantize_weights", "(Tensor[] weights, str scale, str backend) -> Tensor[]")
torch.library.define(
    "supersonic_moe::experts_fp8_forward",
    "(Tensor x, Tensor scores, Tensor w1_q, Tensor w1_scale, Tensor? b1, Tensor w2_q, Tensor w2_scale, Tensor? b2, "
    f"{PLAN_SCHEMA}, {STATIC_SCHEMA}, {_RECIPE_SCHEMA}, bool save) "
    "-> (Tensor out, Tensor h, Tensor z_scale, Tensor row_scores)",
)
torch.library.define(
    "supersonic_moe::experts_fp8_backward",
    "(Tensor dout, Tensor h, Tensor z_scale, bool[6] needs, Tensor(a!)? main_w1, Tensor(b!)? main_w2, "
    "Tensor x, Tensor row_scores, Tensor? w1_q, Tensor w1_transposed, Tensor w1_scale, Tensor? b1, "
    "Tensor w2_transposed, Tensor w2_scale, Tensor? b2, "
    f"{PLAN_SCHEMA}, {STATIC_SCHEMA}, {_RECIPE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class _Call(NamedTuple):
    """What the arguments after the operands say."""

    k: Fp8Experts
    plan: PlanArgs
    gate: Gate
    recipe: Fp8Recipe


def _parsed(x: Tensor, intermediate: int, rest: tuple[Any, ...]) -> _Call:
    plan, static, (scale, saved, wgrad) = PlanArgs(*rest[:8]), StaticArgs(*rest[8:14]), rest[14:17]
    choice = registry.choose_fp8(x.device, hidden=x.shape[1], intermediate=intermediate, backend=static.backend)
    return _Call(registry.fp8_kernels(choice.name), plan, static.gate(), _recipe(scale, saved, wgrad))


@functools.cache
def _recipe(scale: Any, save_preactivation: Any, wgrad: Any) -> Fp8Recipe:
    """Checked once, not in every call."""
    return Fp8Recipe(scale=scale, save_preactivation=save_preactivation, wgrad=wgrad)


@torch.library.impl("supersonic_moe::quantize_weights", ("cpu", "cuda"))
def _quantize_weights(weights: list[Tensor], scale: str, backend: str) -> list[Tensor]:
    """(q, q transposed, scale) of each weight in a row."""
    _, n, k = weights[0].shape
    choice = registry.choose_fp8(weights[0].device, hidden=k, intermediate=n, backend=backend)
    quantised = registry.fp8_kernels(choice.name).quantize_weights(weights, scale == "pow2")
    return [t for q_ENK, q_EKN, scale_ENK in quantised for t in (q_ENK, q_EKN, scale_ENK.contiguous())]


@torch.library.impl("supersonic_moe::experts_fp8_forward", ("cpu", "cuda"))
def _forward(
    x: Tensor,
    scores: Tensor,
    w1_q: Tensor,
    w1_scale: Tensor,
    b1: Tensor | None,
    w2_q: Tensor,
    w2_scale: Tensor,
    b2: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, plan, gate, recipe = _parsed(x, w2_q.shape[2], rest)
    save = rest[-1]
    with without_autocast(x):
        x_rows = Rows(k.quantize_rows(x, recipe.pow2, plan.identity), plan.read_index)
        z, a = k.up_projection_fp8(x_rows, Quantized(w1_q, w1_scale), b1, plan.groups, gate, recipe, save)
        y_PH = k.grouped_mm_fp8(Rows(a), Quantized(w2_q, w2_scale), plan.expert_offsets)
        del x_rows, a
        s_P = k.pick(scores, plan.scatter_index)
        out_TH = k.gather_sum(y_PH, s_P, b2, plan.row_expert, plan.rows_of_tokens(x.shape[0]))
    return out_TH, *z, s_P


@torch.library.impl("supersonic_moe::experts_fp8_backward", ("cpu", "cuda"))
def _backward(
    dout: Tensor,
    h: Tensor,
    z_scale: Tensor,
    needs: list[bool],
    main_w1: Tensor | None,
    main_w2: Tensor | None,
    x: Tensor,
    s_P: Tensor,
    w1_q: Tensor | None,
    w1_transposed: Tensor,
    w1_scale: Tensor,
    b1: Tensor | None,
    w2_transposed: Tensor,
    w2_scale: Tensor,
    b2: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    k, plan, gate, recipe = _parsed(x, w2_transposed.shape[1], rest)
    need_x, need_s, need_w1, need_b1, need_w2, need_b2 = needs
    dx = dscores = dw1 = db1 = dw2 = db2 = None
    index, offsets = plan.read_index, plan.expert_offsets
    dout_rows = Rows(dout, index)
    in_fp8 = recipe.wgrad == "fp8"

    def product_fp8(columns: Quantized, tiles: Quantized, main: Tensor | None, transposed: bool) -> Tensor:
        return k.grouped_mm_wgrad_fp8(
            columns, tiles, segments.offsets, main, transposed=transposed, accumulate=main is not None
        )

    def product_bf16(a: Rows[Tensor], b: Tensor, main: Tensor | None, transposed: bool) -> Tensor:
        return k.grouped_mm_wgrad(a, b, offsets, main, transposed=transposed, accumulate=main is not None)

    with without_autocast(x):
        if recipe.save_preactivation == "recompute":
            assert w1_q is not None
            x_rows = Rows(k.quantize_rows(x, recipe.pow2, plan.identity), index)
            h = k.grouped_mm_fp8(x_rows, Quantized(w1_q, w1_scale), offsets)
            del x_rows
        to_down = (
            Rows(k.quantize_rows(dout, recipe.pow2, plan.identity), index),
            Quantized(w2_transposed, w2_scale.mT),
            Quantized(h, z_scale),
            *(b1, s_P, plan.groups, gate),
        )
        if in_fp8 and (need_w1 or need_w2):
            capacity = padded_capacity(plan.gather_index.shape[0], offsets.shape[0] - 1)
            segments = k.pad_segments(offsets, plan.gather_index, capacity)
        quantised = in_fp8 and need_w1 and need_w2 and not (need_b1 and b1 is not None)  # db1 sums dH itself
        if not quantised:
            dz_PN, as_PI, ds_P = k.down_backward_fp8(*to_down)
        else:
            (dz, dz_tiles), as_tiles, ds_P = k.down_backward_fp8_quantised(*to_down, segments, recipe.pow2)
        del h, z_scale, to_down
        if need_s:
            if b2 is not None:
                k.row_dot(dout_rows, b2, plan.row_expert, ds_P)
            dscores = k.pick(ds_P, plan.reverse_index, s_P.dtype)
        if need_w2:
            if in_fp8:
                dout_columns = k.quantize_columns(dout, segments.token_index, recipe.pow2)
                if not quantised:
                    as_tiles = k.quantize_columns(as_PI, segments.row_index, recipe.pow2, tiled=True)
                dw2 = product_fp8(dout_columns, as_tiles, main_w2, transposed=False)
                del dout_columns, as_tiles
            else:
                dw2 = product_bf16(dout_rows, as_PI, main_w2, transposed=False)
        if not quantised:
            del as_PI
        if need_b2 and b2 is not None:
            db2 = k.segment_sum(dout_rows, s_P, offsets).to(b2.dtype)
        if need_b1 and b1 is not None:
            db1 = k.segment_sum(Rows(dz_PN), None, offsets).to(b1.dtype)
        if in_fp8 and need_w1 and not quantised:
            dz, dz_tiles = k.quantize_tiles(dz_PN, segments.row_index, recipe.pow2)
        elif need_x and not quantised:
            dz = k.quantize_rows(dz_PN, recipe.pow2, True)
        if need_w1:
            if in_fp8:
                x_columns = k.quantize_columns(x, segments.token_index, recipe.pow2)
                dw1 = product_fp8(x_columns, dz_tiles, main_w1, transposed=True)
                del dz_tiles, x_columns
            else:
                dw1 = product_bf16(Rows(x, index), dz_PN, main_w1, transposed=True)
        if not quantised:
            del dz_PN
        if need_x:
            dx_PH = k.grouped_mm_fp8(Rows(dz), Quantized(w1_transposed, w1_scale.mT), offsets)
            dx = k.gather_sum(dx_PH, None, None, plan.row_expert, plan.rows_of_tokens(x.shape[0]))
    dw1, dw2 = (None if main is not None else dw for main, dw in ((main_w1, dw1), (main_w2, dw2)))
    return gradients_or_empty(x, dx, dscores, dw1, db1, dw2, db2)


# ---- what the compiler knows of the ops ------------------------------------------------------------------------------


@torch.library.register_fake("supersonic_moe::quantize_weights")  # type: ignore[untyped-decorator]
def _quantize_weights_fake(weights: list[Tensor], scale: str, backend: str) -> list[Tensor]:
    quantised = []
    for w in weights:
        e, n, k = w.shape
        scales = w.new_empty(e, blocks(n), blocks(k), dtype=torch.float32)
        quantised += [empty_e4m3(w, e, n, k), empty_e4m3(w, e, k, n), scales]
    return quantised


@torch.library.register_fake("supersonic_moe::experts_fp8_forward")  # type: ignore[untyped-decorator]
def _forward_fake(x: Tensor, scores: Tensor, w1_q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gather_index, saved, save = rest[6], rest[-3], rest[-1]
    rows, n1 = gather_index.shape[0], w1_q.shape[1]
    out, s_P = x.new_empty(x.shape), scores.new_empty(rows)
    if save and saved == "fp8":
        return out, empty_e4m3(x, rows, n1), empty_scales(x, rows, blocks(n1), True), s_P
    h = x.new_empty(rows if save and saved == "bf16" else 0, n1)
    return out, h, x.new_empty(0, blocks(n1), dtype=torch.float32), s_P


@torch.library.register_fake("supersonic_moe::experts_fp8_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    dout: Tensor,
    h: Tensor,
    z_scale: Tensor,
    needs: list[bool],
    main_w1: Tensor | None,
    main_w2: Tensor | None,
    x: Tensor,
    s_P: Tensor,
    w1_q: Tensor | None,
    w1_transposed: Tensor,
    w1_scale: Tensor,
    b1: Tensor | None,
    w2_transposed: Tensor,
    w2_scale: Tensor,
    b2: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dw1, dw2 = x.new_empty(w1_transposed.mT.shape), x.new_empty(w2_transposed.mT.shape)
    dscores = s_P.new_empty(PlanArgs(*rest[:8]).reverse_index.shape)
    outputs = (x, dscores, None if main_w1 is not None else dw1, b1, None if main_w2 is not None else dw2, b2)
    wanted = [t if need else None for t, need in zip(outputs, needs, strict=True)]
    return gradients_or_empty(x, *(None if t is None else t.new_empty(t.shape) for t in wanted))


# ---- autograd --------------------------------------------------------------------------------------------------------


class ExpertsFp8(torch.autograd.Function):
    """Autograd around the two ops. ``forward(x, scores, w1, b1, w2, b2, q1, q2, plan, static, owners)``: w1 and w2 get
    the gradients, ``q1`` and ``q2`` (:class:`Fp8Weight`) are what is multiplied; tuples from plan_args and
    static_fp8_args; ``owners``: w1 and w2 as the caller passed them, if their main_grad gets dW1 and dW2.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, scores, _w1, b1, _w2, b2, q1, q2, plan, static, _ = args
        weights = (q1[0], q1[2], b1, q2[0], q2[2], b2)
        op = torch.ops.supersonic_moe.experts_fp8_forward.default
        out: tuple[Tensor, Tensor, Tensor, Tensor] = op(x, scores, *weights, *plan, *static, True)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        x, _, w1, b1, w2, b2, q1, q2, plan, static, owners = inputs
        _, h, z_scale, s_P = output
        ctx.mark_non_differentiable(h, z_scale, s_P)
        ctx.set_materialize_grads(False)
        ctx.kept = q1[1] is not None
        recomputes = static[-2] == "recompute"
        # (q of w1 or None, transposed w1, its scale, transposed w2, its scale), or the weights themselves
        weights = (q1[0] if recomputes else None, *q1[1:], *q2[1:]) if ctx.kept else (w1, w2, None, None, None)
        ctx.save_for_backward(h, z_scale, x, s_P, b1, b2, *weights, *plan[:-1])
        ctx.identity, ctx.static = plan[-1], static
        ctx.owners = owners  # the objects themselves: saved tensors may come back without attributes

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 11
        needs = list(ctx.needs_input_grad[:6])
        mains = main_grads(ctx.owners, needs)
        h, z_scale, x, s_P, b1, b2, *tensors = ctx.saved_tensors
        (w1_q, w1_t, w1_scale, w2_t, w2_scale), plan = tensors[:5], (*tensors[5:], ctx.identity)
        if not ctx.kept:
            scale, backend = ctx.static[-3], ctx.static[5]
            op = torch.ops.supersonic_moe.quantize_weights.default
            w1_q, w1_t, w1_scale, _, w2_t, w2_scale = op(tensors[:2], scale, backend)
        weights = (w1_q, w1_t, w1_scale, b1, w2_t, w2_scale, b2)
        grads: list[Tensor | None] = list(
            torch.ops.supersonic_moe.experts_fp8_backward.default(
                dout.contiguous(), h, z_scale, needs, *mains, x, s_P, *weights, *plan, *ctx.static
            )
        )
        grads[2], grads[4] = stand_ins(ctx.owners, mains, grads[2], grads[4], x.dtype)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None


def static_fp8_args(
    activation: Activation, layout: GateUpLayout, backend: str, recipe: Fp8Recipe
) -> tuple[object, ...]:
    return *static_args(activation, layout, backend), recipe.scale, recipe.save_preactivation, recipe.wgrad


def quantized_weights(
    w1: Tensor, w2: Tensor, passed: tuple[Tensor, Tensor], recipe: Fp8Recipe, backend: str, cache: WeightCache | None
) -> tuple[Fp8Weight, Fp8Weight]:
    """Both weights in FP8. ``passed``: them as the caller holds them, w1 and w2 may be copies that autocast made."""

    weights = w1.detach(), w2.detach()

    def quantize(which: Sequence[int]) -> list[Fp8Weight]:
        flat = torch.ops.supersonic_moe.quantize_weights.default([weights[i] for i in which], recipe.scale, backend)
        kept = recipe.keep_transposed
        return [Fp8Weight(flat[i], flat[i + 1] if kept else None, flat[i + 2]) for i in range(0, len(flat), 3)]

    if cache is None:
        first, second = quantize((0, 1))
    else:
        first, second = cache.get(passed, (w1.dtype, recipe.scale, recipe.keep_transposed, backend), quantize)
    return first, second


def run_experts_fp8(
    x_TH: Tensor,
    scores_S: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    plan: RoutingPlan,
    activation: Activation,
    layout: GateUpLayout,
    recipe: Fp8Recipe,
    *,
    passed: tuple[Tensor, Tensor],
    cache: WeightCache | None,
    backend: str,
    inference: bool,
    accumulate: bool,
) -> Tensor:
    """(T, H) output of the experts. Nothing is saved in inference mode or where no input requires a gradient.
    ``passed``: see :func:`quantized_weights`; ``accumulate``: add their gradients to their ``main_grad``.
    """
    static = static_fp8_args(activation, layout, backend, recipe)
    q1, q2 = quantized_weights(w1, w2, passed, recipe, backend, cache)
    operands = (x_TH, scores_S, w1, b1, w2, b2)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if inference or not grad:
        x, scores, _, c1, _, c2 = (None if t is None else t.detach() for t in operands)
        weights = (q1.q, q1.scale, c1, q2.q, q2.scale, c2)
        op = torch.ops.supersonic_moe.experts_fp8_forward.default
        out: Tensor = op(x, scores, *weights, *plan_args(plan), *static, False)[0]
        return out
    owners = passed if accumulate else None
    out = apply(ExpertsFp8, *operands, q1, q2, plan_args(plan), static, owners)[0]
    return out
