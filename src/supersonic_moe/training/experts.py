"""Forward and backward of the expert MLPs as a list of kernel calls, after SonicMoE (arXiv 2512.14080 §3).

    forward                                          backward (s: router score of the row, dO gathered like X)
    X~ = gather(x)                                   dA  = dO~ W2              before the score
    H  = X~ W1^T            saved                    A   = act(H + b1)         recomputed, never saved
    A  = act(H + b1)                                 dS  = <dA, A> + <dO~, b2> = <dO~, Y>, so Y need not be saved
    Y  = A W2^T                                      dH  = act'(H + b1) * (s dA)
    O  = sum over the token's rows of s (Y + b2)     dW2 = dO~^T (s A)         dW1 = dH^T X~
                                                     db1, db2: sums over rows
                                                     dx  = sum over the token's rows of dH W1

Saved for backward: x, H, s and the plan: 2 T H + 2 R N1 bytes in BF16 (= 2TH + 4RI when gated). FLOPs: 6 R H I
forward and 12 R H I backward (gated). A tilde marks rows read through an index: the sm_90 kernels do that inside their
loads, so that neither X~ nor dO~ nor dA exists in memory; other backends copy.

dW1 and dW2 are returned, or added to the caller's fp32 buffers (``training/main_grad.py``).

The pair of custom ops below is opaque to ``torch.compile``; autograd is attached outside, in :class:`Experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supersonic_moe.autograd import apply
from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Experts as ExpertKernels
from supersonic_moe.kernels.interface import Rows
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

# One argument list, shared by both ops: operands, the plan's tensors, then what is static. Scores are those of the
# slots in forward, and those of the rows in backward.
_OPERANDS = "Tensor x, Tensor scores, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2"

torch.library.define(
    "supersonic_moe::experts_forward",
    f"({_OPERANDS}, {PLAN_SCHEMA}, {STATIC_SCHEMA}, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "supersonic_moe::experts_backward",
    f"(Tensor dout, Tensor h, bool[6] needs, Tensor(a!)? main_w1, Tensor(b!)? main_w2, {_OPERANDS}, {PLAN_SCHEMA}, "
    f"{STATIC_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _kernels(x: Tensor, w2: Tensor, backend: str) -> ExpertKernels:
    choice = registry.choose(x.device, x.dtype, hidden=w2.shape[1], intermediate=w2.shape[2], backend=backend)
    return registry.kernels(choice.name).experts


@torch.library.impl("supersonic_moe::experts_forward", ("cpu", "cuda"))
def _forward(
    x: Tensor, scores: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    plan, static, save = PlanArgs(*rest[:8]), StaticArgs(*rest[8:14]), rest[14]
    k = _kernels(x, w2, static.backend)
    with without_autocast(x):
        z_PN, a_PI = k.up_projection(Rows(x, plan.read_index), w1, b1, plan.groups, static.gate(), save)
        y_PH = k.grouped_mm(Rows(a_PI), w2.transpose(1, 2), plan.expert_offsets)
        del a_PI
        s_P = k.pick(scores, plan.scatter_index)
        out_TH = k.gather_sum(y_PH, s_P, b2, plan.row_expert, plan.rows_of_tokens(x.shape[0]))
    return out_TH, z_PN, s_P


@torch.library.impl("supersonic_moe::experts_backward", ("cpu", "cuda"))
def _backward(
    dout: Tensor,
    h: Tensor,
    needs: list[bool],
    main_w1: Tensor | None,
    main_w2: Tensor | None,
    x: Tensor,
    s_P: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    plan, static = PlanArgs(*rest[:8]), StaticArgs(*rest[8:])
    k = _kernels(x, w2, static.backend)
    need_x, need_s, need_w1, need_b1, need_w2, need_b2 = needs
    dx = dscores = dw1 = db1 = dw2 = db2 = None
    index, offsets = plan.read_index, plan.expert_offsets
    dout_rows = Rows(dout, index)

    def weight_gradient(a: Rows[Tensor], b: Tensor, main: Tensor | None, transposed: bool) -> Tensor | None:
        added = main is not None
        dw = k.grouped_mm_wgrad(a, b, offsets, main, transposed=transposed, accumulate=added)
        return None if added else dw

    with without_autocast(x):
        dz_PN, as_PI, ds_P = k.down_backward(dout_rows, w2, h, b1, s_P, plan.groups, static.gate())
        if need_s:
            if b2 is not None:
                k.row_dot(dout_rows, b2, plan.row_expert, ds_P)
            dscores = k.pick(ds_P, plan.reverse_index, s_P.dtype)
        if need_w2:
            dw2 = weight_gradient(dout_rows, as_PI, main_w2, transposed=False)
        del as_PI
        if need_b2 and b2 is not None:
            db2 = k.segment_sum(dout_rows, s_P, offsets).to(b2.dtype)
        if need_b1 and b1 is not None:
            db1 = k.segment_sum(Rows(dz_PN), None, offsets).to(b1.dtype)
        if need_w1:
            dw1 = weight_gradient(Rows(x, index), dz_PN, main_w1, transposed=True)
        if need_x:
            dx_PH = k.grouped_mm(Rows(dz_PN), w1, offsets)
            dx = k.gather_sum(dx_PH, None, None, plan.row_expert, plan.rows_of_tokens(x.shape[0]))
    return gradients_or_empty(x, dx, dscores, dw1, db1, dw2, db2)


@torch.library.register_fake("supersonic_moe::experts_forward")  # type: ignore[untyped-decorator]
def _forward_fake(x: Tensor, scores: Tensor, w1: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, save = rest[4].shape[0], rest[-1]
    return x.new_empty(x.shape), x.new_empty(rows if save else 0, w1.shape[1]), scores.new_empty(rows)


@torch.library.register_fake("supersonic_moe::experts_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    dout: Tensor,
    h: Tensor,
    needs: list[bool],
    main_w1: Tensor | None,
    main_w2: Tensor | None,
    x: Tensor,
    s_P: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    inputs = (x, s_P.new_empty(PlanArgs(*rest[:8]).reverse_index.shape), w1, b1, w2, b2)
    added = (False, False, main_w1 is not None, False, main_w2 is not None, False)
    wanted = [t if need and not add else None for t, need, add in zip(inputs, needs, added, strict=True)]
    return gradients_or_empty(x, *(None if t is None else t.new_empty(t.shape) for t in wanted))


class Experts(torch.autograd.Function):
    """Autograd around the two ops. ``forward(x, scores, w1, b1, w2, b2, plan, static, owners)`` with tuples from
    plan_args and static_args; ``owners``: w1 and w2 as the caller passed them, if their main_grad gets dW1 and dW2.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *operands, plan, static, _ = args
        op = torch.ops.supersonic_moe.experts_forward.default
        out: tuple[Tensor, Tensor, Tensor] = op(*operands, *plan, *static, True)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, _, *weights, plan, static, owners = inputs
        _, h, s_P = output
        ctx.mark_non_differentiable(h, s_P)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, x, s_P, *weights, *plan[:-1])
        ctx.identity, ctx.static = plan[-1], static
        ctx.owners = owners  # the objects themselves: saved tensors may come back without attributes

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 9
        needs = list(ctx.needs_input_grad[:6])
        mains = main_grads(ctx.owners, needs)
        h, *tensors = ctx.saved_tensors  # may recompute forward, so look for what is missing first
        grads: list[Tensor | None] = list(
            torch.ops.supersonic_moe.experts_backward.default(
                dout.contiguous(), h, needs, *mains, *tensors, ctx.identity, *ctx.static
            )
        )
        grads[2], grads[4] = stand_ins(ctx.owners, mains, grads[2], grads[4], tensors[0].dtype)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


def run_experts(
    x_TH: Tensor,
    scores_S: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    plan: RoutingPlan,
    activation: Activation,
    layout: GateUpLayout,
    *,
    backend: str,
    inference: bool,
    owners: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(T, H) output of the experts. Nothing is saved in inference mode or where no input requires a gradient.
    ``owners``: see :class:`Experts`.
    """
    static = static_args(activation, layout, backend)
    operands = (x_TH, scores_S, w1, b1, w2, b2)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if inference or not grad:
        detached = (None if t is None else t.detach() for t in operands)
        out: Tensor = torch.ops.supersonic_moe.experts_forward.default(*detached, *plan_args(plan), *static, False)[0]
        return out
    out = apply(Experts, *operands, plan_args(plan), static, owners)[0]
    return out
