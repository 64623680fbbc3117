"""Tensors that lie anywhere in a larger buffer, as callers pass them."""

from __future__ import annotations

import math

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Place = tuple[int, int, bool]
"""(elements in front of a tensor, elements behind each of its rows, whether its last two dimensions are swapped)"""
PLAIN: Place = 0, 0, False


def lay(t: Tensor, place: Place) -> Tensor:
    """The same values somewhere in a larger buffer; of one dimension every so many elements."""
    if t.dim() == 1:
        return lay(t[:, None], (place[0], place[1], False))[:, 0]
    front, behind, turned = place
    t = t.mT if turned else t
    wide = (*t.shape[:-1], t.shape[-1] + behind)
    buffer = t.new_full((front + math.prod(wide),), 77)
    laid = buffer[front:].view(wide)[..., : t.shape[-1]].copy_(t)
    return laid.mT if turned else laid


def in_one_buffer() -> saved_tensors_hooks:
    """Saved tensors come back as views of flat buffers, an element behind the start."""

    def pack(t: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        count = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        flat = t.new_empty(1 + count)
        flat[1:].copy_(t.detach().as_strided((count,), (1,)))
        return flat, tuple(t.shape), t.stride()

    return saved_tensors_hooks(pack, lambda packed: packed[0].as_strided(*packed[1:], 1))
