"""Which row blocks hold rows of which source ranks: see ``parallel/ranges.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels.interface import RANGE_ROWS, PartLimits, Sources


def row_parts(expert_offsets: Tensor, gather_index: Tensor, sources: Sources) -> PartLimits:
    rank, ranks, places = sources
    start, stop = expert_offsets[:-1, None], expert_offsets[1:, None]
    row = torch.arange(gather_index.shape[0], device=gather_index.device)
    mine_EP = (row >= start) & (row < stop)
    before, until = ((mine_EP & (gather_index < bound)).sum(1) for bound in (rank * places, (rank + 1) * places))
    rows = (stop - start)[:, 0]
    last, begin = _blocks(rows), _blocks(before)
    end = torch.where(until == rows, last, until // RANGE_ROWS).maximum(begin)
    parts = [(begin, end), *([(end, last)] if rank + 1 < ranks else []), *([(begin * 0, begin)] if rank else [])]
    begin_PE, end_PE = (torch.stack(side).to(torch.int32) for side in zip(*parts, strict=True))
    return PartLimits(begin_PE, end_PE)


def _blocks(rows: Tensor) -> Tensor:
    return (rows + (RANGE_ROWS - 1)) // RANGE_ROWS
