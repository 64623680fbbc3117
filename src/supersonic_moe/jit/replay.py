"""A list of launches again, with other addresses, at the host time of the driver's calls and little else.

    replay = Replay(launches, device, [(out.data_ptr(), out.nbytes), (workspace.data_ptr(), workspace.nbytes)])
    replay.run((out.data_ptr(), workspace.data_ptr()))      # every time

What a CUDA graph does on the device, this does on the host: arguments are packed once; a run writes the addresses that
have changed into the argument buffers and launches on torch's current stream. Whoever keeps a replay answers for the
rest: that shapes, strides, numbers and the addresses outside the named buffers are what they were.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from supersonic_moe.jit.launch import Grid, Launch
from supersonic_moe.jit.signature import POINTER, packed_values


class _Place(NamedTuple):
    """Where an argument buffer holds an address inside one of the buffers."""

    words: Any
    word: int
    offset: int
    """Bytes behind the start of the buffer."""


class Replay:
    """Belongs to one thread: its argument buffers are written by each run."""

    def __init__(self, launches: Sequence[Launch], device: int, buffers: Sequence[tuple[int, int]]) -> None:
        """
        Args:
            buffers: (address, bytes) of what may lie elsewhere next time. Every pointer argument into one of them moves
                with it; tensor maps do not, so none may describe a buffer.
        """
        self._launches: list[tuple[Callable[[Grid, None], None], Grid]] = []
        self._addresses = [address for address, _ in buffers]
        self._places: list[list[_Place]] = [[] for _ in buffers]
        for kernel, grid, arguments in launches:
            slots = kernel.new_slots(device)
            values = packed_values(kernel.signature, device, arguments)
            slots.pack_into(slots.buffer, slots.offset, *values)
            layout, offsets = kernel.signature.slots()
            words = (ctypes.c_uint64 * (layout.size // 8)).from_buffer(slots.buffer, slots.offset)
            for parameter, value, offset in zip(kernel.signature.parameters, values, offsets, strict=True):
                if parameter.kind is not POINTER:
                    continue
                for places, (start, size) in zip(self._places, buffers, strict=True):
                    if start <= value < start + size:
                        places.append(_Place(words, offset // 8, value - start))
            self._launches.append((slots.enqueue, grid))

    def run(self, addresses: Sequence[int]) -> None:
        """``addresses``: of the buffers, in their order."""
        for i, address in enumerate(addresses):
            if address != self._addresses[i]:
                self._addresses[i] = address
                for words, word, offset in self._places[i]:
                    words[word] = address + offset
        for enqueue, grid in self._launches:
            enqueue(grid, None)
