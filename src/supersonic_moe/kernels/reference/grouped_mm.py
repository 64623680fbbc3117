"""Grouped GEMMs as a loop over experts: ragged rows (forward, dgrad) and ragged contraction (wgrad). Reads the offsets
on the host.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from supersonic_moe.kernels.reference.activation import acc_dtype


def _segments(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    offsets = expert_offsets.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(itertools.pairwise(offsets)) if end > start]


def grouped_mm(a_PK: Tensor, b_EKN: Tensor, expert_offsets: Tensor) -> Tensor:
    """(P, N): rows of expert e are a[rows] @ b[e]; dead rows are undefined (NaN here)."""
    acc = acc_dtype(a_PK.dtype)
    out_PN = a_PK.new_full((a_PK.shape[0], b_EKN.shape[2]), math.nan)
    for e, start, end in _segments(expert_offsets):
        out_PN[start:end] = a_PK[start:end].to(acc) @ b_EKN[e].to(acc)
    return out_PN


def grouped_mm_wgrad(a_PM: Tensor, b_PN: Tensor, expert_offsets: Tensor) -> Tensor:
    """(E, M, N): a[rows of e].T @ b[rows of e]; exact zeros for an expert without rows."""
    acc = acc_dtype(a_PM.dtype)
    out_EMN = a_PM.new_zeros(expert_offsets.shape[0] - 1, a_PM.shape[1], b_PN.shape[1])
    for e, start, end in _segments(expert_offsets):
        out_EMN[e] = a_PM[start:end].to(acc).T @ b_PN[start:end].to(acc)
    return out_EMN
