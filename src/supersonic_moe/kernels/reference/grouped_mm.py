"""Grouped GEMMs as a loop over experts: ragged rows (forward, dgrad) and ragged contraction (wgrad). Reads the offsets
on the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from supersonic_moe.kernels.interface import NEW, Into, RowBlocks, Rows
from supersonic_moe.kernels.reference.activation import acc_dtype
from supersonic_moe.kernels.reference.gather import rows_of


def _segments(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    offsets = expert_offsets.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(itertools.pairwise(offsets)) if end > start]


def grouped_mm(a: Rows[Tensor], b_EKN: Tensor, expert_offsets: Tensor, parts: Sequence[RowBlocks] = ()) -> Tensor:
    """(P, N): rows of expert e are a[rows] @ b[e]; dead rows are NaN. All ``parts`` at once: the bits of a BLAS depend
    on how many rows it has.
    """
    a_PK = rows_of(a)
    acc = acc_dtype(a_PK.dtype)
    out_PN = a_PK.new_full((a_PK.shape[0], b_EKN.shape[2]), math.nan)
    for e, start, end in _segments(expert_offsets):
        out_PN[start:end] = a_PK[start:end].to(acc) @ b_EKN[e].to(acc)
    for part in parts:
        part.after(out_PN)
    return out_PN


def grouped_mm_wgrad(a: Rows[Tensor], b_PN: Tensor, expert_offsets: Tensor, into: Into = NEW) -> Tensor:
    """(E, M, N): a[rows of e].T @ b[rows of e], or its transpose (E, N, M); exact zeros for an expert without rows.
    Into ``out`` if given, of any float dtype; ``accumulate`` adds to it.
    """
    a_PM, (out, transposed, accumulate) = rows_of(a), into
    left, right = (b_PN, a_PM) if transposed else (a_PM, b_PN)
    acc = acc_dtype(a_PM.dtype)
    if out is None:
        out = a_PM.new_zeros(expert_offsets.shape[0] - 1, left.shape[1], right.shape[1])
    elif not accumulate:
        out.zero_()
    for e, start, end in _segments(expert_offsets):
        out[e] += left[start:end].to(acc).T @ right[start:end].to(acc)
    return out
