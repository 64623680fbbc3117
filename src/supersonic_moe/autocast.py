"""What ``torch.autocast`` means for a device, at the price of one question where it is off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where ``x`` is; None where it is off, and for fp64, which autocast leaves as it
    is in every operator of torch.
    """
    if x.dtype is torch.float64 or not _is_on(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products inside get the dtypes that they are called with. Entering ``torch.autocast`` takes as long as a launch,
    so only where it is on.
    """
    if not _is_on(x):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _is_on(x: Tensor) -> bool:
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # of the meta device torch cannot be asked
