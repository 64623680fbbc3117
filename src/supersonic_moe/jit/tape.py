"""What a function launches, launched again for other tensors of the same kind, at the host time of the driver's calls.

    play(backward, arguments)      # the result of backward(*arguments), a tensor or a tuple of tensors

Most of what a step of a layer costs the host is worked out anew in each call and comes out the same: forms of kernels,
grids, strides, sizes of buffers. All of it follows from numbers and from shapes, strides and dtypes of tensors. So the
first call with arguments of one kind just runs, and the second is recorded, as a tape:

    tensors     those that the call returns, or that torch computes on: allocated anew each time
    workspace   everything else that the call allocated, one piece of memory, in which what is used at different times
                shares room; what is done with before a tensor's first use lies in that tensor
    steps       launches with their argument buffers, and operators of torch that write to a tensor
    places      where in an argument buffer an address is, and of what tensor

From the third call on the tape is played: allocate, write the addresses that are others than last time, launch. A CUDA
graph does the same on the device; a tape works on tensors wherever they lie, and inside the capture of a graph.

So a tape holds about as much memory as the call does at most: results are there from its beginning, but what comes
before them lies in them.

An address in an argument buffer must be one of the call's own tensors. Where something else happens, the function runs
each time: an operator that returns a new tensor, an address of unknown origin, tensors that overlap (which of them is
meant?). Arguments must start at multiples of 16 bytes, because kernels are chosen by that. Launches of ``Kernel`` and
of ``kernels/triton/launch.py``, and tensor maps, report to the recorder; nothing else in the package enqueues work
behind torch's back.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.private_api import DispatchMode, current_device, empty_strided, uncompiled

KEPT = 512  # kinds of calls of a thread; then all are forgotten
KEPT_MAPS = 64  # addresses of one tensor map of a tape, 128 bytes each: layers that share the tape take turns
_ALIGNMENT = 512  # of what torch allocates, and of each piece of a workspace
_VECTOR = 16  # bytes; of arguments

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip
_FUNCTIONS = {
    _aten.mm.out: torch.mm, _aten.addmm.out: torch.addmm, _aten.add.out: torch.add, _aten.sum.IntList_out: torch.sum,
}  # fmt: skip
"""Of operators that steps call, at half the host time."""

Result = Tensor | tuple[Tensor, ...]
Step = Callable[[Sequence[Tensor]], object]
"""Gets the arguments that are tensors, then those that the tape allocates."""


class Place(NamedTuple):
    """``target[slot]`` takes an address: that of ``owner``, so many bytes further on."""

    target: Any
    slot: int
    owner: int
    """Index in ``Recorder.memories``."""
    offset: int
    step: int
    """Of the tape, that reads it."""


class _Memory(NamedTuple):
    """An argument or an allocation. It is not kept alive, because a recording must not need more memory than the call;
    so of two at one address the later one counts.
    """

    start: int
    end: int
    tensor: weakref.ref[Tensor]

    @property
    def bytes(self) -> int:
        return self.end - self.start


class _View(NamedTuple):
    """An operand that is a part of an argument or allocation, or that with its axes in another order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements, from where the whole begins."""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


class _Made(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _MapIn:
    """A tensor map in an argument buffer, which is made for another address by writing that address."""

    def __init__(self, buffer: Any, part: slice, made_for: Callable[[int], bytes]) -> None:
        self._buffer, self._part, self._made_for = buffer, part, made_for
        self._known: dict[int, bytes] = {}

    def __setitem__(self, _: int, address: int) -> None:
        made = self._known.get(address)
        if made is None:
            if len(self._known) >= KEPT_MAPS:
                self._known.clear()
            made = self._known[address] = self._made_for(address)
        self._buffer[self._part] = made


class _Watched:
    """How many watch what functions call."""

    by = 0


@contextmanager
def without_tapes() -> Iterator[None]:
    """Functions run in every call, on all threads: for whoever replaces or times what they call."""
    _Watched.by += 1
    try:
        yield
    finally:
        _Watched.by -= 1


class _State(threading.local):
    """Nobody else writes the argument buffers."""

    recorder: Recorder | None = None

    def __init__(self) -> None:
        self.tapes: dict[Hashable, Tape | None] = {}
        """None: called once."""


state = _State()


# ---- playing ---------------------------------------------------------------------------------------------------------


class Tape:
    """One call, for any tensors of the same kind. ``places``: target, slot and offset of each address, in a list for
    each tensor and one for the workspace.
    """

    def __init__(
        self, twins: list[tuple[int, int]], steps: list[Step], made: list[_Made], workspace: int,
        places: list[list[tuple[Any, int, int]]], returned: list[tuple[int, tuple[Any, ...]]], single: bool,
    ) -> None:  # fmt: skip
        self._twins, self._steps, self._made, self._workspace = twins, steps, made, workspace
        self._places, self._returned, self._single = places, returned, single
        self._addresses = [-1] * len(places)

    def fits(self, addresses: list[int]) -> bool:
        """Whether the arguments that were at one address are so again."""
        return all([addresses[i] == addresses[j] for i, j in self._twins])

    def play(self, tensors: list[Tensor], addresses: list[int]) -> Result:
        """``tensors``: the arguments, at ``addresses``."""
        made = [empty_strided(*form) for form in self._made]
        tensors += made
        addresses += [t.data_ptr() for t in made]
        workspace = empty_strided((self._workspace,), (1,), torch.uint8) if self._workspace else None
        addresses.append(0 if workspace is None else workspace.data_ptr())
        if addresses != self._addresses:
            before, self._addresses = self._addresses, [-1] * len(addresses)  # should a write fail
            for address, last, places in zip(addresses, before, self._places, strict=True):
                if address != last:
                    for target, slot, offset in places:
                        target[slot] = address + offset
            self._addresses = addresses
        for step in self._steps:
            step(tensors)
        found = tuple([tensors[i].as_strided(*view) if view else tensors[i] for i, view in self._returned])
        return found[0] if self._single else found


class _Never(Tape):
    """A call that no tape can hold."""

    def __init__(self) -> None:
        pass


_NEVER = _Never()


def play(function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    """``function(*args)``, whose first argument is a tensor on CUDA, and all of whose work is launches."""
    if _Watched.by:
        return function(*args)
    signs, tensors, addresses, bits = reader(tuple(map(type, args)))(*args)
    key = (function, signs)
    tape = state.tapes.get(key, _NEVER)
    if tape is _NEVER:
        if key not in state.tapes:
            if len(state.tapes) >= KEPT:
                state.tapes.clear()
            state.tapes[key] = None
        return function(*args)
    if bits % _VECTOR or tensors[0].get_device() != current_device():
        return function(*args)
    if tape is not None:
        return tape.play(tensors, addresses) if tape.fits(addresses) else function(*args)
    if DispatchMode is None or torch.cuda.is_current_stream_capturing():
        return function(*args)
    recorder = state.recorder = Recorder(tensors)
    try:
        with recorder:
            result = function(*args)
    finally:
        state.recorder = None
    state.tapes[key] = _tape(recorder, tensors, result) or _NEVER
    return result


@functools.cache
def reader(types: tuple[type, ...]) -> Callable[..., tuple[tuple[Any, ...], list[Tensor], list[int], int]]:
    """A function of arguments of these types: what makes their kind, those that are tensors, their addresses, and the
    bits that any address has. Compiled, because each step of a layer reads a hundred tensors.
    """
    names = [f"a{i}" for i in range(len(types))]
    tensors = [name for name, kind in zip(names, types, strict=True) if issubclass(kind, Tensor)]
    signs = [f"{t}.dtype, {t}.get_device(), {t}.shape, {t}.stride()" if t in tensors else t for t in names]
    lines = [
        f"def read({', '.join(names)}):",
        *[f"    p{t} = {t}.data_ptr()" for t in tensors],
        f"    return ({', '.join(signs)},), [{', '.join(tensors)}], [{', '.join(f'p{t}' for t in tensors)}], "
        + " | ".join(f"p{t}" for t in tensors),
    ]
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    read: Callable[..., Any] = scope["read"]
    return read


# ---- recording -------------------------------------------------------------------------------------------------------


class Recorder(DispatchMode or object):  # type: ignore[misc]
    """What happens in one call with these tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.memories = [_memory(t) for t in tensors]
        self.made: list[_Made] = []
        self.steps: list[Step] = []
        self.places: list[Place] = []
        self.operands: list[tuple[int, list[int | None]]] = []
        """Of each operator of torch, its number among the steps and the indices in ``memories``."""
        self.maps: dict[bytes, tuple[int, Callable[[int], bytes]]] = {}
        """Tensor maps: the address, and how to make it for another one."""
        self.possible = True

    def launched(self, step: Step) -> None:
        """``step`` launches the same again, with what then stands in the places that were named."""
        self.steps.append(step)

    def place(self, target: Any, slot: int, address: int) -> None:
        """``target[slot]`` is an address; 0 is none."""
        owner = self.at(address)
        if owner is not None:
            self.places.append(Place(target, slot, owner, address - self.memories[owner].start, len(self.steps)))
        elif address:
            self.refuse()

    def place_map(self, buffer: Any, part: slice) -> None:
        """A tensor map is in this part of ``buffer``."""
        known = self.maps.get(bytes(buffer[part]))
        if known is None:
            self.refuse()
        else:
            address, made_for = known
            self.place(_MapIn(buffer, part, made_for), 0, address)

    def refuse(self) -> None:
        """Something happened that cannot be played."""
        self.possible = False

    @uncompiled
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if op in _ALLOCATIONS:
            self.memories.append(_memory(result))
            self.made.append(_Made(tuple(result.shape), result.stride(), result.dtype))
        elif not isinstance(result, Tensor):
            self.refuse()
        elif result is kwargs.get("out", args[0] if args else None):
            self._computed(op, args, kwargs)
        elif not any(isinstance(t, Tensor) and _storage(t) == _storage(result) for t in args):  # else a view
            self.refuse()
        return result

    def _computed(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values, names, count = [*args, *kwargs.values()], list(kwargs), len(args)
        if any(isinstance(v, list | tuple) and any(isinstance(t, Tensor) for t in v) for v in values):
            self.refuse()
        found = [self._operand(value) if isinstance(value, Tensor) else (None, None) for value in values]
        operands, views = [i for i, _ in found], [view for _, view in found]
        self.operands.append((len(self.steps), operands))
        constants = [None if isinstance(value, Tensor) else value for value in values]  # no tensor is kept alive
        function = _FUNCTIONS.get(op, op)

        def step(tensors: Sequence[Tensor]) -> object:
            now = [
                c if i is None else tensors[i] if view is None else view.of(tensors[i])
                for i, view, c in zip(operands, views, constants, strict=True)
            ]
            return function(*now[:count], **dict(zip(names, now[count:], strict=True)))

        self.steps.append(step)

    def _operand(self, value: Tensor) -> tuple[int | None, _View | None]:
        """The index in ``memories``, and what part of it an operand is; no view: all."""
        whole = self.index(value)
        if whole is not None:
            return whole, None
        owner = self.at(value.data_ptr())
        if owner is not None:
            start, _, ref = self.memories[owner]
            tensor = ref()
            if tensor is not None and tensor.dtype is value.dtype:
                offset = (value.data_ptr() - start) // value.element_size()
                return owner, _View(tuple(value.shape), value.stride(), offset)
        self.refuse()
        return None, None

    def at(self, address: int) -> int | None:
        """In ``memories``, of the one that holds this address."""
        for owner in reversed(range(len(self.memories))):
            start, end, _ = self.memories[owner]
            if start <= address < end:
                return owner
        return None

    def index(self, value: Any) -> int | None:
        """In ``memories``, of a tensor that is all of an argument or an allocation."""
        return next((i for i, memory in enumerate(self.memories) if memory.tensor() is value), None)

    def owner(self, view: Tensor) -> int | None:
        """In ``memories``, of the allocation that a tensor of the same dtype lies in: the last one at its address."""
        storage = _storage(view)
        for i in reversed(range(len(self.memories) - len(self.made), len(self.memories))):
            if self.memories[i].start == storage:
                if self.made[i - len(self.memories)].dtype is view.dtype:
                    return i
                if storage:  # not an allocation of nothing
                    return None
        return None


def _tape(recorder: Recorder, tensors: list[Tensor], result: Result) -> Tape | None:
    """None if there can be none."""
    returned, arguments = (result,) if isinstance(result, Tensor) else tuple(result), len(tensors)
    found = [i if (i := recorder.index(t)) is not None else recorder.owner(t) for t in returned]
    owners = [i for i in found if i is not None and i >= arguments]
    if not recorder.possible or len(owners) < len(found) or _overlap(recorder.memories[:arguments]):
        return None

    computed = [(i, step) for step, operands in recorder.operands for i in operands if i is not None]
    kept = sorted({i for i in (*owners, *[i for i, _ in computed]) if i >= arguments})
    numbers = {i: i for i in range(arguments)} | {i: arguments + n for n, i in enumerate(kept)}
    uses: dict[int, tuple[int, int]] = {}
    for i, step in (*computed, *[(place.owner, place.step) for place in recorder.places]):
        first, last = uses.get(i, (step, step))
        uses[i] = min(first, step), max(last, step)
    pieces = [i for i in uses if i not in numbers]
    never = len(recorder.steps)
    starts, workspace = arranged(
        [(recorder.memories[i].bytes, *uses[i]) for i in pieces],
        [(recorder.memories[i].bytes, uses.get(i, (never, never))[0]) for i in kept],
    )
    where = {i: (i, 0) for i in numbers}  # of what is a piece: the tensor that it lies in, or -1, and where in it
    where |= {i: (-1 if n is None else kept[n], start) for i, (n, start) in zip(pieces, starts, strict=True)}
    places: list[list[tuple[Any, int, int]]] = [[] for _ in range(len(numbers) + 1)]
    for target, slot, owner, offset, _ in recorder.places:
        whole, start = where[owner]
        places[numbers.get(whole, -1)].append((target, slot, start + offset))
    for _, operands in recorder.operands:  # which steps read
        operands[:] = [None if i is None else numbers[i] for i in operands]

    views = []
    for t, i in zip(returned, owners, strict=True):
        shape, stride, _ = recorder.made[i - arguments]
        whole = t.shape == shape and t.stride() == stride
        views.append((numbers[i], () if whole else (tuple(t.shape), t.stride(), t.storage_offset())))
    seen: dict[int, int] = {}  # address -> the argument there; a tensor may be passed twice
    firsts = [seen.setdefault(memory.start, i) for i, memory in enumerate(recorder.memories[:arguments])]
    twins = [(first, i) for i, first in enumerate(firsts) if first != i]
    made = [recorder.made[i - arguments] for i in kept]
    return Tape(twins, recorder.steps, made, workspace, places, views, isinstance(result, Tensor))


def arranged(
    pieces: Sequence[tuple[int, int, int]], tensors: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int | None, int]], int]:
    """Where each piece of memory lies: in one of ``tensors`` or, None, in a workspace, and from which byte on; and the
    bytes of the workspace.

    A piece is (bytes, first step, last step that uses it), a tensor (bytes, first step). The largest pieces come first,
    each at the lowest place that no other has in one of its steps, in the smallest tensor that is not in use by then.
    """
    found: list[tuple[int | None, int]] = [(None, 0)] * len(pieces)
    inside: dict[int | None, list[int]] = {n: [] for n in (None, *range(len(tensors)))}
    order = sorted(range(len(tensors)), key=lambda n: tensors[n][0])
    end = 0
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i][0]):
        size, first, last = pieces[i]
        for n in (*order, None):
            if n is not None and last >= tensors[n][1]:
                continue
            at = 0
            for j in sorted(inside[n], key=lambda j: found[j][1]):
                other_size, other_first, other_last = pieces[j]
                if other_first <= last and first <= other_last:
                    if at + size <= found[j][1]:
                        break
                    at = max(at, found[j][1] + -(-other_size // _ALIGNMENT) * _ALIGNMENT)
            if n is None or at + size <= tensors[n][0]:
                break
        found[i] = n, at
        inside[n].append(i)
        end = end if n is not None else max(end, at + size)
    return found, end


def _overlap(memories: list[_Memory]) -> bool:
    """Whether an address may belong to two tensors that do not start at one."""
    reach = last = 0
    for start, end in sorted((m.start, m.end) for m in memories if m.start < m.end):
        if last != start < reach:
            return True
        reach, last = max(reach, end), start
    return False


def _memory(t: Tensor) -> _Memory:
    elements = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return _Memory(t.data_ptr(), t.data_ptr() + elements * t.element_size(), weakref.ref(t))


def _storage(t: Tensor) -> int:
    """Tells allocations apart; 0 for those of nothing."""
    return t.untyped_storage().data_ptr()
