"""A CPU that launches of the package take for a GPU: a machine stands in for the driver and for Triton's launchers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from supersonic_moe.jit import launch, tape, tma
from supersonic_moe.jit.launch import Kernel
from supersonic_moe.kernels.triton import launch as triton_launch


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, machine: Any, *, map_of: Callable[..., bytes], allocate: Callable[..., Tensor]
) -> None:
    """``map_of(address, ...)`` makes tensor maps, ``allocate(shape, stride, dtype)`` what a tape allocates."""
    state = tape._State()
    for owner, name, value in (
        (launch, "binding", lambda: machine),
        (launch, "make_context_current", lambda device: None),
        (launch, "raw_stream", lambda device: 7),
        (Kernel, "new_slots", lambda self, device: launch._Slots(0x1000, self.spec, self.signature, device, 0)),
        (tma, "_cached", map_of),
        (triton_launch, "_LAUNCHERS", machine),
        (triton_launch, "raw_stream", lambda device: 7),
        (triton_launch, "current_device", lambda: 0),
        (triton_launch, "state", state),
        (tape, "state", state),
        (tape, "current_device", lambda: 0),
        (tape, "empty_strided", allocate),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (Tensor, "get_device", lambda tensor: 0),
    ):
        monkeypatch.setattr(owner, name, value)
