"""Entries by index, zero where there is none."""

from __future__ import annotations

import torch
from torch import Tensor


def pick(values_N: Tensor, index_P: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(P,) in ``dtype``, by default that of the values: values[index[p]], exactly 0 where index[p] < 0."""
    picked_P = values_N.new_zeros(index_P.shape[0])
    real = index_P >= 0
    picked_P[real] = values_N[index_P[real].long()]
    return picked_P if dtype is None else picked_P.to(dtype)
