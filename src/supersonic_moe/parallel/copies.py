"""Rows between ranks that reach each other's memory, by copy engines: no collective, no wait for the host.

    gather      each rank puts its rows into its own block; all read them from there     x, ids, scores; dout
    exchange    each rank puts rows into the block of the rank that wants them           partial outputs, dx, dscores

R ranks, M places of a rank in a call. A block has two banks of R·M rows, used in turn, so that a rank which is ahead
need not wait until the last exchange has been read everywhere, only the one before it. The flags around the copies, and
why no row is read too early or overwritten too soon, are in ``kernels/sm90/exchange_flags.py``.

Bytes through NVLink, each way: (R - 1)·M rows. Beside them M rows are copied within the GPU for ``gather``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.parallel.collectives import Collectives
from supersonic_moe.parallel.symmetric import HEAD, Memory
from supersonic_moe.parallel.watch import PHASES, Watch, carried

ALIGNMENT = 1024
"""Bytes at multiples of which banks start."""


def bank_bytes(ranks: int, places: int, row_bytes: int) -> int:
    return -(-ranks * places * row_bytes // ALIGNMENT) * ALIGNMENT


class Copies:
    """What :class:`Collectives` does, for rows that fit and lie on the GPU; others go through ``collectives``.

    Args:
        memory: of two banks of ``bank_bytes(...)``.
        places: M, at most. row_bytes: of a row, at most.
    """

    runs_aside = True

    def __init__(
        self, memory: Memory, rank: int, places: int, row_bytes: int, watch: Watch, collectives: Collectives
    ) -> None:
        size = self._bank_bytes = bank_bytes(len(memory.blocks), places, row_bytes)
        self.memory, self._rank, self.watch, self._collectives = memory, rank, watch, collectives
        self._places, self._row_bytes, self._device = places, row_bytes, memory.blocks[rank].device
        starts = HEAD, HEAD + size
        self._banks = [[block[start : start + size] for block in memory.blocks] for start in starts]
        self._bank = 0
        self._aside: Any = None
        self._joined = True
        if self._device.type == "cuda":  # the small kernels of its exchanges go before what the products leave room for
            self._aside = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        ranks = len(memory.blocks)
        self._order = [(rank + i) % ranks for i in range(ranks)]
        """Every rank copies from or to another one first, so that no GPU has to serve all."""

    def gather(self, rows_TC: Tensor, places: int, empty: int, call: int, phase: str) -> Tensor:
        """``Collectives.gather``"""
        if not self._takes(rows_TC, places):
            return self._collectives.gather(rows_TC, places, empty, call, phase)
        rows, columns = rows_TC.shape
        row_bytes = columns * rows_TC.element_size()
        with self.inside(call, phase):
            bank = self._begin(call, phase)
            mine_MC = _as_rows(bank[self._rank], places, rows_TC)
            mine_MC[:rows].copy_(rows_TC)
            if rows < places:
                mine_MC[rows:].fill_(empty)
            self._meet(row_bytes, call, phase)
            rows_UC = rows_TC.new_empty(len(bank) * places, columns)
            arriving = rows_UC.view(torch.uint8).view(len(bank), -1)
            for source in self._order:
                arriving[source].copy_(bank[source][: places * row_bytes])
        return rows_UC

    def exchange(
        self, rows_SC: Tensor, call: int, phase: str, sent: Sequence[int] | None, received: Sequence[int] | None
    ) -> Tensor:
        """``Collectives.exchange`` of equal shares. The result lies in a bank: read it before the next exchange."""
        places = rows_SC.shape[0] // len(self._order)
        if sent is not None or received is not None or not self._takes(rows_SC, places):
            return self._collectives.exchange(rows_SC, call, phase, sent, received)
        row_bytes = rows_SC.shape[1] * rows_SC.element_size()
        share = places * row_bytes
        leaving = rows_SC.contiguous().view(torch.uint8).view(-1)
        with self.inside(call, phase):
            bank = self._begin(call, phase)
            for target in self._order:
                place = bank[target][self._rank * share : (self._rank + 1) * share]
                place.copy_(leaving[target * share : (target + 1) * share])
            self._meet(row_bytes, call, phase)
        return _as_rows(bank[self._rank], rows_SC.shape[0], rows_SC)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exchanges inside run on a stream of their own, after what the current one has; ``join`` ends it, or the next
        exchange does. Copy engines need no multiprocessor, so products hide them.
        """
        if self._aside is None:
            yield
            return
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            yield
        self._joined = False

    def join(self, results: Iterable[Tensor | None]) -> None:
        """The current stream waits, and owns the ``results`` from now on."""
        if self._aside is None or self._joined:
            return
        self._joined = True
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._aside)
        for result in results:
            if result is not None:
                result.record_stream(stream)

    def _takes(self, rows: Tensor, places: int) -> bool:
        fits = 0 < places <= self._places and rows.shape[1] * rows.element_size() <= self._row_bytes
        return fits and rows.device == self._device

    def _begin(self, call: int, phase: str) -> list[Tensor]:
        """The bank of this exchange, of each rank."""
        return self._banks[self.begin(call, phase)]

    def begin(self, call: int, phase: str, steps: int = 1) -> int:
        """A new exchange of so many epochs: the number of its bank."""
        if not self._joined:  # an error came between
            self.join(())
        self._bank ^= 1
        self.memory.flags.begin(self._bank, call, PHASES.index(phase), steps)
        return self._bank

    def bank_start(self, bank: int) -> int:
        """Bytes in front of it in a block."""
        return HEAD + bank * self._bank_bytes

    def _meet(self, row_bytes: int, call: int, phase: str) -> None:
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
