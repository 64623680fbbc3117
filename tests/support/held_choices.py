"""The choices of a model's routers, recorded in one forward and taken again in others. Two experts whose logits all but
tie change places in BF16, and then a token has another expert: no measure of how experts are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _topk(x: Tensor, k: int, dim: int = -1, **_: Any) -> tuple[Tensor, int, bool]:
    return x, dim, True


def _max(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, int, bool]:
    return x, dim, keepdim


_CHOOSERS = {torch.topk: _topk, Tensor.topk: _topk, torch.max: _max, Tensor.max: _max}


class HeldChoices(TorchFunctionMode):
    """Each ``topk`` and each ``max`` along a dimension, in order: what it chose is recorded, or inside :meth:`again`
    chosen whatever the values are now. Values and their gradients are those of now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []
        self._left: Iterator[Tensor] | None = None

    @contextmanager
    def again(self) -> Iterator[None]:
        self._left = iter(self.indices)
        with self:
            yield
        assert next(self._left, None) is None, "a choice that was recorded was not made again"
        self._left = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CHOOSERS or (func in (torch.max, Tensor.max) and len(args) + len(kwargs) == 1):
            return func(*args, **kwargs)
        if self._left is None:
            found = func(*args, **kwargs)
            self.indices.append(found.indices)
            return found
        x, dim, keepdim = _CHOOSERS[func](*args, **kwargs)
        index = next(self._left).to(x.device)
        kept = index if keepdim else index.unsqueeze(dim)
        values = x.gather(dim, kept)
        kind = torch.return_types.topk if "topk" in func.__name__ else torch.return_types.max
        return kind((values if keepdim else values.squeeze(dim), index))
