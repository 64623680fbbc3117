"""Tensors that lie anywhere in a larger buffer, as callers pass them."""

from __future__ import annotations

import torch
from torch import Tensor

Place = tuple[int, int, bool]
"""(elements in front of a tensor, elements behind each of its rows, whether its last two dimensions are swapped)"""
PLAIN: Place = 0, 0, False


def lay(t: Tensor, place: Place) -> Tensor:
    """The same values somewhere in a larger buffer."""
    front, behind, turned = place
    t = t.mT if turned else t
    *outer, rows, columns = t.shape
    buffer = torch.full((front + t.numel() // columns * (columns + behind),), 77, dtype=t.dtype, device=t.device)
    laid = buffer[front:].view(*outer, rows, columns + behind)[..., :columns].copy_(t)
    return laid.mT if turned else laid
