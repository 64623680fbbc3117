"""Rows between ranks that reach each other's memory, written by kernels: those that some rank needs, and no other.

    gather      kernels write a token into the banks of the ranks that need it      x; dout
    exchange    ... and a partial row into the bank of its home                     partial outputs, dx, dscores

Places are those of ``copies.py``, and so are the flags: ``begin`` in front of what writes, ``meet`` behind it. Places
that nobody has written hold what they held; nobody reads them. A rank knows which tokens of others it has from their
choices, which go to all ranks as ``copies.py`` carries them and come before all other rows of a call, and which of its
own come back from where it has sent them (``Trip.copy_TR``).

``gather`` needs what came for longer than a bank may hold it: a second kernel takes it out. Own tokens go there at
once.

A kernel needs multiprocessors, which a product would hold until it ends, so rows travel before products and after them.

Bytes through NVLink, each way: p·(R - 1)·T rows for ``gather``, T tokens, p the share that a rank needs; as many come
back. Beside them p·R·T rows are copied within the GPU for ``gather``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Banks
from supersonic_moe.parallel.collectives import Needed, elements_as
from supersonic_moe.parallel.copies import Copies


class Push(Copies):
    """What :class:`Copies` does, of the rows that are needed; of all where nobody says which those are."""

    beside_products = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kernels = registry.kernels(registry.choose(self._device).name).routing
        size, blocks = self._bank_bytes, self.memory.blocks
        self._bytes = [[block[start : start + size] for block in blocks] for start in self._starts]
        self._tables = [torch.tensor(bank, dtype=torch.int64, device=self._device) for bank in self._banks]

    def gather(
        self, rows_TC: Tensor, places: int, empty: int, call: int, phase: str, needed: Needed | None = None
    ) -> Tensor:
        """(R·places, C): rows that this rank needs, those of others undefined, or zeros if ``needed`` says so."""
        if needed is None or not self.takes(rows_TC, places):
            return super().gather(rows_TC, places, empty, call, phase)
        zeros = needed.zeros or torch.is_anomaly_enabled()  # which looks for NaN
        rows_UC = (rows_TC.new_zeros if zeros else rows_TC.new_empty)(self.ranks * places, rows_TC.shape[1])
        leaving, arriving = _words(rows_TC), _words(rows_UC)
        row_bytes = rows_TC.shape[1] * rows_TC.element_size()
        with self.inside(call, phase):
            for share in self._shares(places, row_bytes):
                banks = self._next(places, share, call, phase)
                of_share, own = leaving[share], arriving[self.rank * places + share.start :]
                self._kernels.push_rows(of_share, needed.copy_TR[share], own[: len(of_share)], banks)
                self.meet(row_bytes, call, phase)
                self._kernels.take_rows(arriving, _rows(needed), banks)
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
        """As :class:`Copies` does it; rows that this rank has not sent come back undefined."""
        rows, columns = rows_SC.shape
        places = rows // self.ranks
        if needed is None or sent is not None or received is not None or not self.takes(rows_SC, places):
            return super().exchange(rows_SC, call, phase, sent, received)
        row_bytes = columns * rows_SC.element_size()
        leaving, shares = _words(rows_SC), self._shares(places, row_bytes)
        arrived = torch.empty_like(rows_SC, memory_format=torch.contiguous_format) if len(shares) > 1 else None
        with self.inside(call, phase):
            for share in shares:
                banks = self._next(places, share, call, phase)
                self._kernels.push_back(leaving, _rows(needed), banks)
                self.meet(row_bytes, call, phase)
                if arrived is not None:
                    of_share = self.rows_in_bank(self.ranks * banks.each, columns, rows_SC.dtype)
                    arrived.view(self.ranks, places, columns)[:, share] = of_share.view(self.ranks, -1, columns)
        return self.rows_in_bank(rows, columns, rows_SC.dtype) if arrived is None else arrived

    def _next(self, places: int, share: slice, call: int, phase: str) -> Banks:
        """Those of a new exchange, into which this rank may write."""
        self.bank(call, phase)
        bytes_R, table_R = self._bytes[self._bank], self._tables[self._bank]
        return Banks(bytes_R, table_R, self.rank, places, share.start, share.stop - share.start)


def _rows(needed: Needed) -> Tensor:
    assert needed.rows is not None, "choices come first"
    return needed.rows


def _words(rows_NC: Tensor) -> Tensor:
    """The same bytes as integers of up to 32 bits."""
    size = rows_NC.shape[1] * rows_NC.element_size()
    return elements_as(torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.uint8, rows_NC)
