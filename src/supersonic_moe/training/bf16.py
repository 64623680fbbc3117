"""Forward and backward of the expert MLPs as a list of kernel calls, after SonicMoE (arXiv 2512.14080 §3).

    forward                                          backward (s: router score of the row, dO gathered like X)
    X~ = gather(x)                                   dA  = dO~ W2              before the score
    Z  = X~ W1^T            saved                    A   = act(Z + b1)         recomputed, never saved
    A  = act(Z + b1)                                 dS  = <dA, A> + <dO~, b2> = <dO~, Y>, so Y need not be saved
    Y  = A W2^T                                      dZ  = act'(Z + b1) * (s dA)
    O  = sum over the token's rows of s (Y + b2)     dW2 = dO~^T (s A)         dW1 = dZ^T X~
                                                     db1, db2: sums over rows
                                                     dx  = sum over the token's rows of dZ W1

Saved for backward: x, Z, s and the plan: 2 T H + 2 R N1 bytes in BF16 (= 2TH + 4RI when gated). FLOPs: 6 R H I
forward and 12 R H I backward (gated). A tilde marks rows read through an index: the sm_90 kernels do that inside their
loads, so that neither X~ nor dO~ nor dA exists in memory; other backends copy.

dW1 and dW2 are returned, or go to the caller's buffers (``training/main_grad.py``). Arguments and results:
``training/arguments.py``; ``k``: ``kernels/interface.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from supersonic_moe.kernels.alignment import is_turned, weight_gradient
from supersonic_moe.kernels.interface import Arrivals, DownBackward, Experts, Into, Rows, UpProjection
from supersonic_moe.training.arguments import Bf16Forward, Bf16Output, Bf16Saved, Incoming, Inputs


def forward(k: Experts, call: Bf16Forward) -> Bf16Output:
    x, plan = Rows(call.x, call.plan.read_index), call.plan
    z_PN, a_PI = k.up_projection(
        UpProjection(x, call.w1, call.b1, plan.expert_offsets, plan.row_expert, call.static.gate(), call.save)
    )
    y_PH = k.grouped_mm(Rows(a_PI), call.w2.mT, plan.expert_offsets)
    del a_PI
    s_P = k.pick(call.scores, plan.scatter_index, score_dtype(call.x.dtype))
    out_TH = k.gather_sum(y_PH, s_P, call.b2, plan.row_expert, plan.rows_of_tokens(call.x.shape[0]))
    return Bf16Output(out_TH, s_P, z_PN)


def backward(
    k: Experts,
    saved: Bf16Saved,
    incoming: Incoming,
    arriving: Arrivals | None = None,
    leave: Callable[[Tensor | None], None] | None = None,
) -> Inputs[Tensor | None]:
    """``arriving``: rows of dO that come while the first product runs. ``leave(dx)`` is called as soon as dx is there:
    before the weight gradients, which hide what it starts, and while s A is kept.
    """
    plan, needs, main, s_P, b1, b2 = saved.plan, incoming.needs, incoming.main, saved.row_scores, saved.b1, saved.b2
    x, dout, offsets = Rows(saved.x, plan.read_index), Rows(incoming.dout, plan.read_index), plan.expert_offsets
    dx = dscores = dw1 = db1 = dw2 = db2 = None

    dz_PN, as_PI, ds_P = k.down_backward(
        DownBackward(dout, saved.w2, saved.z, b1, s_P, offsets, plan.row_expert, saved.static.gate()),
        arriving,
    )
    if needs.scores:
        if b2 is not None:
            k.row_dot(dout, b2, plan.row_expert, ds_P)
        dscores = k.pick(ds_P, plan.reverse_index, s_P.dtype)
    if leave is not None:
        dx = _dx(k, dz_PN, saved) if needs.x else None
        leave(dx)
    if needs.w2:
        into = Into(main.w2, accumulate=main.adds_w2)
        dw2 = weight_gradient(is_turned(saved.w2), into, partial(k.grouped_mm_wgrad, dout, as_PI, offsets))
    del as_PI
    if needs.b2 and b2 is not None:
        db2 = rounded(k.segment_sum(dout, s_P, offsets), b2)
    if needs.b1 and b1 is not None:
        db1 = rounded(k.segment_sum(Rows(dz_PN), None, offsets), b1)
    if needs.w1:
        into = Into(main.w1, transposed=True, accumulate=main.adds_w1)
        dw1 = weight_gradient(is_turned(saved.w1), into, partial(k.grouped_mm_wgrad, x, dz_PN, offsets))
    if leave is None and needs.x:
        dx = _dx(k, dz_PN, saved)
    return Inputs(dx, dscores, dw1, db1, dw2, db2)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which kernels read the scores of tokens in ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _dx(k: Experts, dz_PN: Tensor, saved: Bf16Saved) -> Tensor:
    plan = saved.plan
    dx_PH = k.grouped_mm(Rows(dz_PN), saved.w1, plan.expert_offsets)
    return k.gather_sum(dx_PH, None, None, plan.row_expert, plan.rows_of_tokens(saved.x.shape[0]))


def rounded(sums_EN: Tensor, bias_EN: Tensor) -> Tensor:
    """In the dtype of the bias, in memory that is there before: a tape (``jit/tape.py``) can hold that."""
    if sums_EN.dtype is bias_EN.dtype:
        return sums_EN
    return sums_EN.new_empty(sums_EN.shape, dtype=bias_EN.dtype).copy_(sums_EN)
