"""What ``torch.autocast`` means for a device, at the price of one question where it is off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where ``x`` is; None where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # of the meta device torch cannot be asked
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products inside get the dtypes that they are called with. Entering ``torch.autocast`` takes as long as a launch,
    so only where it is on.
    """
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
