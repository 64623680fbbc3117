"""Launches of the sm_90 backend without a GPU: on tensors of a CPU, with tensor maps that remember their tensors, and
argument slots that write down what is packed.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from supersonic_moe.jit import Kernel, launch, tma
from supersonic_moe.kernels.sm90 import gemm_config


class Mapped(NamedTuple):
    """What a tensor map was made of."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def tensor(self) -> Tensor:
        """What lies there now. To write to it is to write to memory that the launch may write to."""
        count = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        memory = (ctypes.c_char * (count * self.dtype.itemsize)).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.shape, self.strides)


Launch = tuple[Kernel, Any, dict[str, Any]]
"""(kernel, grid, arguments by name); a tensor map counts as what it was made of."""
_MAPS: dict[bytes, Mapped] = {}


class Slots:
    """Of one kernel."""

    buffer, offset = None, 0

    def __init__(self, kernel: Kernel, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def pack_into(self, buffer: None, offset: int, *values: Any) -> None:
        self.kernel.signature.slots()[0].pack(*values)
        values = tuple(_MAPS[value] if isinstance(value, bytes) else value for value in values)
        names = [parameter.name for parameter in self.kernel.signature.parameters]
        self.arguments = dict(zip(names, values, strict=True))

    def enqueue(self, grid: Any, stream: None) -> None:
        self.launches.append((self.kernel, grid, self.arguments))


@pytest.fixture(name="launches")
def recorded_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """All that is launched in a test, whose tensor maps are ones that TMA takes."""
    found: list[Launch] = []
    numbers = itertools.count()

    def remember(address: int, dtype: torch.dtype, shape: Any, strides: Any, box: Any, *rest: Any) -> bytes:
        tma.check(address, dtype, shape, strides, box, *rest)
        made = next(numbers).to_bytes(128, "little")
        _MAPS[made] = Mapped(address, dtype, tuple(shape), tuple(strides), tuple(box))
        return made

    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(tma, "_cached", remember)
    monkeypatch.setattr(gemm_config, "multiprocessors", lambda device: 131)
    monkeypatch.setattr(Kernel, "_slots", lambda self, device: Slots(self, found))
    forget_kernels()
    yield found
    forget_kernels()
    _MAPS.clear()


def forget_kernels() -> None:
    """A kernel keeps its argument slots: these of a test are for nobody else."""
    for name, module in list(sys.modules.items()):
        if name.startswith("supersonic_moe.kernels.sm90."):
            for factory in ("_kernel", "_kernels"):
                if hasattr(module, factory):
                    getattr(module, factory).cache_clear()
    launch._kernels.clear()
