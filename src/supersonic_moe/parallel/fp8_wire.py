"""FP8 experts fed by an FP8 wire: x and dout are quantized at home, one byte an element crosses, and products read it.

    forward    q(x) at T rows -> codes (T, H) e4m3; scales (T, H/128), ids and scores in one message
               experts on the codes; partial outputs back in BF16
    backward   q(dout) likewise; partial dx back in BF16, dscores; copies between GPUs run beside dW2 and dW1

Codes and scales are those that the experts would have made of BF16 rows: outputs, dx and, without biases, dscores have
the same bits as over a BF16 wire. Weight gradients scale x and dout along tokens, so those are rounded twice, which is
free where scales are powers of two. Relative errors of dW1 and dW2 on Gaussian data, bound 8 %:

    scale, wgrad     BF16 wire        FP8 wire
    pow2, fp8        7.43   7.84      7.43   7.84
    fp32, fp8        7.23   7.61      7.69   8.07      refused
    fp32, bf16       6.24   6.68      6.76   7.17
    pow2, bf16       6.38   6.85      6.92   7.34

Kept for backward: the codes, one byte an element instead of two; those at home, with ``keep_received=False``.

A function of its own around the whole way, because autograd would cast the gradient of a float8 tensor to float8.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.autocast import without_autocast
from supersonic_moe.autograd import apply, refuse_second_derivatives
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.functional import CheckedExperts
from supersonic_moe.kernels.alignment import aligned, is_turned
from supersonic_moe.kernels.interface import Fp8Experts, Quantized, Rows, UpProjection
from supersonic_moe.parallel import beside, ranges
from supersonic_moe.parallel.trip import Trip
from supersonic_moe.quantization.block_format import E4M3, aligned_rows
from supersonic_moe.routing.plan import plan_from_topk
from supersonic_moe.training import fp8
from supersonic_moe.training.arguments import (
    Fp8Forward,
    Fp8Saved,
    Fp8Weights,
    Incoming,
    Inputs,
    Numerics,
    Plan,
    Static,
    Weight,
)
from supersonic_moe.training.fields import Fields, on_flat
from supersonic_moe.training.main_grad import Targets, targets_of
from supersonic_moe.training.ops import fp8_kernels, quantized, with_fp8_copies

DTYPES = {
    "fp8": "in e4m3",
    "exact": "in their own dtype",
    "auto": "in e4m3 where an FP8 layer loses nothing by it, else in their own dtype",
}


def is_free(recipe: object, x_TH: Tensor) -> bool:
    """Whether an FP8 wire costs a layer no accuracy: see the table."""
    free = isinstance(recipe, Fp8Recipe) and recipe.scale == "pow2" and recipe.wgrad == "fp8"
    return free and x_TH.dtype is torch.bfloat16


class _Beside(NamedTuple):
    """How the rows of a call travel beside its products."""

    way: beside.Way
    parts: ranges.Parts


class _Call(NamedTuple):
    """What a call knows beside its tensors."""

    trip: Trip
    rows: int | None
    """Of this rank's experts, where the host knows."""
    keeps: bool
    """Whether codes that arrived are kept for backward, or sent once more."""
    into_main_grad: bool
    static: Static
    numerics: Numerics


def experts(
    e: CheckedExperts, scores_TK: Tensor, ids_TK: Tensor, trip: Trip, rows: int | None, *, keeps: bool
) -> Tensor:
    """(T, H): dispatch, experts and combine. ``e``: x, and the experts here; ``ids`` int32 of all experts; ``rows`` of
    those here, where the host knows.
    """
    o = e.options
    assert isinstance(o.recipe, Fp8Recipe)
    pair = with_fp8_copies(e.w1, e.w2, o.recipe, o.backend, o.weight_cache)
    static = Static.of(o.activation, o.layout, o.backend)
    call = _Call(trip, rows, keeps, o.accumulate_into_main_grad, static, Numerics.of(o.recipe))
    operands = (e.x, scores_TK, e.w1.value, e.b1, e.w2.value, e.b2)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        out: Tensor = apply(_Experts, *operands, ids_TK, pair, call)
        return out
    with torch.no_grad():
        return _forward(operands, ids_TK, pair, call, save=False)[0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *operands, ids_TK, (w1, w2), call = args
        out_TH, x, saved, ctx.beside = _forward(operands, ids_TK, (w1, w2), call, save=True)
        tensors, ctx.others = _SAVED.split(*saved)
        ctx.again = w1.fp8.transposed is None  # the copies are made again in backward
        weights = (w1.value, w2.value)
        if not ctx.again:
            weights = _WEIGHTS.flat(*Fp8Weights.of(w1.fp8, w2.fp8, call.numerics))
        ctx.save_for_backward(x.scale, *weights, *tensors)
        ctx.are_tensors = [t is not None for t in operands]
        ctx.call, ctx.parameters = call, (w1.parameter, w2.parameter)
        return out_TH

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        *needed, _ids, _pair, _call = ctx.needs_input_grad
        needs, targets, parameters = Inputs(*needed), Targets(), ctx.parameters
        if call.into_main_grad:
            needs, targets = targets_of(parameters, needs, ctx)
        main = targets.of_kernels()
        x_scale, *tensors = ctx.saved_tensors
        if ctx.again:
            w1, w2, *tensors = tensors
            q1, q2 = quantized([w1.detach(), w2.detach()], call.numerics.scale, call.static.backend)
            tensors = [*_WEIGHTS.flat(*Fp8Weights.of(q1, q2, call.numerics)), *tensors]
        weights, saved = _named(*tensors, *ctx.others)
        k, trip = fp8_kernels(dout_TH, weights.w2_transposed.shape[1], call.static), call.trip
        if not call.keeps:
            saved = saved._replace(x=_codes(trip, "backward dispatch", saved.x))
        home = k.quantize_rows(dout_TH.contiguous(), call.numerics.scale == "pow2")
        dout_q, dout, arriving = _dout_received(k, trip, ctx.beside, home)
        x_q = Quantized(aligned_rows(saved.x), x_scale)
        saved = aligned(saved._replace(x=k.dequantize_rows(x_q) if needs.w1 else saved.x), k.ALIGNMENT, "b1")
        incoming = Incoming(dout, needs, main)
        with torch.no_grad(), without_autocast(dout_TH):
            way = beside.WayBack(trip)
            found = fp8.backward(k, weights, saved, incoming, x_q, dout_q, arriving, way.leave)
            dx, dscores = way.arrived(found.x, found.scores)
        grads: list[Tensor | None] = [*found._replace(x=dx, scores=dscores)]
        targets.finish(grads, parameters, dout.dtype)
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        if torch.is_grad_enabled():  # create_graph
            grads = refuse_second_derivatives(_ONCE, grads, (dout_TH, *tensors, *parameters))
        return *grads, None, None, None


_ONCE = 'second derivatives of the experts do not exist over an FP8 wire. Use wire="exact" with Bf16Recipe().'
_SAVED, _WEIGHTS = Fields(Fp8Saved), Fields(Fp8Weights)
_named = on_flat(lambda *groups: groups, _WEIGHTS, _SAVED)


def _forward(
    operands: Any, ids_TK: Tensor, pair: tuple[Weight, Weight], call: _Call, *, save: bool
) -> tuple[Tensor, Quantized, Fp8Saved, _Beside | None]:
    """(out (T, H), received x, what backward reads, how the rows travelled)."""
    x_TH, scores_TK, w1_ENH, b1, w2_EHI, b2 = operands
    (w1, w2), trip, k = pair, call.trip, fp8_kernels(x_TH, w2_EHI.shape[2], call.static)
    with without_autocast(x_TH):
        codes_TH, scale_TB = k.quantize_rows(x_TH, call.numerics.scale == "pow2")
        way = beside.Way.of(trip, codes_TH.view(torch.uint8), x_TH, ids_TK.shape[1])
        ids_UK, scores_UK, scale_UB = trip.send_choices("forward dispatch", ids_TK, scores_TK, scale_TB)
        if way is None:
            codes_UH = _codes(trip, "forward dispatch", codes_TH)
        else:
            bytes_UH, there_P = way.arrive(codes_TH.view(torch.uint8), "forward dispatch")
            codes_UH = bytes_UH.view(E4M3)
        plan = Plan.of(plan_from_topk(ids_UK, trip.experts_here, capacity=call.rows))
        x_q, scores_S = Quantized(codes_UH, scale_UB), scores_UK.reshape(-1)
        w1_q, w2_q = Quantized(w1.fp8.q, w1.fp8.scale), Quantized(w2.fp8.q, w2.fp8.scale)
        forward = Fp8Forward(codes_UH, scores_S, w1_q, b1, w2_q, b2, plan, call.static, call.numerics, save)
        forward = aligned(forward, k.ALIGNMENT, "b1")
        found = None
        if way is None:
            part_UH, row_scores_P, z_PN = fp8.forward(k, forward, x_q)
            out_TH = trip.summed(trip.back("forward combine", part_UH))
        else:
            found = _Beside(way, way.parts(plan))
            out_TH, row_scores_P, z_PN = _forward_beside(k, forward, x_q, found, there_P)
    turned = is_turned(w1_ENH), is_turned(w2_EHI)
    codes = codes_UH if call.keeps else codes_TH
    saved = Fp8Saved(z_PN, codes, row_scores_P, b1, b2, plan, call.static, call.numerics, *turned)
    return out_TH, x_q, saved, found


def _forward_beside(
    k: Fp8Experts, call: Fp8Forward, x_q: Quantized, how: _Beside, there_P: Tensor | None
) -> tuple[Tensor, Tensor, Quantized]:
    """(out (T, H), scores of the rows (P,), Z): ``training.fp8.forward``, and what it gives brought home."""
    plan, offsets, way, parts = call.plan, call.plan.expert_offsets, how.way, how.parts
    x = Rows(x_q, plan.read_index)
    up = UpProjection(x, call.w1, call.b1, offsets, plan.row_expert, call.static.gate(), call.save)
    z, a = k.up_projection_fp8(up, call.numerics.recipe(), way.arrivals(parts, there_P))
    s_P = k.pick(call.scores, plan.scatter_index)
    like = x_q.scale.new_empty(0, call.x.shape[1], dtype=torch.bfloat16)
    out_TH = way.sums(k, parts, partial(k.grouped_mm_fp8, Rows(a), call.w2, offsets), s_P, call.b2, plan, like)
    return out_TH, s_P, z


def _dout_received(
    k: Fp8Experts, trip: Trip, how: _Beside | None, home: Quantized
) -> tuple[Quantized, Tensor, fp8.Arriving | None]:
    """(codes and scales, the same in bfloat16 (U, H), how they come if not all are there)."""
    phase, scale = "backward dispatch", home.scale.contiguous()
    if how is None:
        dout_q = Quantized(_codes(trip, phase, home.q), trip.send(phase, scale))
        return dout_q, k.dequantize_rows(dout_q), None
    scale_UB = trip.send(phase, scale)
    bytes_UH, there_P = how.way.arrive(home.q.view(torch.uint8), phase)
    dout_q = Quantized(bytes_UH.view(E4M3), scale_UB)
    dout_UH = torch.empty_like(bytes_UH, dtype=torch.bfloat16)
    return (
        dout_q,
        dout_UH,
        fp8.Arriving(how.way.arrivals(how.parts, there_P), lambda: k.dequantize_rows(dout_q, dout_UH)),
    )


def _codes(trip: Trip, phase: str, codes_TH: Tensor) -> Tensor:
    return trip.send(phase, beside.padded(codes_TH.view(torch.uint8))).view(E4M3)[:, : codes_TH.shape[1]]
