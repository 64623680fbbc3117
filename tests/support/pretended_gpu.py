"""A CPU that launches of the package take for a GPU: a machine stands in for the driver and for Triton's launchers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from supersonic_moe.jit import launch, signature, tape, tma
from supersonic_moe.jit.launch import Kernel
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.sm90 import gemm_config
from supersonic_moe.kernels.triton import launch as triton_launch

Launch = tuple[Any, ...]
"""Kernel, grid, and arguments: ("at", address, what else a tensor map says), or a number."""


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


class Machine:
    """Writes down launches in order, and keeps the tensors of a step that must not make room for others before it is
    compared.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.alive: list[Tensor] = []
        self.maps: dict[bytes, Launch] = {}
        self.numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        from cuda.bindings import driver

        return getattr(driver, name)

    def map_of(self, address: int, *tiles: Any) -> bytes:
        made = next(self.numbers).to_bytes(128, "little")
        self.maps[made] = ("at", address, tiles)
        return made

    def launched(self, slots: Any) -> tuple[int]:
        parsed = slots._made_of[2]
        found: list[Any] = []
        values = parsed.slots()[0].unpack_from(slots.buffer, slots.offset)
        for parameter, value in zip(parsed.parameters, values, strict=True):
            if parameter.kind is signature.TENSOR_MAP:
                found.append(self.maps[value])
            else:
                found.append(("at", value) if parameter.kind is signature.POINTER else value)
        self.launches.append((parsed.kernel, slots._grid, *found))
        return (0,)

    def get(self, key: Any) -> Any:
        """A Triton launcher. ``key``: what the kernel is specialized for, argument by argument."""
        kernel, _, _, _, *signs = key

        def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
            arguments = list(rest[3:])
            for i, sign in enumerate(signs):
                if isinstance(sign, tuple) and isinstance(sign[0], torch.dtype):
                    arguments[i] = ("at", arguments[i])
            self.launches.append((kernel, (x, y, z), *arguments))

        return run, None, None

    def allocate(self, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        self.alive.append(torch.empty_strided(shape, stride, dtype=dtype))
        return self.alive[-1]

    def run(self, function: Any, args: Any) -> Any:
        """Without a tape. What is recorded meanwhile is of no use; an op inside of another is called as in a recording,
        past torch's dispatcher, which would hide what the op allocates.
        """
        alive = self.alive

        class Keep(tape.Recorder):
            def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                alive.append(super().__torch_dispatch__(op, types, args, kwargs))
                return alive[-1]

        recorder = tape.state.recorder = Keep([])
        try:
            with recorder:
                return function(*args)
        finally:
            tape.state.recorder = None


def pretend_hopper(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """``pretend_gpu`` for the kernels of sm_90."""
    init = launch._Slots.__init__

    def noting(self: Any, *args: Any) -> None:
        init(self, *args)
        self._launch = lambda *_: machine.launched(self)

    pretend_gpu(monkeypatch, machine, map_of=machine.map_of, allocate=machine.allocate)
    for owner, name, value in (
        (launch, "call", lambda *_: 0),
        (launch._Slots, "__init__", noting),
        (gemm_config, "multiprocessors", lambda device: 132),
        (registry, "choose", lambda *_, **__: registry.Choice("sm90", "")),
        (registry, "choose_fp8", lambda *_, **__: registry.Choice("sm90", "")),
    ):
        monkeypatch.setattr(owner, name, value)
