"""The FP8 inference operator in plain torch: what its kernels must compute, stage by stage.

A row is a (token, choice) pair with a local expert; rows lie sorted by expert, in slot order inside an expert.

    z = x w13^T                   both dequantized: an e4m3 code times the fp32 scale of its block
    c = silu(gate) * up           with the clamp of ``swiglu_limit`` if given; fp32
    q = e4m3(c), 1 x 128          ``requantize=False`` keeps c as it is: the operator of the contest definition, which
                                  kernels approximate within the error of that step
    y = q w2^T                    fp32
    out[t] = sum over the token's choices j, ascending, of weight[t, j] * y;  then + y of the shared expert

Products accumulate in fp32 (fp64 for ``dtype=torch.float64``), nothing is rounded but q. Tokens without a row are
exactly +0, whatever x holds. A weight of an expert without rows is not read.

Scales of w13, B = 128: one for each block of 128 rows as they are stored, where the blocks of the two halves of
``gate_up`` and ``up_gate`` count from the first row of their own half: 2 ceil(I / 128) of them. With I = 192, the share
of GLM-4.6 on one of eight ranks, each half has a block of 128 rows and one of 64. ``interleaved`` rows have
ceil(2 I / 128) blocks. w2 has ceil(I / 128) scales along I, and so has c.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.kernels.reference.activation import activation_forward
from supersonic_moe.kernels.reference.quantize import dequantize, quantize_rows
from supersonic_moe.quantization.block_format import BLOCK


class Fp8Experts(NamedTuple):
    """Weights of E experts: codes e4m3, scales fp32 of either sign."""

    w13: Tensor
    """(E, 2 I, H)"""
    w13_scale: Tensor
    """(E, row blocks, H / 128); see the module docstring."""
    w2: Tensor
    """(E, H, I)"""
    w2_scale: Tensor
    """(E, H / 128, ceil(I / 128))"""


class Stages(NamedTuple):
    """What the rows of one call go through; tests compare kernels with each of them."""

    slot_P: Tensor
    """int64: token * K + choice of each row."""
    c_PI: Tensor
    q_PI: Tensor
    """e4m3 codes of c and ``q_scale_PB`` their scales."""
    q_scale_PB: Tensor
    y_PH: Tensor


def expert_rows(
    x_TH: Tensor,
    experts: Fp8Experts,
    local_ids_TK: Tensor,
    *,
    row_scale_TK: Tensor | None = None,
    order: GateUpLayout,
    limit: float | None = None,
    pow2: bool = False,
    requantize: bool = True,
) -> Stages:
    """Both products for every row.

    Args:
        x_TH: dequantized activations, float32 or float64: the dtype of the arithmetic.
        local_ids_TK: index into ``experts``; a value outside [0, E) gives no row.
        row_scale_TK: multiplies the row of x that a choice reads (router weight on the input).
    """
    hidden, inter = experts.w2.shape[1:]
    activation = Activation(ActivationType.SWIGLU, limit=limit)
    slots, gated, codes, scales, outputs = [], [], [], [], []
    for e in range(experts.w13.shape[0]):
        token, choice = (local_ids_TK == e).nonzero(as_tuple=True)
        if not token.numel():
            continue
        x_RH = x_TH[token]
        if row_scale_TK is not None:
            x_RH = x_RH * row_scale_TK[token, choice, None].to(x_RH.dtype)
        z_RN = x_RH @ dequantize_w13(experts.w13[e], experts.w13_scale[e], order, x_TH.dtype).T
        c_RI = activation_forward(z_RN, None, token, Gate(activation, order))
        q_RI, q_scale_RB = quantize_rows(c_RI, pow2)
        multiplied = dequantize(q_RI, q_scale_RB, x_TH.dtype) if requantize else c_RI
        slots.append(token * local_ids_TK.shape[1] + choice)
        gated.append(c_RI)
        codes.append(q_RI)
        scales.append(q_scale_RB)
        outputs.append(multiplied @ dequantize(experts.w2[e], experts.w2_scale[e], x_TH.dtype).T)
    if not slots:
        none = x_TH.new_empty(0, inter)
        return Stages(
            local_ids_TK.new_empty(0, dtype=torch.int64), none, *quantize_rows(none), x_TH.new_empty(0, hidden)
        )
    return Stages(*(torch.cat(parts) for parts in (slots, gated, codes, scales, outputs)))


def combine(stages: Stages, weights_TK: Tensor, out_TH: Tensor) -> Tensor:
    """Add weight * y to ``out_TH`` (the dtype of y), choice by choice in ascending order."""
    choices = weights_TK.shape[1]
    for j in range(choices):
        rows = (stages.slot_P % choices == j).nonzero()[:, 0]
        token = stages.slot_P[rows] // choices
        out_TH[token] += weights_TK[token, j, None].to(out_TH.dtype) * stages.y_PH[rows]
    return out_TH


def moe_fp8(
    x_TH: Tensor,
    x_scale_TB: Tensor | None,
    experts: Fp8Experts,
    weights_TK: Tensor,
    local_ids_TK: Tensor,
    *,
    order: GateUpLayout,
    limit: float | None = None,
    pow2: bool = False,
    weight_on_input: bool = False,
    scaling_factor: float = 1.0,
    shared: Fp8Experts | None = None,
    requantize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(T, H) in ``dtype``: the whole operator behind its routing.

    Args:
        x_TH: bf16, quantized here, or e4m3 with ``x_scale_TB`` (T, H / 128).
        weights_TK: without the scaling factor.
        weight_on_input: K = 1; the weight multiplies x instead of y, the factor still multiplies y.
        shared: one expert (E = 1) that every token has, with weight 1 and without the factor.
    """
    if x_scale_TB is None:
        x_TH, x_scale_TB = quantize_rows(x_TH, pow2)
    x_TH = dequantize(x_TH, x_scale_TB, dtype)
    rows = functools.partial(expert_rows, x_TH, order=order, limit=limit, pow2=pow2, requantize=requantize)
    stages = rows(experts, local_ids_TK, row_scale_TK=weights_TK if weight_on_input else None)
    row_weights_TK = (torch.ones_like(weights_TK) if weight_on_input else weights_TK) * scaling_factor
    out_TH = combine(stages, row_weights_TK, x_TH.new_zeros(x_TH.shape[0], experts.w2.shape[1]))
    if shared is not None:
        always = local_ids_TK.new_zeros(x_TH.shape[0], 1)
        out_TH += rows(shared, always).y_PH
    return out_TH


def local_ids(
    ids_TK: Tensor, num_local: int, offset: int = 0, num_experts: int | None = None, expert_map: Tensor | None = None
) -> Tensor:
    """int64 (T, K): global expert ids as indices of the local experts, -1 where a choice has none here.

    Ids outside [0, num_experts) are sentinels. ``expert_map`` (num_experts,) gives the local index of a global id, -1
    for none; without it, local expert e is global expert ``offset + e``.
    """
    ids_TK = ids_TK.long()
    known = ids_TK >= 0
    if expert_map is not None:
        num_experts = expert_map.shape[0]
    if num_experts is not None:
        known &= ids_TK < num_experts
    local_TK = ids_TK - offset if expert_map is None else expert_map.long()[torch.where(known, ids_TK, 0)]
    return torch.where(known & (local_TK >= 0) & (local_TK < num_local), local_TK, -1)


def dequantize_w13(w_NH: Tensor, scale: Tensor, order: GateUpLayout, dtype: torch.dtype) -> Tensor:
    """(2 I, H) of one expert; blocks of rows count from the first row of each half, or of all where interleaved."""
    parts = 1 if order is GateUpLayout.INTERLEAVED else 2
    rows = w_NH.shape[0] // parts
    by_row = scale.reshape(parts, -1, scale.shape[1]).repeat_interleave(BLOCK, 1)[:, :rows].flatten(0, 1)
    return w_NH.to(dtype) * by_row.repeat_interleave(BLOCK, 1).to(dtype)
