"""A tape gives what the function gives that it was recorded from, for other tensors, without running it.

No GPU: tensors of a CPU pose as those of a device, the driver and a Triton launcher compute on the addresses that they
are handed, and a tensor map is a number for the address that it was made of.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("triton")

from pretended_gpu import pretend_gpu

from supersonic_moe.jit import Kernel, KernelSpec, tape, tensor_map, tma
from supersonic_moe.jit.tape import play
from supersonic_moe.kernels.triton import launch as triton_launch

SOURCE = """struct alignas(64) TensorMap { unsigned char bytes[128]; };
extern "C" __global__ void scale(const __grid_constant__ TensorMap map, float* out, const float* add, const i32 n,
                                 float factor) {}
"""
SIZES = [128, 8, 8, 4, 4]
TRITON_KERNEL = SimpleNamespace(fn="scale")


def floats(address: int, n: int) -> Any:
    return (ctypes.c_float * n).from_address(address)


class Machine:
    """A driver and a Triton launcher: both compute ``out = factor * x + add`` on n floats."""

    launches = 0

    def __getattr__(self, name: str) -> Any:
        from cuda.bindings import driver

        return getattr(driver, name)

    def cuLaunchKernelEx(self, config: Any, function: Any, addresses: int, extra: int) -> tuple[int]:
        slots = (ctypes.c_void_p * len(SIZES)).from_address(addresses)
        data = [ctypes.string_at(slot or 0, size) for slot, size in zip(slots, SIZES, strict=True)]
        x, out, add, n = (int.from_bytes(raw[:8], "little") for raw in data[:4])
        self.scale(x, out, add, n, ctypes.c_float.from_buffer_copy(data[4]).value)
        return (0,)

    def run(self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
        self.scale(*rest[3:])

    def scale(self, x: int, out: int, add: int | None, n: int, factor: float) -> None:
        self.launches += 1
        floats(out, n)[:] = [math.nan] * n  # as a kernel may write before it has read all
        added = floats(add, n) if add else [0.0] * n
        floats(out, n)[:] = [factor * a + b for a, b in zip(floats(x, n), added, strict=True)]

    def get(self, key: Any) -> Any:
        return self.run, None, None


@pytest.fixture(name="machine")
def a_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    pretend_gpu(
        monkeypatch,
        machine,
        map_of=lambda address, *_: address.to_bytes(128, "little"),
        allocate=lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype).fill_(77),
    )
    return machine


class Function:
    """Counts its runs, and has memory of its own."""

    def __init__(self, tmp_path: Path, odd: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        (tmp_path / "scale.cu").write_text(SOURCE)
        self.kernel = Kernel(KernelSpec("scale", "scale.cu", root=tmp_path))
        self.odd, self.runs = odd, 0

    def launch(self, x: Tensor, out: Tensor, add: Tensor | None, factor: float) -> None:
        map_x = tensor_map(x.view(-1), box=(4,), swizzle=0)
        self.kernel.launch((1, 1, 1), map=map_x, out=out, add=add, n=x.numel(), factor=factor)

    def __call__(self, x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        """x + 2 (factor x + y), and the first column of the sum of its halves."""
        self.runs += 1
        n = x.numel()
        scratch, out, halves = x.new_empty(n), x.new_empty(2, n // 8, 4), x.new_empty(n // 8, 4)
        triton_launch.launch(TRITON_KERNEL, (1,), (x, scratch, y, n, factor), ())
        self.launch(scratch, out, self.odd(x), 2.0)
        torch.sum(out, 0, out=halves)
        return out, halves[:, 1]


def expected(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    out = (x + 2 * (factor * x + (0 if y is None else y))).view(2, -1, 4)
    return out, out.sum(0)[:, 1]


def check(function: Function, *args: Any, runs: bool) -> None:
    before = function.runs
    torch.testing.assert_close(play(function, args), expected(*args))
    assert function.runs == before + runs


def test_from_the_third_call_on_a_function_is_played(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)
    keep = []
    for call in range(6):
        x, y = torch.randn(32), torch.randn(32)
        keep += [x, y, torch.empty(100 * call)]  # so that the next ones lie elsewhere
        check(function, x, y, 3.0, runs=call < 2)
        check(function, x, None, 3.0, runs=call < 2)
        check(function, x, y, 0.5, runs=call < 2)
        check(function, torch.cat([x, y]), torch.cat([y, y]), 3.0, runs=call < 2)
    assert machine.launches == 6 * 4 * 2


def test_who_watches_sees_every_run(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)
    for call in range(4):
        check(function, torch.randn(32), None, 3.0, runs=call < 2)
        with tape.without_tapes():
            check(function, torch.randn(32), None, 3.0, runs=True)


def test_an_address_inside_of_a_tensor_moves_with_it(machine: Machine, tmp_path: Path) -> None:
    function, runs = Function(tmp_path), []

    def through_the_middle(x: Tensor) -> Tensor:
        runs.append(x.numel())
        scratch, out = x.new_empty(64), x.new_empty(32)
        function.launch(x[16:48], scratch[32:], None, 2.0)
        triton_launch.launch(TRITON_KERNEL, (1,), (scratch[32:], out[16:], None, 16, 3.0), ())
        function.launch(scratch[48:], out[:16], None, 5.0)
        return out[4:]

    for _ in range(5):
        x = torch.randn(64)
        got = play(through_the_middle, (x,))
        torch.testing.assert_close(got, torch.cat([10 * x[32:48], 6 * x[16:32]])[4:])
    assert len(runs) == 2


def test_what_is_used_at_different_times_shares_room(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)

    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            y = torch.empty_like(x)
            function.launch(x, y, None, 2.0)
            x = y
        return y

    x = torch.randn(256)
    for _ in range(5):
        torch.testing.assert_close(play(chain, (x,)), 64 * x)
    (chained,) = [t for t in tape.state.tapes.values() if t is not None]
    assert chained._workspace == 2 * 4 * 256


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 9), st.integers(0, 9)), max_size=20),
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 12)), max_size=4),
)
def test_pieces_in_use_at_one_time_do_not_overlap(
    drawn: list[tuple[int, int, int]], tensors: list[tuple[int, int]]
) -> None:
    pieces = [(size, min(a, b), max(a, b)) for size, a, b in drawn]
    found, end = tape.arranged(pieces, tensors)
    for step in range(10):
        there = sorted(
            (-1 if n is None else n, start, start + size)
            for (size, first, last), (n, start) in zip(pieces, found, strict=True)
            if first <= step <= last
        )
        assert all(one[0] != other[0] or one[2] <= other[1] for one, other in itertools.pairwise(there))
    for (size, _, last), (n, start) in zip(pieces, found, strict=True):
        room, first_use = (end, 10) if n is None else tensors[n]
        assert start % 512 == 0 and start + size <= room and last < first_use
    assert end <= sum(-(-size // 512) * 512 for size, _, _ in pieces)


def test_what_is_done_with_before_a_result_is_written_lies_in_it(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)

    def chain(x: Tensor) -> Tensor:
        y, z, out = x.new_empty(128), x.new_empty(8), x.new_empty(256)
        function.launch(x, y, None, 2.0)
        function.launch(y[:8], z, None, 3.0)
        function.launch(z, out[:8], None, 5.0)
        return out

    x = torch.randn(128)
    for _ in range(5):
        torch.testing.assert_close(play(chain, (x,))[:8], 30 * x[:8])
    (chained,) = [t for t in tape.state.tapes.values() if t is not None]
    assert chained._workspace == 4 * 8


class Drawn:
    """A program of drawn steps: to forget a tensor, to allocate one that is written later or never, or to write to one,
    with what was written before. Some of the last ones are returned.
    """

    def __init__(self, kernels: Function, steps: list[tuple[str, int, int, int]], results: int) -> None:
        self.kernels, self.steps, self.results, self.runs = kernels, steps, results, 0

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        self.runs += 1
        there, waiting = [x, y], [x.new_empty(8)]
        for what, size, i, j in self.steps:
            source, added, again = there[i % len(there)], there[j % len(there)], there[j // 2 % len(there)]
            if what == "forget":
                there[2:] = [t for t in there[2:] if t is not source]
            elif what == "wait":
                waiting.append(x.new_empty(size))
            elif j % 3 == 0 and not any(again is t for t in (x, y, source, added)):
                self.write(what, source, added, again)
            else:
                there.append(waiting.pop() if waiting and j % 2 else x.new_empty(size))
                self.write(what, source, added, there[-1])
        return *[t[4:] if t.numel() > 128 else t for t in there[2:][-self.results :]], x.new_empty(300)

    def write(self, what: str, source: Tensor, added: Tensor, out: Tensor) -> None:
        for start in range(0, out.numel(), source.numel()):
            n = min(source.numel(), out.numel() - start)
            add = added if added.numel() >= n else None
            if what == "cuda":
                self.kernels.launch(source[:n], out[start:], add, 0.5)
            elif what == "triton":
                triton_launch.launch(TRITON_KERNEL, (1,), (source, out[start:], add, n, -1.0), ())
            else:
                torch.add(source[:n], 1.0, out=out[start : start + n])


STEPS = st.tuples(
    st.sampled_from(["cuda", "triton", "torch", "forget", "wait"]),
    st.sampled_from([64, 128, 200, 400]), st.integers(0, 30), st.integers(0, 30),
)  # fmt: skip


@settings(max_examples=150)
@given(steps=st.lists(STEPS, min_size=4, max_size=16), results=st.integers(1, 3))
def test_drawn_programs(steps: list[tuple[str, int, int, int]], results: int, machine: Machine, tmp_path: Path) -> None:
    function = Drawn(Function(tmp_path), steps, results)
    for call in range(4):
        x, y = torch.randn(200), torch.randn(128)
        *found, unwritten = play(function, (x, y))
        assert function.runs == 1 + min(call, 1) and unwritten.shape == (300,)
        *run, _ = function(x, y)
        function.runs -= 1
        assert len(found) == len(run) and all(map(torch.equal, found, run))


def test_results_of_two_plays_are_two(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)
    x, y = torch.randn(32), torch.randn(32)
    results = [play(function, (x + call, y, 3.0)) for call in range(5)]
    for call, result in enumerate(results):
        torch.testing.assert_close(result, expected(x + call, y, 3.0))


def test_an_operand_may_be_a_part_of_a_tensor(machine: Machine) -> None:
    runs = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        runs.append(x)
        out = x.new_empty(4, 4)
        torch.mm(x.view(8, 4).t(), y[8:40].view(8, 4), out=out)
        return torch.add(out, out.t(), out=x.new_empty(4, 4))

    for call in range(5):
        x, y = torch.randn(64)[16 * call % 32 :][:32], torch.randn(48)
        square = x.view(8, 4).t() @ y[8:40].view(8, 4)
        torch.testing.assert_close(play(product, (x, y)), square + square.t())
    assert len(runs) == 2


def test_an_argument_that_came_twice_may_come_as_two(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)
    x, y = torch.randn(32), torch.randn(32)
    for call in range(4):
        check(function, x, x, 3.0, runs=call < 2)
    check(function, x, y, 3.0, runs=True)
    check(function, y, y, 3.0, runs=False)


def test_an_argument_at_an_odd_address_is_for_the_function(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)
    for call in range(4):
        check(function, torch.randn(32), torch.randn(33)[1:], 3.0, runs=True)
        check(function, torch.randn(32), torch.randn(32), 3.0, runs=call == 0)


OUTSIDE = torch.ones(32)
ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "a new tensor": lambda x: x * 1,
    "memory of nobody": lambda x: OUTSIDE,
    "memory of nobody, written to": lambda x: OUTSIDE.copy_(x),
    "tensors in a list": lambda x: torch.cat([x[:16], x[16:]], out=x.new_empty(32)),
    "a number that is read": lambda x: x[: 32 + 0 * int(x[0].item())],
}


@pytest.mark.parametrize("why", ODD)
def test_what_no_tape_can_hold_runs_each_time(why: str, machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path, ODD[why])
    for _ in range(4):
        x = torch.randn(32)
        OUTSIDE.copy_(x)
        check(function, x, torch.randn(32), 3.0, runs=True)


def test_arguments_that_overlap_run_each_time(machine: Machine, tmp_path: Path) -> None:
    function = Function(tmp_path)
    for _ in range(4):
        both = torch.randn(48)
        check(function, both[:32], both[16:], 3.0, runs=True)


def test_a_result_of_another_dtype_is_not_what_lay_there_before(machine: Machine, tmp_path: Path) -> None:
    """Whether new memory is where the freed tensor was depends on what else was freed before: some size will do."""
    function, same = Function(tmp_path), []

    def seen_as_floats(x: Tensor) -> Tensor:
        scratch = torch.empty_like(x)
        address = scratch.data_ptr()
        function.launch(x, scratch, None, 1.0)
        del scratch
        out = torch.empty(4 * x.numel(), dtype=torch.uint8).view(torch.float32)
        same.append(tape.state.recorder is not None and out.data_ptr() == address)
        function.launch(x, out, None, 2.0)
        return out

    for size in (2**power for power in range(4, 20)):
        for _ in range(4):
            x = torch.randn(size)
            torch.testing.assert_close(play(seen_as_floats, (x,)), 2 * x)
    assert any(same)


def test_after_an_interrupt_all_addresses_are_written_again(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = Function(tmp_path)

    def both(added: Tensor, x: Tensor) -> Tensor:
        out = x.new_empty(32)
        function.launch(x, out, added, 2.0)
        return out

    def interrupted(*_: Any) -> bytes:
        raise KeyboardInterrupt

    added, x = torch.randn(32), torch.randn(32)
    for _ in range(3):
        torch.testing.assert_close(play(both, (added, x)), 2 * x + added)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tma, "_cached", interrupted)
        play(both, (torch.randn(32), torch.randn(32)))
    torch.testing.assert_close(play(both, (added, x)), 2 * x + added)


def test_a_recording_and_a_tape_keep_no_tensor_alive(machine: Machine, tmp_path: Path) -> None:
    function, arguments, allocated = Function(tmp_path), [], []

    class Seen(tape.DispatchMode):  # type: ignore[misc, name-defined]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if "new_empty" in str(op):
                allocated.append(weakref.ref(result))
            return result

    for call in range(4):
        x = torch.randn(32)
        arguments.append(weakref.ref(x))
        with Seen():
            check(function, x, None, 3.0, runs=call < 2)
        del x
        assert not any(ref() is not None for ref in (*arguments, *allocated)), call
    assert len(allocated) == 2 * 3


def test_an_error_in_a_recording_leaves_no_recorder(machine: Machine, tmp_path: Path) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            play(Function(tmp_path, fails), (torch.randn(32), None, 3.0))
        assert tape.state.recorder is None


def test_kinds_of_calls_are_forgotten_in_time(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tape, "KEPT", 3)
    function = Function(tmp_path)
    for n in range(1, 10):
        check(function, torch.randn(8 * n), None, 3.0, runs=True)
        assert len(tape.state.tapes) <= 3
