"""BF16 experts whose rows travel beside their products (``beside.py``), as one function around the whole way: what
``Dispatch``, ``training.experts.Experts`` and ``Combine`` compute one after the other, to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.autocast import without_autocast
from supersonic_moe.autograd import apply, refuse_second_derivatives
from supersonic_moe.config.recipe import Bf16Recipe
from supersonic_moe.functional import CheckedExperts
from supersonic_moe.kernels.alignment import aligned
from supersonic_moe.kernels.interface import Rows, UpProjection
from supersonic_moe.parallel import ranges
from supersonic_moe.parallel.beside import Way, WayBack
from supersonic_moe.parallel.trip import Trip
from supersonic_moe.routing.plan import plan_from_topk
from supersonic_moe.training import bf16
from supersonic_moe.training.arguments import Bf16Forward, Bf16Saved, Incoming, Inputs, Plan, Static
from supersonic_moe.training.fields import Fields, on_flat
from supersonic_moe.training.main_grad import Targets, targets_of
from supersonic_moe.training.ops import bf16_kernels
from supersonic_moe.training.options import Options


class _Call(NamedTuple):
    """What a call knows beside its tensors."""

    way: Way
    options: Options
    keeps: bool
    """Whether rows that arrived are kept for backward, or sent once more."""


def way_of(trip: Trip, x_TH: Tensor, top_k: int, options: Options) -> Way | None:
    """None where the rows of a call do not travel beside its products."""
    if not isinstance(options.recipe, Bf16Recipe) or x_TH.dtype not in (torch.bfloat16, torch.float16):
        return None
    return Way.of(trip, x_TH, x_TH, top_k)


def experts(e: CheckedExperts, scores_TK: Tensor, ids_TK: Tensor, way: Way, *, keeps: bool) -> Tensor:
    """(T, H): dispatch, experts and combine. ``e``: x, and the experts here; ``ids`` int32 of all experts."""
    operands = (e.x, scores_TK, e.w1.value, e.b1, e.w2.value, e.b2)
    call = _Call(way, e.options, keeps)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        out: Tensor = apply(_Experts, *operands, ids_TK, (e.w1.parameter, e.w2.parameter), call)
        return out
    with torch.no_grad():
        return _forward(operands, ids_TK, call, save=False)[0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *operands, ids_TK, ctx.parameters, ctx.call = args
        out_TH, saved, ctx.parts = _forward(operands, ids_TK, ctx.call, save=True)
        tensors, ctx.others = _SAVED.split(*saved)
        ctx.save_for_backward(*tensors)
        ctx.are_tensors = [t is not None for t in operands]
        return out_TH

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        *needed, _ids, _parameters, _call = ctx.needs_input_grad
        needs, targets = Inputs(*needed), Targets()
        if call.options.accumulate_into_main_grad:
            needs, targets = targets_of(ctx.parameters, needs, ctx)
        tensors = ctx.saved_tensors  # once: a checkpoint hands them out once a pass
        saved: Bf16Saved = _named(*tensors, *ctx.others)
        k, way, phase = bf16_kernels(saved.x, saved.w2, saved.static), call.way, "backward dispatch"
        with torch.no_grad(), without_autocast(dout_TH):
            if not call.keeps:
                saved = saved._replace(x=way.trip.send(phase, saved.x))
            dout_UH, there_P = way.arrive(dout_TH, phase)
            saved = aligned(saved, k.ALIGNMENT, "z", "x", "w1", "b1", "w2")
            back = WayBack(way.trip)
            incoming = Incoming(dout_UH, needs, targets.of_kernels())
            found = bf16.backward(k, saved, incoming, way.arrivals(ctx.parts, there_P), back.leave)
            dx, dscores = back.arrived(found.x, found.scores)
        grads: list[Tensor | None] = [*found._replace(x=dx, scores=dscores)]
        targets.finish(grads, ctx.parameters, dout_TH.dtype)
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        if torch.is_grad_enabled():  # create_graph
            grads = refuse_second_derivatives(_ONCE, grads, (dout_TH, *tensors, *ctx.parameters))
        return *grads, None, None, None


_ONCE = (
    "second derivatives of the experts do not exist across ranks. Leave create_graph out, or use a layer on one rank "
    "where its gradient is differentiated again."
)
_SAVED = Fields(Bf16Saved)
_named = on_flat(lambda saved: saved, _SAVED)


def _forward(operands: Any, ids_TK: Tensor, call: _Call, *, save: bool) -> tuple[Tensor, Bf16Saved, ranges.Parts]:
    """(out (T, H), what backward reads, the parts)."""
    x_TH, scores_TK, w1, b1, w2, b2 = operands
    way, trip, phase, o = call.way, call.way.trip, "forward dispatch", call.options
    static = Static.of(o.activation, o.layout, o.backend)
    k = bf16_kernels(x_TH, w2, static)
    with without_autocast(x_TH):
        ids_UK, scores_UK = trip.send_choices(phase, ids_TK, scores_TK)
        x_UH, there_P = way.arrive(x_TH, phase)
        plan = Plan.of(plan_from_topk(ids_UK, trip.experts_here))
        parts = way.parts(plan)
        forward = Bf16Forward(x_UH, scores_UK.reshape(-1), w1, b1, w2, b2, plan, static, save)
        forward = aligned(forward, k.ALIGNMENT, "w1", "b1", "w2")
        offsets = plan.expert_offsets
        up = UpProjection(
            Rows(x_UH, plan.read_index), forward.w1, forward.b1, offsets, plan.row_expert, static.gate(), save
        )
        z_PN, a_PI = k.up_projection(up, way.arrivals(parts, there_P))
        s_P = k.pick(forward.scores, plan.scatter_index, bf16.score_dtype(x_TH.dtype))
        product = partial(k.grouped_mm, Rows(a_PI), forward.w2.mT, offsets)
        del a_PI
        out_TH = way.sums(k, parts, product, s_P, b2, plan, x_TH)
    return out_TH, Bf16Saved(z_PN, x_UH if call.keeps else x_TH, s_P, w1, b1, w2, b2, plan, static), parts
