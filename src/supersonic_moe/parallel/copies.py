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
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.parallel.collectives import Collectives
from supersonic_moe.parallel.symmetric import HEAD, Memory
from supersonic_moe.parallel.watch import PHASES, Watch, carried

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
        self._copies, self._places, self._like = copies, places, torch.empty(0, columns, dtype=dtype)
        self._at = call, phase
        self._leaving: list[Tensor] = []
        with copies.inside(*self._at):
            self._bank = copies.bank(*self._at)

    def send(self, rows: Tensor, targets: Sequence[int]) -> None:
        """M rows for each of the ``targets``, one after the other."""
        copies, leaving = self._copies, rows.contiguous().view(torch.uint8).view(len(targets), -1)
        self._leaving.append(leaving)  # which the other stream reads
        with copies.inside(*self._at), copies.aside():
            copies.push(self._bank, targets, leaving, *self._at)

    def arrived(self) -> Tensor:
        """(R·M, C): what all ranks have sent here, in order of ranks, in a bank: read it before the next exchange."""
        copies = self._copies
        copies.join()
        self._leaving.clear()
        with copies.inside(*self._at):
            copies.meet(self._like.shape[1] * self._like.element_size(), *self._at)
        return _as_rows(self._bank[copies.rank], len(self._bank) * self._places, self._like)


class Copies:
    """What :class:`Collectives` does, for rows that fit and lie on the GPU; others go through ``collectives``.

    Args:
        memory: of two banks of ``bank`` bytes, from ``bank_of(...)``.
        places: M, at most. row_bytes: of a row, at most.
    """

    def __init__(
        self, memory: Memory, rank: int, places: int, row_bytes: int, bank: int, watch: Watch, collectives: Collectives
    ) -> None:
        self.memory, self.rank, self.watch, self._collectives = memory, rank, watch, collectives
        self._places, self._row_bytes, self._device = places, row_bytes, memory.blocks[rank].device
        starts = HEAD, HEAD + bank
        self._banks = [[block[start : start + bank] for block in memory.blocks] for start in starts]
        self._bank = 0
        self._aside: Any = None
        self._joined = True
        on_gpu = self._device.type == "cuda"
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=on_gpu)
        """Copied behind rows to say that they are there: a copy from the host needs no multiprocessor either."""
        if on_gpu:
            self._aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        ranks = len(memory.blocks)
        self._order = [(rank + i) % ranks for i in range(ranks)]
        """Every rank copies from or to another one first, so that no GPU has to serve all."""

    def gather(self, rows_TC: Tensor, places: int, empty: int, call: int, phase: str) -> Tensor:
        """``Collectives.gather``"""
        if not self.takes(rows_TC, places):
            return self._collectives.gather(rows_TC, places, empty, call, phase)
        rows, columns = rows_TC.shape
        row_bytes = columns * rows_TC.element_size()
        rows_UC = rows_TC.new_empty(len(self._order) * places, columns)
        arriving = rows_UC.view(torch.uint8).view(len(self._order), -1)
        with self.inside(call, phase):
            for share in self._shares(places, row_bytes):
                bank = self.bank(call, phase)
                leaving = rows_TC[share]
                mine_MC = _as_rows(bank[self.rank], share.stop - share.start, rows_TC)
                mine_MC[: len(leaving)].copy_(leaving)
                if rows < share.stop:
                    mine_MC[len(leaving) :].fill_(empty)
                self.meet(row_bytes, call, phase)
                of_rank = slice(share.start * row_bytes, share.stop * row_bytes)
                for source in self._order:
                    part = arriving[source][of_rank]
                    part.copy_(bank[source][: part.numel()])
        return rows_UC

    def exchange(
        self, rows_SC: Tensor, call: int, phase: str, sent: Sequence[int] | None, received: Sequence[int] | None
    ) -> Tensor:
        """``Collectives.exchange`` of equal shares. The result may lie in a bank: read it before the next exchange."""
        places = rows_SC.shape[0] // len(self._order)
        if sent is not None or received is not None or not self.takes(rows_SC, places):
            return self._collectives.exchange(rows_SC, call, phase, sent, received)
        row_bytes = rows_SC.shape[1] * rows_SC.element_size()
        leaving = rows_SC.contiguous().view(torch.uint8).view(len(self._order), -1)
        with self.inside(call, phase):
            if len(shares := self._shares(places, row_bytes)) == 1:
                return _as_rows(self._swap(leaving, row_bytes, call, phase), rows_SC.shape[0], rows_SC)
            arrived = torch.empty_like(leaving)
            for share in shares:
                of_rank = slice(share.start * row_bytes, share.stop * row_bytes)
                came = self._swap(leaving[:, of_rank], row_bytes, call, phase).view(len(self._order), -1)
                for source in self._order:
                    arrived[source][of_rank].copy_(came[source])
        return arrived.view(rows_SC.dtype).view(rows_SC.shape)

    def _swap(self, leaving: Tensor, row_bytes: int, call: int, phase: str) -> Tensor:
        """(R, bytes) of which each rank gets one; what all have for this one, in its bank."""
        bank, size = self.bank(call, phase), leaving.shape[1]
        for target in self._order:
            bank[target][self.rank * size : (self.rank + 1) * size].copy_(leaving[target])
        self.meet(row_bytes, call, phase)
        return bank[self.rank][: leaving.numel()]

    def _shares(self, places: int, row_bytes: int) -> list[slice]:
        return shares(places, row_bytes, len(self._order), self._banks[0][self.rank].numel())

    def gather_in_parts(
        self, rows_TC: Tensor, places: int, parts: Sequence[Sequence[int]], call: int, phase: str
    ) -> tuple[Tensor, Tensor]:
        """``gather`` whose rows come beside what the current stream does, part by part, each of some source ranks: the
        first is this one, whose rows are there at once. The second result, (parts,) int32, has a 1 where a part has
        come; ``join`` waits for all. No other exchange before that.
        """
        rows, row_bytes = rows_TC.shape[0], rows_TC.shape[1] * rows_TC.element_size()
        rows_UC = rows_TC.new_empty(len(self._order) * places, rows_TC.shape[1])
        there_P = torch.zeros(len(parts), dtype=torch.int32, device=rows_TC.device)
        with self.inside(call, phase):
            bank = self.bank(call, phase)
            for mine_MC in (_as_rows(bank[self.rank], places, rows_TC), rows_UC[self.rank * places :][:places]):
                mine_MC[:rows].copy_(rows_TC)
                mine_MC[rows:].fill_(0)
            self.meet(row_bytes, call, phase)
            arriving = rows_UC.view(torch.uint8).view(len(self._order), -1)
            with self.aside():
                for part, sources in enumerate(parts[1:], 1):
                    self.pull(bank, sources, arriving, call, phase)
                    there_P[part : part + 1].copy_(self._one, non_blocking=True)
        return rows_UC, there_P

    def pull(self, bank: list[Tensor], sources: Sequence[int], arriving: Tensor, call: int, phase: str) -> None:
        """A part of ``gather_in_parts``, on the stream beside."""
        for source in sources:
            arriving[source].copy_(bank[source][: arriving.shape[1]])

    def push(self, bank: list[Tensor], targets: Sequence[int], leaving: Tensor, call: int, phase: str) -> None:
        """A part of a :class:`Departure`, on the stream beside: (targets, bytes)."""
        start = self.rank * leaving.shape[1]
        for target in self._order[1:] + self._order[:1]:  # own rows have the shortest way
            if target in targets:
                part = leaving[targets.index(target)]
                bank[target][start : start + leaving.shape[1]].copy_(part)

    def departure(self, places: int, columns: int, dtype: torch.dtype, call: int, phase: str) -> Departure:
        """An ``exchange`` whose rows leave part by part, beside what the current stream does."""
        return Departure(self, places, columns, dtype, call, phase)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Copies inside run on a stream of their own, after what the current one has; ``join`` ends it, or the next
        exchange does. Copy engines need no multiprocessor, so products hide them. Kernels belong elsewhere: they would
        wait until a product leaves a multiprocessor free.
        """
        if self._aside is None:
            yield
            return
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            yield
        self._joined = False

    def join(self) -> None:
        """The current stream waits for what runs aside."""
        if self._aside is not None and not self._joined:
            self._joined = True
            torch.cuda.current_stream(self._device).wait_stream(self._aside)

    def takes(self, rows: Tensor, places: int) -> bool:
        """Whether copies carry such rows."""
        fits = 0 < places <= self._places and rows.shape[1] * rows.element_size() <= self._row_bytes
        return fits and rows.device == self._device

    def bank(self, call: int, phase: str) -> list[Tensor]:
        """The bank of this exchange, of each rank."""
        self.join()  # nothing is left there but for an error, or where nobody looked
        self._bank ^= 1
        self.memory.flags.begin(self._bank, call, PHASES.index(phase))
        return self._banks[self._bank]

    def meet(self, row_bytes: int, call: int, phase: str) -> None:
        self.memory.flags.meet(carried(phase, row_bytes), call, PHASES.index(phase))

    @contextmanager
    def inside(self, call: int, phase: str) -> Iterator[None]:
        self.watch.enter(call, phase)
        try:
            yield
        except RuntimeError as error:  # after a trap every call fails, and says little
            self.watch.explain(error)
            raise
        self.watch.leave()


def _as_rows(bank: Tensor, rows: int, like: Tensor) -> Tensor:
    columns = like.shape[1]
    return bank[: rows * columns * like.element_size()].view(like.dtype).view(rows, columns)
