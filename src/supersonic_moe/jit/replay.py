"""What a call has launched again, with other addresses, at the host time of the driver's calls and little else.

    with recording((x, out, workspace, weights)) as recorder:
        ...                                                     # launches that read and write those tensors
    replay = Replay(recorder, moving=3)
    replay.run((x.data_ptr(), out.data_ptr(), workspace.data_ptr()))      # every time

What a CUDA graph does on the device, this does on the host: arguments are packed once; a run writes the addresses that
have changed into the argument buffers, makes the tensor maps of those, and launches on torch's current stream. A tape
(``jit/tape.py``) does the same for any function of tensors, and finds out what it allocates and computes with torch.
Whoever keeps a replay answers for that himself: that nothing but launches has happened, and that shapes, strides,
numbers and the addresses of the other tensors are what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from supersonic_moe.jit import tape
from supersonic_moe.jit.tape import Recorder


@contextmanager
def recording(tensors: Sequence[Tensor]) -> Iterator[Recorder]:
    """Notes what this thread launches meanwhile. ``tensors``: all that launches read and write."""
    recorder = tape.state.recorder = Recorder(list(tensors))
    try:
        yield recorder
    finally:
        tape.state.recorder = None


class Replay:
    """Belongs to one thread: its argument buffers are written by each run."""

    def __init__(self, recorder: Recorder, moving: int) -> None:
        """
        Args:
            recorder: of a recording that turned out to be ``possible``.
            moving: the first so many of its tensors may lie elsewhere next time. Every address inside one of them, in
                a pointer or a tensor map, moves with it.
        """
        self._steps = recorder.steps
        self._addresses = [memory.start for memory in recorder.memories[:moving]]
        self._places: list[list[tuple[object, int, int]]] = [[] for _ in range(moving)]
        for target, slot, owner, offset, _ in recorder.places:
            if owner < moving:
                self._places[owner].append((target, slot, offset))

    def run(self, addresses: Sequence[int]) -> None:
        """``addresses``: of the tensors that move, in their order."""
        for i, address in enumerate(addresses):
            if address != self._addresses[i]:
                self._addresses[i] = address
                for target, slot, offset in self._places[i]:
                    target[slot] = address + offset  # type: ignore[index]
        for step in self._steps:
            step(())
