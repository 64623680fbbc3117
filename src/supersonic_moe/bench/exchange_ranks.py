"""The exchange suite over the ranks of torchrun: what the links between their GPUs give, and what that costs products.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m supersonic_moe bench exchange

A case is a part of it. All ranks do the same at once, so bytes go both ways; GB/s are those of one way. Times are those
of the slowest rank, call by call (``ranks.py``).

    copies       copy engines: a rank writes to the memory of the next one (push), or reads from it (pull)
    kernels      the same by 4 to 24 blocks of a kernel (``exchange_kernel.py``)
    all_to_all   the collective of torch.distributed; bytes are those that leave a rank
    gemm         the up-projection of the reference shape: alone, on fewer multiprocessors, beside pushes and pulls
    flags        an exchange that carries nothing, from begin to meet, one behind the other, in a CUDA graph and eager;
                 ``dist.barrier``

Small copies are timed several at a time (``Sizes.at_once``), since the host needs as long for each as the smallest
take; a time is that of one. Before any is timed, what it moves is compared, byte by byte.

Beside a product, on a stream of high priority, one copy follows another from before the first call of a slice until
after its last one: else the result is missing. ``beside_push`` and ``beside_pull`` are copies by engines. ``free_8``
launches the product on 8 multiprocessors less than there are, with nothing beside it; ``beside_push_8blocks`` on all of
them, where 8 blocks of a kernel push and those of the product wait for each other; ``free_8_beside_push_8blocks`` on
those that the kernel leaves free.

Nobody waits for ever: a rank that does not come within ``LIMIT_S`` ends the run, and ``faulthandler`` ends a rank that
stays in one part for longer, and prints where. What was measured by then has been written.
"""

from __future__ import annotations

import faulthandler
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from supersonic_moe.bench import exchange
from supersonic_moe.bench.exchange import ExchangeResult, current_stream, rates
from supersonic_moe.bench.exchange_beside import Beside, Load, LoadedClock, on_fewer
from supersonic_moe.bench.ranks import SlowestRank, agreed, group_of_ranks, told_by_all
from supersonic_moe.bench.shapes import GEMM_CASES, GemmCase
from supersonic_moe.bench.timing import (
    Call,
    Clock,
    LastCaseError,
    Missing,
    NoResultError,
    attempt,
    clock_for,
    measure,
    missing,
    of_a_call,
)
from supersonic_moe.jit.driver import copy_bytes
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Rows
from supersonic_moe.parallel.symmetric import HEAD, Memory, shared_memory

MIB = 1 << 20
BLOCKS = (4, 8, 16, 24)
FREE = (4, 8, 16)
EXCHANGES = 20
"""One behind the other in a call of ``flags``."""
SUSTAINED = 4.0
"""Times as much load for products as for copies, which do not reach the limit of power."""

Move = Callable[[Tensor, Tensor, int], None]
"""Bytes from the second tensor to the first, so many times over."""


class Sizes(NamedTuple):
    copies: tuple[int, ...]
    by_kernel: tuple[int, ...]
    load: int
    """Of a copy beside products: few enough of them fit into a queue."""
    at_once: int
    product: GemmCase


GPU_SIZES = Sizes(
    tuple(n * MIB for n in (1, 4, 16, 64, 128)), (4 * MIB, 64 * MIB), 256 * MIB, 16 * MIB, GEMM_CASES[0]
)  # fmt: skip
CPU_SIZES = Sizes((1 << 16, 1 << 17), (1 << 16,), 1 << 18, 1 << 17, GemmCase.parse("gemm:2,16,16,16"))


class Contender(NamedTuple):
    call: Call
    bytes: int = 0
    times: int = 1
    """In a call."""


class Runner:
    """Measures parts over the ranks of torchrun, inside ``over_ranks``."""

    def __init__(self, device: torch.device, *, warm_ms: float, min_ms: float) -> None:
        self.device, self.warm_ms, self.min_ms = device, warm_ms, min_ms
        self.sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
        self._host: dist.ProcessGroup | None = None
        self._found: _Ends | str | None = None

    @contextmanager
    def over_ranks(self) -> Iterator[None]:
        with group_of_ranks(self.device, exchange.LIMIT_S) as self._host:
            yield
            self._found = None  # before the group is gone

    def run(self, part: str, progress: Callable[[str], None]) -> ExchangeResult:
        """After an error that not all ranks have agreed on they may be in different calls: no other part follows."""

        def step(doing: str) -> None:
            load_s = (self.warm_ms + self.min_ms) / 10  # a hundred times what one contender is asked for
            faulthandler.dump_traceback_later(2 * exchange.LIMIT_S + load_s, exit=True, file=2)
            progress(doing)

        step("first calls")
        assert self._host is not None
        try:
            found = agreed(
                attempt(partial(PARTS[part], self, ExchangeResult(part), step)), self._host, exchange.LIMIT_S
            )
        except Exception as error:
            raise LastCaseError(f"{part}: {missing(error).reason}.") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        if isinstance(found, Missing):
            works = not isinstance(attempt(self._synchronize), Missing)
            raise (NoResultError if works else LastCaseError)(f"{part}: {found.reason}.")
        assert isinstance(found, ExchangeResult)
        return found

    # ---- parts -------------------------------------------------------------------------------------------------------

    def copies(self, result: ExchangeResult, progress: Callable[[str], None]) -> ExchangeResult:
        if isinstance(ends := self._ends(), str):
            return _excused(result, ends, "push", "pull")
        self._check(ends, by_copy_engines)
        calls = self._both_ways(ends, by_copy_engines, self.sizes.copies, "")
        return self._timed(result, calls, progress)

    def kernels(self, result: ExchangeResult, progress: Callable[[str], None]) -> ExchangeResult:
        if isinstance(ends := self._ends(), str):
            return _excused(result, ends, "push", "pull")
        calls: dict[str, Contender] = {}
        for blocks in BLOCKS:
            move = by_kernel(blocks)
            self._check(ends, move)
            calls |= self._both_ways(ends, move, self.sizes.by_kernel, f"_{blocks}blocks")
        return self._timed(result, calls, progress)

    def all_to_all(self, result: ExchangeResult, progress: Callable[[str], None]) -> ExchangeResult:
        ranks, calls = dist.get_world_size(), {}
        for size in self.sizes.copies:
            share = size // (ranks - 1)
            leaving, arriving = (torch.zeros(ranks * share, dtype=torch.uint8, device=self.device) for _ in range(2))
            leaving.random_(0, 256)
            send, times = partial(dist.all_to_all_single, arriving, leaving), self._times(size)
            calls[_name(size)] = Contender(partial(_again, send, times), share * (ranks - 1), times)
        return self._timed(result, calls, progress)

    def flags(self, result: ExchangeResult, progress: Callable[[str], None]) -> ExchangeResult:
        on = [self.device.index] if self.device.type == "cuda" else None
        calls = {"barrier": Contender(partial(dist.barrier, device_ids=on))}
        if isinstance(ends := self._ends(), str):
            return self._timed(_excused(result, ends, "begin_and_meet"), calls, progress)
        flags = ends.memory.flags
        exchanges: Call = partial(_exchanges, flags)
        try:
            if self.device.type == "cuda":
                calls["begin_and_meet_eager"] = Contender(exchanges, times=EXCHANGES)
                exchanges = self._captured(exchanges)
            calls["begin_and_meet"] = Contender(exchanges, times=EXCHANGES)
            return self._timed(result, calls, progress)
        except RuntimeError as error:
            if (failure := flags.failure()) is None:
                raise
            raise NoResultError(f"a wait has failed: {failure}") from error

    def gemm(self, result: ExchangeResult, progress: Callable[[str], None]) -> ExchangeResult:
        case = self.sizes.product
        backend, product = self._product()
        calls: dict[str, Call] = {"alone": product}
        if backend == "sm90":
            fewer = {f"free_{n}": partial(on_fewer, n, product) for n in FREE}
            if unequal := [name for name, call in fewer.items() if not torch.equal(call(), product())]:
                raise NoResultError(f"{unequal[0]} has other bits than the product on all multiprocessors")
            calls |= fewer
            if isinstance(ends := self._ends(), str):
                _excused(result, ends, "beside_push", "beside_pull")
            else:
                progress("how long loads take")
                calls |= self._beside(ends, product)
        self._timed(result, {name: Contender(call) for name, call in calls.items()}, progress, SUSTAINED)
        for metrics in result.metrics.values():
            metrics["tflops"] = case.flops / metrics["us"] / 1e6
            if "alone" in result.metrics:
                metrics["slowdown"] = metrics["us"] / result.metrics["alone"]["us"]
        return result

    def _product(self) -> tuple[str, Callable[[], Tensor]]:
        """The name of a backend, and what it multiplies."""
        case = self.sizes.product
        columns, depth = case.sizes
        torch.manual_seed(0)
        a_PK, w_ENK = (
            torch.randn(shape, device=self.device, dtype=torch.bfloat16)
            for shape in ((case.rows, depth), (case.experts, columns, depth))
        )
        offsets = torch.arange(case.experts + 1, device=self.device, dtype=torch.int32) * case.rows_per_expert
        backend = registry.choose(self.device, a_PK.dtype, hidden=depth, intermediate=columns).name
        multiply = registry.kernels(backend).experts.grouped_mm
        return backend, partial(multiply, Rows(a_PK), w_ENK.transpose(1, 2), offsets)

    def _beside(self, ends: _Ends, product: Callable[[], Tensor]) -> dict[str, Call]:
        """Products under each load."""
        size = self.sizes.load
        moves = {"": by_copy_engines, **{f"_{n}blocks": by_kernel(n) for n in FREE}}
        side = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        alone_us = self._median(product)
        loads: dict[str, Load] = {}
        for name, move in moves.items():
            for way, to, source in ends.ways(size):
                if way == "push" or not name:
                    unit = partial(move, to, source)
                    loads[f"{way}{name}"] = Load(unit, self._median(partial(unit, 1)), side)
        found: dict[str, Call] = {f"beside_{name}": Beside(product, load, alone_us) for name, load in loads.items()}
        for n in FREE:
            name = f"push_{n}blocks"
            found[f"free_{n}_beside_{name}"] = Beside(partial(on_fewer, n, product), loads[name], alone_us)
        return found

    # ---- their parts -------------------------------------------------------------------------------------------------

    def _ends(self) -> _Ends | str:
        """What this rank can reach, or why nothing. Collective, at the first call."""
        if self._found is None:
            assert dist.group.WORLD is not None
            memory = shared_memory(dist.group.WORLD, self.sizes.load, exchange.LIMIT_S)
            self._found = memory if isinstance(memory, str) else _Ends(memory, self.sizes.load)
        return self._found

    def _check(self, ends: _Ends, move: Move) -> None:
        """Raises NoResultError on all ranks if bytes that are moved are others in the end, on any."""
        assert self._host is not None
        meet = partial(told_by_all, group=self._host, limit_s=exchange.LIMIT_S)
        size = max(self.sizes.copies)
        for way, to, source in ends.ways(size):
            ends.fill()
            self._synchronize()
            meet(None)
            move(to, source, 1)
            self._synchronize()
            meet(None)
            if wrong := [rank for rank, right in enumerate(meet(ends.has_come(way, size))) if not right]:
                raise NoResultError(f"rank {wrong[0]} has other bytes than were to come by {way}")

    def _both_ways(self, ends: _Ends, move: Move, sizes: tuple[int, ...], by: str) -> dict[str, Contender]:
        return {
            f"{way}{by}_{_name(size)}": Contender(partial(move, to, source, self._times(size)), size, self._times(size))
            for size in sizes
            for way, to, source in ends.ways(size)
        }

    def _captured(self, call: Call) -> Call:
        """In a CUDA graph: the host needs longer for the launches of an exchange than GPUs need to tell each other."""
        call()
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # those of torch.distributed may look at events
            call()
        return graph.replay

    def _times(self, size: int) -> int:
        return max(1, self.sizes.at_once // size)

    def _clock(self) -> Clock:
        assert self._host is not None
        return SlowestRank(LoadedClock(clock_for(self.device)), self._host)

    def _median(self, call: Call) -> float:
        return statistics.median(self._clock().slice(call, 1, 3).times_us)

    def _timed(
        self, result: ExchangeResult, calls: Mapping[str, Contender], progress: Callable[[str], None], load: float = 1.0
    ) -> ExchangeResult:
        assert self._host is not None
        progress(f"timing {len(calls)} contenders")
        contenders = {name: one.call for name, one in calls.items()}
        timings = measure(contenders, self._clock(), warm_ms=load * self.warm_ms, min_ms=load * self.min_ms)
        self._synchronize()  # before any rank lets go of what the others' last calls reach
        for name, own in timings.items():
            timing = agreed(own, self._host, exchange.LIMIT_S)
            if isinstance(timing, Missing):
                result.missing[name] = timing.reason
            else:
                result.metrics[name] = rates(of_a_call(timing, calls[name].times), calls[name].bytes)
        return result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


PARTS: Mapping[str, Callable[[Runner, ExchangeResult, Callable[[str], None]], ExchangeResult]] = {
    "copies": Runner.copies,
    "kernels": Runner.kernels,
    "all_to_all": Runner.all_to_all,
    "gemm": Runner.gemm,
    "flags": Runner.flags,  # last: after a wait that fails nothing else runs on that GPU
}


def _excused(result: ExchangeResult, why: str, *names: str) -> ExchangeResult:
    result.missing |= dict.fromkeys(names, why)
    result.excused |= set(names)
    return result


def _name(size: int) -> str:
    return f"{size // MIB}MiB" if size >= MIB else f"{size // 1024}KiB"


def _again(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _exchanges(flags: Any) -> None:
    for number in range(EXCHANGES):
        flags.begin(number % 2, 1, 0)
        flags.meet(0, 1, 0)


# ---- bytes between ranks ---------------------------------------------------------------------------------------------


def by_copy_engines(to: Tensor, source: Tensor, times: int) -> None:
    """On the current stream, as ``parallel/copies.py`` does it."""
    stream = current_stream(source.device)
    for _ in range(times):
        copy_bytes(to.data_ptr(), source.data_ptr(), source.numel(), stream)


def by_kernel(blocks: int) -> Move:
    """In one launch."""
    from supersonic_moe.bench.exchange_kernel import copy_bytes_by

    return lambda to, source, times: copy_bytes_by(to, source, blocks, times)


class _Ends:
    """What a rank writes and reads: memory of its own, and that of the next rank."""

    def __init__(self, memory: Memory, size: int) -> None:
        rank, ranks = dist.get_rank(), len(memory.blocks)
        self.memory, self._rank = memory, rank
        self._neighbours = {"push": (rank - 1) % ranks, "pull": (rank + 1) % ranks}
        self._bank, self._there = (memory.blocks[r][HEAD : HEAD + size] for r in (rank, (rank + 1) % ranks))
        self._leaving, self._arrived = self._bytes_of(rank), torch.zeros_like(self._bank)

    def ways(self, size: int) -> list[tuple[str, Tensor, Tensor]]:
        """(name, to, from)"""
        return [
            ("push", self._there[:size], self._leaving[:size]),
            ("pull", self._arrived[:size], self._there[:size]),
        ]  # fmt: skip

    def fill(self) -> None:
        """As if this rank had put its bytes into its bank, for others to pull."""
        self._bank.copy_(self._leaving)
        self._arrived.zero_()

    def has_come(self, way: str, size: int) -> bool:
        came = self._bank if way == "push" else self._arrived
        return torch.equal(came[:size], self._bytes_of(self._neighbours[way])[:size])

    def _bytes_of(self, rank: int) -> Tensor:
        device = self._bank.device
        generator = torch.Generator(device).manual_seed(rank)
        return torch.randint(0, 256, self._bank.shape, generator=generator, device=device, dtype=torch.uint8)
