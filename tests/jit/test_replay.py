"""A replay writes the addresses that have changed into the arguments it packed once, and launches in order."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from supersonic_moe.jit import signature
from supersonic_moe.jit.launch import Grid, Launch
from supersonic_moe.jit.replay import Replay
from supersonic_moe.jit.signature import SLOT_ALIGNMENT

TEXT = 'extern "C" __global__ void add(const i32 count, const float* a, float* out, i32* where, const float* none) {}'


class Slots:
    """Argument slots of a kernel that writes down what it would launch with."""

    def __init__(self, kernel: Kernel) -> None:
        self.layout, _ = kernel.signature.slots()
        self.buffer = ctypes.create_string_buffer(self.layout.size + SLOT_ALIGNMENT)
        self.offset = -ctypes.addressof(self.buffer) % SLOT_ALIGNMENT
        self.pack_into, self.kernel = self.layout.pack_into, kernel

    def enqueue(self, grid: Grid, stream: None) -> None:
        self.kernel.launched.append((grid, self.layout.unpack_from(self.buffer, self.offset)))


class Kernel:
    def __init__(self) -> None:
        self.signature = signature.parse(TEXT, "add")
        self.launched: list[tuple[Grid, tuple[Any, ...]]] = []

    def new_slots(self, device: int) -> Slots:
        return Slots(self)


def test_pointers_into_a_buffer_move_with_it_and_nothing_else_does() -> None:
    first, second = Kernel(), Kernel()
    common = {"a": 1000, "none": None, "count": 1000}
    launches = [
        Launch(first, (1, 1, 1), common | {"out": 2000, "where": 5064}),  # type: ignore[arg-type]
        Launch(second, (2, 1, 1), common | {"out": 5000, "where": 5100}),  # type: ignore[arg-type]
    ]
    replay = Replay(launches, 0, [(1000, 1), (2000, 1), (5000, 100)])
    for a, out, workspace in ((1000, 2000, 5000), (8, 2000, 5000), (8, 16, 7000), (1000, 2000, 5000)):
        replay.run((a, out, workspace))
        assert first.launched.pop() == ((1, 1, 1), (1000, a, out, workspace + 64, 0))
        # 5100 is the first address behind the workspace
        assert second.launched.pop() == ((2, 1, 1), (1000, a, workspace, 5100, 0))


def test_an_argument_that_is_missing_is_named() -> None:
    with pytest.raises(TypeError, match=r"add\(.*got the arguments \['a', 'count'"):
        Replay([Launch(Kernel(), (1, 1, 1), {"a": 1, "count": 2, "none": 3, "out": 4})], 0, [])  # type: ignore[arg-type]
