"""What a function launches, launched again for other tensors of the same kind, at the host time of the driver's calls.

    play(backward, arguments)      # the result of backward(*arguments), a tensor or a tuple of tensors

Most of what a step of a layer costs the host is worked out anew in each call and comes out the same: forms of kernels,
grids, strides, sizes of buffers. All of it follows from numbers and from shapes, strides and dtypes of tensors. So the
first call with arguments of one kind just runs, and the second is recorded, as a tape:

    tensors     those that the call returns, or that torch computes on: allocated anew each time
    workspace   everything else that the call allocated, one piece of memory
    steps       launches with their argument buffers, and operators of torch that write to a tensor
    places      where in an argument buffer an address is, and of what tensor

From the third call on the tape is played: allocate, write the addresses that are others than last time, launch. A CUDA
graph does the same on the device; a tape works on tensors wherever they lie, and inside the capture of a graph.

An address in an argument buffer must be one of the call's own tensors. Where something else happens, the function runs
each time: an operator that returns a new tensor, an address of unknown origin, tensors that overlap (which of them is
meant?), a workspace that a large batch should not hold all at once. Arguments must start at multiples of 16 bytes,
because kernels are chosen by that. Launches of ``Kernel`` and of ``kernels/triton/launch.py``, and tensor maps, report
to the recorder; nothing else in the package enqueues work behind torch's back.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.private_api import DispatchMode, current_device, empty_strided

KEPT = 512  # kinds of calls of a thread; then all are forgotten
MAX_WORKSPACE = 256 << 20  # bytes; a batch that needs more keeps the GPU busy longer than the host
_ALIGNMENT = 512  # of what torch allocates, and of each piece of a workspace
_VECTOR = 16  # bytes; of arguments

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip

Result = Tensor | tuple[Tensor, ...]
Step = Callable[[Sequence[Tensor]], object]
"""Gets the arguments that are tensors, then those that the tape allocates."""


class Place(NamedTuple):
    """``target[slot]`` holds an address and takes another one."""

    target: Any
    slot: int
    address: int


class _MapIn:
    """A tensor map in an argument buffer, which is made for another address by writing that address."""

    def __init__(self, buffer: Any, part: slice, made_for: Callable[[int], bytes]) -> None:
        self._buffer, self._part, self._made_for = buffer, part, made_for

    def __setitem__(self, _: int, address: int) -> None:
        self._buffer[self._part] = self._made_for(address)


class Recorder(DispatchMode or object):  # type: ignore[misc]
    """What happens in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.places: list[Place] = []
        self.allocated: list[Tensor] = []  # kept to the end, so that each has an address of its own
        self.maps: dict[bytes, tuple[int, Callable[[int], bytes]]] = {}
        self.torch_steps: list[tuple[int, Any, tuple[Any, ...], dict[str, Any]]] = []  # with their place in ``steps``
        self.possible = True

    def launched(self, step: Step) -> None:
        """``step`` launches the same again, with what then stands in the places that were named."""
        self.steps.append(step)

    def place(self, target: Any, slot: int, address: int) -> None:
        """``target[slot]`` is an address; 0 is none."""
        if address:
            self.places.append(Place(target, slot, address))

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

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if op in _ALLOCATIONS:
            self.allocated.append(result)
        elif not isinstance(result, Tensor):
            self.refuse()
        elif result is kwargs.get("out", args[0] if args else None):
            self.torch_steps.append((len(self.steps), op, args, kwargs))
            self.steps.append(lambda tensors: None)  # until all tensors are known
        elif not any(isinstance(t, Tensor) and _memory(t) == _memory(result) for t in args):  # else a view
            self.refuse()
        return result


class _State(threading.local):
    """Nobody else writes the argument buffers."""

    recorder: Recorder | None = None

    def __init__(self) -> None:
        self.tapes: dict[Hashable, Tape | None] = {}
        """None: called once."""


state = _State()


class _Made(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Tape:
    """One call, for any tensors of the same kind. ``places`` has a list for each tensor and one for the workspace."""

    def __init__(
        self, twins: list[tuple[int, int]], steps: list[Step], made: list[_Made], workspace: int,
        places: list[list[Place]], returned: list[tuple[int, tuple[Any, ...]]], single: bool,
    ) -> None:  # fmt: skip
        self._twins, self._steps, self._made, self._workspace = twins, steps, made, workspace
        self._places, self._returned, self._single = places, returned, single
        self._addresses = [-1] * len(places)

    def fits(self, addresses: list[int]) -> bool:
        """Whether the arguments that were at one address are so again."""
        return all(addresses[i] == addresses[j] for i, j in self._twins)

    def play(self, tensors: list[Tensor], addresses: list[int]) -> Result:
        """``tensors``: the arguments, at ``addresses``."""
        for shape, stride, dtype in self._made:
            made = empty_strided(shape, stride, dtype)
            tensors.append(made)
            addresses.append(made.data_ptr())
        workspace = empty_strided((self._workspace,), (1,), torch.uint8) if self._workspace else None
        addresses.append(0 if workspace is None else workspace.data_ptr())
        if addresses != self._addresses:
            for address, last, places in zip(addresses, self._addresses, self._places, strict=True):
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
    kind: list[Any] = [function]
    tensors, addresses, bits = [], [], 0
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            bits |= address
            tensors.append(arg)
            addresses.append(address)
            kind += (arg.dtype, arg.get_device(), arg.shape, arg.stride())
        else:
            kind.append(arg)
    key = tuple(kind)
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
    recorder = state.recorder = Recorder()
    try:
        with recorder:
            result = function(*args)
    finally:
        state.recorder = None
    state.tapes[key] = _tape(recorder, tensors, result) or _NEVER
    return result


# ---- from a recording to a tape --------------------------------------------------------------------------------------


def _tape(recorder: Recorder, tensors: list[Tensor], result: Result) -> Tape | None:
    """None if there can be none."""
    returned = (result,) if isinstance(result, Tensor) else tuple(result)
    computed_on = [t for _, _, args, kwargs in recorder.torch_steps for t in _tensors_of(args, kwargs)]
    owned = {_memory(t) for t in (*returned, *computed_on)}
    made = [t for t in recorder.allocated if _memory(t) in owned]
    scratch = [t for t in recorder.allocated if _memory(t) not in owned]
    all_tensors = [*tensors, *made]
    if not recorder.possible or any(_index(all_tensors, t) is None for t in computed_on):
        return None

    first: dict[int, int] = {}  # address -> the argument there; an argument may be passed twice
    twins = []
    for i, t in enumerate(tensors):
        before = first.setdefault(t.data_ptr(), i)
        if before != i:
            twins.append((before, i))
    doubled = {i for _, i in twins}
    regions = [(t.data_ptr(), t.data_ptr() + _extent(t), i, 0) for i, t in enumerate(all_tensors) if i not in doubled]
    workspace = 0
    for t in scratch:
        regions.append((t.data_ptr(), t.data_ptr() + _extent(t), len(all_tensors), workspace))
        workspace += -(-_extent(t) // _ALIGNMENT) * _ALIGNMENT
    regions = sorted(region for region in regions if region[0] < region[1])
    overlap = any(end > start for (_, end, *_), (start, *_) in itertools.pairwise(regions))
    if overlap or workspace > MAX_WORKSPACE:
        return None

    places: list[list[Place]] = [[] for _ in range(len(all_tensors) + 1)]
    for target, slot, address in recorder.places:
        owner = next(((i, at + address - start) for start, end, i, at in regions if start <= address < end), None)
        if owner is None:
            return None
        places[owner[0]].append(Place(target, slot, owner[1]))

    steps = list(recorder.steps)
    for at, op, args, kwargs in recorder.torch_steps:
        steps[at] = _torch_step(op, args, kwargs, all_tensors)
    views = []
    for t in returned:
        base = _index(made, t)
        if base is None:
            base = next((i for i, m in enumerate(made) if _memory(m) == _memory(t) and m.dtype is t.dtype), None)
        if base is None:
            return None
        base += len(tensors)
        whole = t.shape == all_tensors[base].shape and t.stride() == all_tensors[base].stride()
        views.append((base, () if whole else (t.shape, t.stride(), t.storage_offset())))
    kinds = [_Made(tuple(t.shape), t.stride(), t.dtype) for t in made]
    return Tape(twins, steps, kinds, workspace, places, views, isinstance(result, Tensor))


def _torch_step(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Step:
    """``op`` on the tensors that stand where these stand in ``tensors``."""

    def named(value: Any) -> tuple[int | None, Any]:
        """Its index, or what is no tensor: a step keeps none alive."""
        at = _index(tensors, value)
        return at, value if at is None else None

    by_position, by_name = [named(a) for a in args], {name: named(a) for name, a in kwargs.items()}

    def step(now: Sequence[Tensor]) -> object:
        return op(
            *[a if i is None else now[i] for i, a in by_position],
            **{name: a if i is None else now[i] for name, (i, a) in by_name.items()},
        )

    return step


def _index(tensors: Sequence[Tensor], value: Any) -> int | None:
    return next((i for i, t in enumerate(tensors) if t is value), None)


def _tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]


def _memory(t: Tensor) -> int:
    """Tells allocations apart; 0 for those of nothing."""
    return t.untyped_storage().data_ptr()


def _extent(t: Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))) * t.element_size()
