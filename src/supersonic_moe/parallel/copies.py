"""Rows between ranks that reach each other's memory, by copy engines: no collective, no wait for the host.

    gather      each rank puts its rows into its own block; all read them from there     x, ids, scores; dout
    exchange    each rank puts rows into the block of the rank that wants them           partial outputs, dx, dscores

R ranks, M places of a rank in a call. A block has two banks of R·M rows, used in turn, so that a rank which is ahead
need not wait until the last exchange has been read everywhere, only the one before it. The flags around the copies, and
why no row is read too early or overwritten too soon, are in ``kernels/sm90/exchange_flags.py``. Rows that a bank does
not hold at once travel in several exchanges, so many places of each rank at a time.

Bytes through NVLink, each way: (R - 1)·M rows. Beside them M rows are copied within the GPU for ``gather``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.jit.driver import copy_bytes, fill_bytes
from supersonic_moe.jit.launch import on_device
from supersonic_moe.parallel.collectives import Collectives, Needed
from supersonic_moe.parallel.symmetric import HEAD, Memory
from supersonic_moe.parallel.watch import PHASES, Watch, carried
from supersonic_moe.private_api import raw_stream

ALIGNMENT = 1024
"""Bytes at multiples of which banks start."""


def bank_of(ranks: int, places: int, row_bytes: int, largest: int | None = None) -> int:
    """Bytes of a bank that holds all rows, or of the ``largest`` that there may be."""
    one, whole = (-(-ranks * rows * row_bytes // ALIGNMENT) * ALIGNMENT for rows in (1, places))
    return whole if largest is None else min(whole, max(one, largest))


def shares(places: int, row_bytes: int, ranks: int, bank: int) -> list[slice]:
    """The places of each rank that travel at a time through a bank of so many bytes: as few shares as possible, of
    equal size.
    """
    fewest = -(-places // (bank // (ranks * row_bytes)))
    step = -(-places // fewest)
    return [slice(first, min(first + step, places)) for first in range(0, places, step)]


class Departure:
    """Rows on their way home, part by part, beside what the current stream does. Between its making, which waits until
    other ranks have read the bank that it goes through, and ``arrived``, there is no other exchange.
    """

    def __init__(self, copies: Copies, places: int, columns: int, dtype: torch.dtype, call: int, phase: str) -> None:
        self._copies, self._rows, self._columns, self._dtype = copies, copies.ranks * places, columns, dtype
        self._row_bytes = columns * dtype.itemsize
        self._share = places * self._row_bytes
        self._at = call, phase
        with copies.inside(*self._at):
            self._bank = copies.bank(*self._at)

    def send(self, rows: Tensor, targets: Sequence[int]) -> None:
        """M rows for each of the ``targets``, one after the other."""
        rows = rows.contiguous()
        self._copies.hold(rows)
        with self._copies.inside(*self._at):
            self._copies.push(self._bank, targets, rows.data_ptr(), self._share)

    def own(self) -> Tensor:
        """(M, C): the place of what this rank has for itself."""
        rows, rank = self._rows // self._copies.ranks, self._copies.rank
        return self._copies.rows_in_bank(self._rows, self._columns, self._dtype)[rank * rows : (rank + 1) * rows]

    def arrived(self) -> Tensor:
        """(R·M, C): what all ranks have sent here, in order of ranks, in a bank: read it before the next exchange."""
        copies = self._copies
        copies.join()
        with copies.inside(*self._at):
            copies.meet(self._row_bytes, *self._at)
        return copies.rows_in_bank(self._rows, self._columns, self._dtype)


class Copies:
    """What :class:`Collectives` does, for rows that fit and lie on the GPU; others go through ``collectives``.

    Banks are addresses: a copy costs the host one call of the driver. All rows travel, needed or not.

    Args:
        memory: of two banks of ``bank`` bytes, from ``bank_of(...)``.
        places: M, at most. row_bytes: of a row, at most.
    """

    beside_products = True
    """Rows may travel while products run."""

    def __init__(
        self, memory: Memory, rank: int, places: int, row_bytes: int, bank: int, watch: Watch, collectives: Collectives
    ) -> None:
        self.memory, self.rank, self.watch, self._collectives = memory, rank, watch, collectives
        self.ranks = len(memory.blocks)
        self._places, self._row_bytes, self._bank_bytes = places, row_bytes, bank
        self._mine, self._device = memory.blocks[rank], memory.blocks[rank].device
        self._starts = HEAD, HEAD + bank
        self._banks = [[block.data_ptr() + start for block in memory.blocks] for start in self._starts]
        self._bank = 0
        self._held: list[Tensor | None] = []
        """What copies beside products read and write, until ``join``: the allocator knows nothing of their stream, and
        would give freed memory to the current one while they still run.
        """
        self._on_gpu = on_gpu = self._device.type == "cuda"
        self.stream: Any = None
        """Of copies beside products; None where they run on the current one: on a CPU, and between ranks of one GPU,
        whose copies need the multiprocessors that products hold.
        """
        self._events = list[Any]()
        if on_gpu and memory.apart:
            self.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._events = [torch.cuda.Event(), torch.cuda.Event()]  # type: ignore[no-untyped-call]
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=on_gpu)
        """Copied behind rows to say that they are there: a copy from the host needs no multiprocessor either."""
        self._order = [(rank + i) % self.ranks for i in range(self.ranks)]
        """Every rank copies from or to another one first, so that no GPU has to serve all."""

    # ---- exchanges ---------------------------------------------------------------------------------------------------

    def gather(
        self, rows_TC: Tensor, places: int, empty: int, call: int, phase: str, needed: Needed | None = None
    ) -> Tensor:
        """``Collectives.gather``"""
        if not self.takes(rows_TC, places):
            return self._collectives.gather(rows_TC, places, empty, call, phase)
        rows_TC = rows_TC.contiguous()
        row_bytes = rows_TC.shape[1] * rows_TC.element_size()
        rows_UC = rows_TC.new_empty(self.ranks * places, rows_TC.shape[1])
        arriving, stream = rows_UC.data_ptr(), self._current()
        with self.inside(call, phase):
            for share in self._shares(places, row_bytes):
                bank = self.bank(call, phase)
                self._put(bank[self.rank], rows_TC, share, empty, stream)
                self.meet(row_bytes, call, phase)
                size = (share.stop - share.start) * row_bytes
                for source in self._order:
                    copy_bytes(arriving + (source * places + share.start) * row_bytes, bank[source], size, stream)
        return rows_UC

    def exchange(
        self,
        rows_SC: Tensor,
        call: int,
        phase: str,
        sent: Sequence[int] | None,
        received: Sequence[int] | None,
        needed: Needed | None = None,
    ) -> Tensor:
        """``Collectives.exchange`` of equal shares. The result may lie in a bank: read it before the next exchange."""
        rows, columns = rows_SC.shape
        places = rows // self.ranks
        if sent is not None or received is not None or not self.takes(rows_SC, places):
            return self._collectives.exchange(rows_SC, call, phase, sent, received)
        rows_SC, row_bytes = rows_SC.contiguous(), columns * rows_SC.element_size()
        leaving, stream = rows_SC.data_ptr(), self._current()
        shares = self._shares(places, row_bytes)
        arrived = torch.empty_like(rows_SC) if len(shares) > 1 else None
        with self.inside(call, phase):
            for share in shares:
                bank, size = self.bank(call, phase), (share.stop - share.start) * row_bytes
                for target in self._order:
                    at = leaving + (target * places + share.start) * row_bytes
                    copy_bytes(bank[target] + self.rank * size, at, size, stream)
                self.meet(row_bytes, call, phase)
                if arrived is not None:
                    for source in range(self.ranks):
                        at = arrived.data_ptr() + (source * places + share.start) * row_bytes
                        copy_bytes(at, bank[self.rank] + source * size, size, stream)
        return self.rows_in_bank(rows, columns, rows_SC.dtype) if arrived is None else arrived

    # ---- beside products ---------------------------------------------------------------------------------------------

    def gather_in_parts(
        self, rows_TC: Tensor, places: int, parts: Sequence[Sequence[int]], call: int, phase: str
    ) -> tuple[Tensor, Tensor | None]:
        """``gather`` whose rows come beside what the current stream does, part by part, each of some source ranks: the
        first is this one, whose rows are there at once. The second result, (parts,) int32, has a 1 where a part has
        come; ``join`` waits for all. None: nobody may wait for a part on the GPU, only ``join`` does. No other exchange
        before it.
        """
        rows_TC = rows_TC.contiguous()
        row_bytes = rows_TC.shape[1] * rows_TC.element_size()
        rows_UC = rows_TC.new_empty(self.ranks * places, rows_TC.shape[1])
        there_P = None
        if self.memory.apart and not self._in_a_graph():
            there_P = torch.zeros(len(parts), dtype=torch.int32, device=rows_TC.device)
        arriving, share, stream = rows_UC.data_ptr(), places * row_bytes, self._current()
        with self.inside(call, phase):
            bank = self.bank(call, phase)
            for to in (bank[self.rank], arriving + self.rank * share):
                self._put(to, rows_TC, slice(places), 0, stream)
            self.meet(row_bytes, call, phase)
            self.hold(rows_UC, there_P)
            for part, sources in enumerate(parts[1:], 1):
                there = None if there_P is None else there_P.data_ptr() + 4 * part
                self.pull(bank, sources, arriving, share, there)
        return rows_UC, there_P

    def pull(self, bank: list[int], sources: Sequence[int], arriving: int, share: int, there: int | None) -> None:
        """A part of ``gather_in_parts``, on the stream beside; ``there`` is the address of its word, if it has one."""
        stream = self._beside()
        for source in sources:
            copy_bytes(arriving + source * share, bank[source], share, stream)
        if there is not None:
            copy_bytes(there, self._one.data_ptr(), 4, stream)

    def push(self, bank: list[int], targets: Sequence[int], leaving: int, share: int) -> None:
        """A part of a :class:`Departure`, on the stream beside."""
        stream = self._beside()
        for target in self._order[1:] + self._order[:1]:  # own rows have the shortest way
            if target in targets:
                copy_bytes(bank[target] + self.rank * share, leaving + targets.index(target) * share, share, stream)

    def departure(self, places: int, columns: int, dtype: torch.dtype, call: int, phase: str) -> Departure:
        """An ``exchange`` whose rows leave part by part, beside what the current stream does."""
        return Departure(self, places, columns, dtype, call, phase)

    def hold(self, *tensors: Tensor | None) -> None:
        """They live until ``join``."""
        self._held += tensors

    def join(self) -> None:
        """The current stream waits for what has been copied beside it."""
        if not self._held:
            return
        if self.stream is not None:
            self._events[1].record(self.stream)
            self._events[1].wait(torch.cuda.current_stream(self._device))
        self._held.clear()

    def _beside(self) -> int | None:
        """The stream beside, after what the current one has; ``join`` ends it, or the next exchange does. Copy engines
        need no multiprocessor, so products hide them. Kernels belong elsewhere: they would wait until a product leaves
        a multiprocessor free.
        """
        if self.stream is None:
            return self._current()
        self._events[0].record(torch.cuda.current_stream(self._device))
        self._events[0].wait(self.stream)
        return int(self.stream.cuda_stream)

    # ---- their parts -------------------------------------------------------------------------------------------------

    def takes(self, rows: Tensor, places: int, *, at_once: bool = False) -> bool:
        """Whether copies carry such rows. ``at_once``: in one exchange."""
        row_bytes = rows.shape[1] * rows.element_size()
        fits = 0 < places <= self._places and 0 < row_bytes <= self._row_bytes and rows.device == self._device
        return fits and (not at_once or self.ranks * places * row_bytes <= self._bank_bytes)

    def bank(self, call: int, phase: str) -> list[int]:
        """Address of the bank of this exchange, of each rank."""
        self.join()  # nothing is left there but for an error, or where nobody looked
        self._bank ^= 1
        self.memory.flags.begin(self._bank, call, PHASES.index(phase))
        return self._banks[self._bank]

    def meet(self, row_bytes: int, call: int, phase: str) -> None:
        self.memory.flags.meet(carried(phase, row_bytes, call), call, PHASES.index(phase))

    def rows_in_bank(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The first rows of the bank of this exchange, here."""
        start = self._starts[self._bank]
        return self._mine[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    @contextmanager
    def inside(self, call: int, phase: str) -> Iterator[None]:
        self.watch.enter(call, phase)
        try:
            with on_device(self._mine) if self._on_gpu else nullcontext():
                yield
        except RuntimeError as error:  # after a trap every call fails, and says little
            self.watch.explain(error)
            raise
        self.watch.leave()

    def _put(self, to: int, rows_TC: Tensor, share: slice, empty: int, stream: int | None) -> None:
        """The rows of a share, and behind the last one bytes of ``empty``, 0 or -1."""
        row_bytes = rows_TC.shape[1] * rows_TC.element_size()
        start = share.start or 0
        rows = min(max(len(rows_TC) - start, 0), share.stop - start)
        copy_bytes(to, rows_TC.data_ptr() + start * row_bytes, rows * row_bytes, stream)
        fill_bytes(to + rows * row_bytes, empty & 0xFF, (share.stop - start - rows) * row_bytes, stream)

    def _shares(self, places: int, row_bytes: int) -> list[slice]:
        return shares(places, row_bytes, self.ranks, self._bank_bytes)

    def _in_a_graph(self) -> bool:
        """Whether calls are captured. Nothing says that a graph copies rows beside a product that holds every
        multiprocessor and waits for them.
        """
        return self._on_gpu and torch.cuda.is_current_stream_capturing()

    def _current(self) -> int | None:
        return raw_stream(self._device.index) if self._on_gpu else None
