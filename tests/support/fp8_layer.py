"""The expert MLPs in FP8, forward and backward, as arithmetic: what the FP8 kernels of any backend must compute.

The dataflow is that of ``training/bf16.py``. Every operand of a GEMM passes through the format in which the kernels
hold it, and comes back as the numbers that format stands for; everything between two formats is exact in fp32 (fp64 for
fp64 inputs), with no rounding at stores. So the difference to the same layer in fp32 is what the formats cost, and the
difference of a GPU kernel to this file is what that kernel adds.

    q: through e4m3 1 x 128 (rows of activations), 128 x 128 (weights), or 1 x 128 along tokens (columns: q_T)

    forward                                        backward
    Z  = gather(q(x)) q(W1)^T                      dA  = gather(q(dO)) q(W2)
    A  = act(Z + b1)                               dS  = <dA, A> + <dO~, b2>     A from the saved Z: q(Z), bf16(Z) or Z
    Y  = q(A) q(W2)^T                              dZ  = act'(Z + b1) * (s dA)
    O  = sum over the token's rows of s (Y + b2)   dW2 = q_T(dO~)^T q_T(s A)     dW1 = q_T(dZ)^T q_T(X~)
                                                   db1, db2: sums over rows of dZ and s dO~
                                                   dx  = sum over the token's rows of q(dZ) q(W1)

x and dO are quantized once, at T rows; their transposed copies come from x and dO again, not from the bytes of the
first quantization, because a second rounding would add as much error as the first. With ``wgrad="bf16"`` the four
operands of the weight gradients are rounded to bf16 instead.

``tiled`` names operands of the weight gradients that have one scale per 128 x 128 tile (positions x columns) instead of
one per column and block of tokens: "dout" and "a" of dW2, "dz" and "x" of dW1. A tiled dZ is quantized once for both
its uses: dx takes the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.interface import Gate, Rows, TokenRows
from supersonic_moe.kernels.reference.activation import acc_dtype, activation_backward, activation_forward
from supersonic_moe.kernels.reference.gather import gather_rows, gather_sum
from supersonic_moe.kernels.reference.grouped_mm import grouped_mm, grouped_mm_wgrad
from supersonic_moe.kernels.reference.quantize import (
    dequantize,
    pad_segments,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_saved,
)
from supersonic_moe.kernels.reference.reductions import row_dot, segment_sum
from supersonic_moe.quantization.block_format import padded_capacity, saved_steps
from supersonic_moe.training.arguments import Inputs


class Fp8Call(NamedTuple):
    """One call of the layer."""

    x_TH: Tensor
    scores_S: Tensor
    w1_ENH: Tensor
    b1_EN: Tensor | None
    w2_EHI: Tensor
    b2_EH: Tensor | None
    plan: RoutingPlan
    gate: Gate
    recipe: Fp8Recipe


def fp8_forward(call: Fp8Call) -> tuple[Tensor, Tensor]:
    """(O (T, H), the pre-activation H (P, N1) without the bias as backward will see it)."""
    x_TH, scores_S, w1_ENH, b1_EN, w2_EHI, b2_EH, plan, gate, recipe = call
    acc, pow2 = acc_dtype(x_TH.dtype), recipe.scale == "pow2"
    x = Rows(_rows(x_TH, pow2, acc), plan.gather_index)
    z_PN = grouped_mm(x, _blocks(w1_ENH, pow2, acc).mT, plan.expert_offsets)
    a_PI = activation_forward(z_PN, b1_EN, plan.row_expert, gate)
    y_PH = grouped_mm(Rows(_rows(a_PI, pow2, acc)), _blocks(w2_EHI, pow2, acc).mT, plan.expert_offsets)
    out_TH = _sum_by_token(y_PH, _row_scores(scores_S, plan), b2_EH, plan)
    saved = {
        "fp8": lambda: _rows(z_PN, pow2, acc),
        "int8": lambda: _saved(z_PN, acc),
        "bf16": lambda: z_PN.bfloat16().to(acc),
        "recompute": lambda: z_PN,
    }
    return out_TH, saved[recipe.save_preactivation]()


def fp8_backward(dout_TH: Tensor, z_PN: Tensor, call: Fp8Call, tiled: Collection[str] = ()) -> Inputs[Tensor | None]:
    """Gradients in the accumulation dtype, from the second result of :func:`fp8_forward`."""
    x_TH, scores_S, w1_ENH, b1_EN, w2_EHI, b2_EH, plan, gate, recipe = call
    acc, pow2 = acc_dtype(x_TH.dtype), recipe.scale == "pow2"
    s_P = _row_scores(scores_S, plan)
    dout = Rows(_rows(dout_TH, pow2, acc), plan.gather_index)
    da_PI = grouped_mm(dout, _blocks(w2_EHI, pow2, acc), plan.expert_offsets)
    dz_PN, as_PI, ds_P = activation_backward(z_PN, b1_EN, da_PI, s_P, plan.row_expert, gate)

    dout_PH = gather_rows(dout_TH.to(acc), plan.gather_index)
    if b2_EH is not None:
        row_dot(Rows(dout_PH), b2_EH, plan.row_expert, ds_P)
    db1_EN = None if b1_EN is None else segment_sum(Rows(dz_PN), None, plan.expert_offsets)
    db2_EH = None if b2_EH is None else segment_sum(Rows(dout_PH), s_P, plan.expert_offsets)

    dz_rows_PN = _rows(dz_PN, pow2, acc)
    if recipe.wgrad == "bf16":
        x_PH = gather_rows(x_TH, plan.gather_index)
        operands = (t.bfloat16().to(acc) for t in (dout_PH, as_PI, dz_PN, x_PH))
        offsets = plan.expert_offsets
    else:
        offsets, row_index, token_index, _ = pad_segments(
            plan.expert_offsets, plan.gather_index, padded_capacity(plan.capacity, plan.num_experts)
        )
        sources = {
            "dout": (dout_TH, token_index),
            "a": (as_PI, row_index),
            "dz": (dz_PN, row_index),
            "x": (x_TH, token_index),
        }
        operands = (
            dequantize(*quantize_columns(t, index, pow2, name in tiled), acc).T for name, (t, index) in sources.items()
        )
    dout_G, as_G, dz_G, x_G = operands
    dx_PH = grouped_mm(Rows(dz_rows_PN), _blocks(w1_ENH, pow2, acc), plan.expert_offsets)
    return Inputs(
        x=_sum_by_token(dx_PH, None, None, plan),
        scores=gather_rows(ds_P[:, None], plan.reverse_index)[:, 0],
        w1=grouped_mm_wgrad(Rows(dz_G), x_G, offsets),
        b1=db1_EN,
        w2=grouped_mm_wgrad(Rows(dout_G), as_G, offsets),
        b2=db2_EH,
    )


def _rows(x: Tensor, pow2: bool, dtype: torch.dtype) -> Tensor:
    return dequantize(*quantize_rows(x, pow2), dtype)


def _saved(z: Tensor, dtype: torch.dtype) -> Tensor:
    q, words = quantize_saved(z)
    return q.to(dtype) * saved_steps(words, z.shape[1]).to(dtype)


def _blocks(w: Tensor, pow2: bool, dtype: torch.dtype) -> Tensor:
    q, _, scale = quantize_blocks(w, pow2)
    return dequantize(q, scale, dtype)


def _row_scores(scores_S: Tensor, plan: RoutingPlan) -> Tensor:
    return gather_rows(scores_S.to(acc_dtype(scores_S.dtype))[:, None], plan.scatter_index)[:, 0]


def _sum_by_token(y_PH: Tensor, row_scale_P: Tensor | None, bias_EH: Tensor | None, plan: RoutingPlan) -> Tensor:
    tokens = TokenRows(plan.token_rows, plan.token_offsets, plan.slots_per_token, plan.num_tokens)
    return gather_sum(y_PH, row_scale_P, bias_EH, plan.row_expert, tokens)
