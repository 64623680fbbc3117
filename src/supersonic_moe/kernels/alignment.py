"""Operands where kernels can load them: TMA, and torch's grouped GEMM, read 16 bytes at a time.

They want addresses, and steps from row to row, that are multiples of 16 bytes. Tensors of callers need not have them:
parameters in one flat buffer, ``cat([scalar, out.flatten()])``, rows cut out of wider ones, saved tensors that a hook
brought back. So an op looks at each of its operands before it calls the kernels of a GPU, and copies the ones that do
not fit, once, with a line in the debug log. What kernels read element by element (scores, ids, offsets, the bias of the
second projection) may lie anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from supersonic_moe.kernels.interface import Into

ALIGNMENT = 16  # bytes

log = logging.getLogger("supersonic_moe")

Call = TypeVar("Call", bound=NamedTuple)


def aligned(call: Call, alignment: int, *names: str) -> Call:
    """``call`` with copies of those of its tensors called ``names`` that do not fit a backend that needs ``alignment``:
    this one, or 1, for which everything fits. A name may stand for None.
    """
    if alignment == 1:
        return call
    copies = {}
    for name in names:
        t = getattr(call, name)
        if t is not None and not _fits(t):
            copies[name] = aligned_tensor(name, t)
    return call._replace(**copies) if copies else call


def aligned_tensor(name: str, t: Tensor) -> Tensor:
    """``t``, or a copy if it does not fit; ``name`` is for the log."""
    if _fits(t):
        return t
    log.debug(
        "copying %s %s: address %#x, strides %s; kernels load from multiples of %d bytes",
        name, tuple(t.shape), t.data_ptr(), t.stride(), ALIGNMENT,
    )  # fmt: skip
    if is_turned(t):
        return t.mT.clone(memory_format=torch.contiguous_format).mT
    return t.clone(memory_format=torch.contiguous_format)


def is_plain(t: Tensor) -> bool:
    """Whether a kernel can write to ``t`` as to memory of its own."""
    return t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0


def is_turned(t: Tensor) -> bool:
    """Whether a weight is a transposed view. Some kernels take these another way, so a copy has to be one too, and its
    gradient is wanted in the same order.
    """
    return t.dim() == 3 and t.stride(2) != 1 and t.stride(1) == 1


def weight_gradient(turned: bool, into: Into, product: Callable[[Into], Tensor]) -> Tensor:
    """``product(into)``; a new gradient of a turned weight lies in memory as that weight does, since autograd copies
    one of other strides than its parameter's.
    """
    if turned and into.out is None:
        return product(Into(transposed=not into.transposed)).mT
    return product(into)


def empty_gradient(turned: bool, like: Tensor, shape: torch.Size) -> Tensor:
    """A new gradient of that shape, as ``weight_gradient`` gives it."""
    experts, rows, columns = shape
    return like.new_empty(experts, columns, rows).mT if turned else like.new_empty(shape)


def _fits(t: Tensor) -> bool:
    return t.data_ptr() % ALIGNMENT == 0 and (t.is_contiguous() or _steps_fit(t))


def _steps_fit(t: Tensor) -> bool:
    """Whether one dimension is contiguous, of a weight any of the last two, and the others step by multiples of 16
    bytes. What is contiguous altogether has such steps: backends that need them take multiples of 8 for H and I only.
    """
    unit = t.dim() - (2 if is_turned(t) else 1)
    return t.stride(unit) == 1 and all(
        d == unit or n == 1 or step * t.element_size() % ALIGNMENT == 0
        for d, (n, step) in enumerate(zip(t.shape, t.stride(), strict=True))
    )
