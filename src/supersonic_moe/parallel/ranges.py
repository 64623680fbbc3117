"""The row blocks of a call in three parts, so that rows travel while products run.

Inside an expert, rows lie in order of source rank: those of sources before this rank, its own, those of sources after
it. Blocks of RANGE_ROWS are divided at the two borders:

    way in     own, after, before     sources are copied from in this order: this rank, those after it, those before it
    way out    before, after, own     rows leave as soon as they are summed; own ones need not travel

A block with rows of two kinds goes to the part that comes last on the way in: to *before* if it has any of those rows,
else to *after*. On the way out that part comes earlier, so rows are complete when their sources get them. Each block is
in one part, so the tiles are those of one launch, and so are the bits. An expert without a whole block of own rows has
none in *own*.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supersonic_moe.kernels.interface import RANGE_ROWS

LEAST_ROWS = 4 * RANGE_ROWS
"""Of an expert, on average, from which on a call is launched in parts: each part ends with multiprocessors that wait
for the last tile. A guess until several GPUs have run it."""


class Part(NamedTuple):
    """Blocks of each expert, and the sources whose rows are complete with it."""

    begin_E: Tensor
    """int32, in blocks from the first row of the expert on."""
    end_E: Tensor
    sources: range


class Parts(NamedTuple):
    before: Part
    own: Part
    after: Part

    def in_order(self) -> tuple[Part, Part, Part]:
        """Of the way in."""
        return self.own, self.after, self.before


def parts_of(ids_UK: Tensor, experts: int, rank: int, ranks: int) -> Parts:
    """``ids`` of the experts here, counted from 0, outside [0, E/R) where a choice lives elsewhere; of U/R tokens from
    each source. Nothing waits for the device.
    """
    ids_RE = torch.where((ids_UK >= 0) & (ids_UK < experts), ids_UK, experts).view(ranks, -1).long()
    rows_RE = ids_RE.new_zeros(ranks, experts + 1).scatter_add_(1, ids_RE, torch.ones_like(ids_RE))[:, :experts]
    ends_RE = F.pad(rows_RE.cumsum(0), (0, 0, 1, 0))
    start, stop, total = ends_RE[rank], ends_RE[rank + 1], ends_RE[ranks]
    last = _blocks(total)
    begin = _blocks(start)
    end = torch.where(stop == total, last, stop // RANGE_ROWS).maximum(begin)
    zero, begin, end, last = (t.to(torch.int32) for t in (torch.zeros_like(total), begin, end, last))
    return Parts(
        Part(zero, begin, range(rank)), Part(begin, end, range(rank, rank + 1)), Part(end, last, range(rank + 1, ranks))
    )


def _blocks(rows: Tensor) -> Tensor:
    return (rows + (RANGE_ROWS - 1)) // RANGE_ROWS
