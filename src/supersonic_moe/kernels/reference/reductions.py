"""Sums over rows: the score gradient of the down bias, and bias gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels.interface import Rows
from supersonic_moe.kernels.reference.activation import acc_dtype
from supersonic_moe.kernels.reference.gather import rows_of


def row_dot(a: Rows[Tensor], b_EH: Tensor, row_expert_P: Tensor, out_P: Tensor) -> None:
    """out[p] += <a[p], b[expert of p]> for rows that have an expert."""
    a_PH = rows_of(a)
    rows = (row_expert_P < b_EH.shape[0]).nonzero().squeeze(1)
    experts = row_expert_P[rows].long()
    out_P[rows] += (a_PH[rows].to(out_P.dtype) * b_EH[experts].to(out_P.dtype)).sum(1)


def segment_sum(a: Rows[Tensor], row_scale_P: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """(E, N) in the accumulation dtype: sum of scale[p] * a[p] over the rows of each expert."""
    a_PN = rows_of(a)
    num_experts = expert_offsets.shape[0] - 1
    rows = torch.arange(a_PN.shape[0], device=a_PN.device)
    expert = torch.searchsorted(expert_offsets[1:].long(), rows, right=True)
    live = expert < num_experts
    values = a_PN[live].to(acc_dtype(a_PN.dtype))
    if row_scale_P is not None:
        values = values * row_scale_P[live, None].to(values.dtype)
    return values.new_zeros(num_experts, a_PN.shape[1]).index_add_(0, expert[live], values)
