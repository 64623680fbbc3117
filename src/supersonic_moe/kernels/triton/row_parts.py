"""Which row blocks hold rows of which source ranks (``parallel/ranges.py``), in one launch.

Inside an expert rows lie in order of token, and tokens in order of source rank: the borders are found by a search that
compares 128 samples at a time, two or three loads in a row for any number of rows.
Bytes: a few KB an expert. Roofline on H200: launch latency.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import RANGE_ROWS, PartLimits, Sources
from supersonic_moe.kernels.triton.launch import launch

SAMPLES = 128


@triton.jit
def _count_below(tokens_ptr, rows, bound, SAMPLES: tl.constexpr):
    """How many of the sorted tokens of ``rows`` rows are less than ``bound``."""
    low, high = rows * 0, rows
    while low < high:
        step = tl.cdiv(high - low, SAMPLES)
        at = low + tl.arange(0, SAMPLES) * step
        below = (tl.load(tokens_ptr + at, mask=at < high, other=0) < bound) & (at < high)
        count = tl.sum(below.to(tl.int32), 0)
        high = tl.where(count > 0, tl.minimum(low + count * step, high), low)
        low = tl.where(count > 0, low + (count - 1) * step + 1, low)
    return low


@triton.jit(do_not_specialize=["first", "last", "has_after", "has_before"])
def _row_parts_kernel(
    expert_offsets_ptr, gather_index_ptr, begin_ptr, end_ptr, first, last, has_after, has_before, E,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    start = tl.load(expert_offsets_ptr + expert)
    rows = tl.load(expert_offsets_ptr + expert + 1) - start
    before = _count_below(gather_index_ptr + start, rows, first, SAMPLES)
    until = _count_below(gather_index_ptr + start, rows, last, SAMPLES)
    blocks, begin = tl.cdiv(rows, ROWS), tl.cdiv(before, ROWS)
    end = tl.maximum(tl.where(until == rows, blocks, until // ROWS), begin)
    tl.store(begin_ptr + expert, begin)
    tl.store(end_ptr + expert, end)
    if has_after != 0:
        tl.store(begin_ptr + E + expert, end)
        tl.store(end_ptr + E + expert, blocks)
    if has_before != 0:
        part = 1 + has_after
        tl.store(begin_ptr + part * E + expert, 0)
        tl.store(end_ptr + part * E + expert, begin)


def row_parts(expert_offsets: Tensor, gather_index: Tensor, sources: Sources) -> PartLimits:
    rank, ranks, places = sources
    experts, after, before = expert_offsets.shape[0] - 1, int(rank + 1 < ranks), int(rank > 0)
    begin_PE, end_PE = (expert_offsets.new_empty(1 + after + before, experts) for _ in range(2))
    limits = rank * places, (rank + 1) * places, after, before
    launch(
        _row_parts_kernel,
        (experts,),
        (expert_offsets, gather_index, begin_PE, end_PE, *limits, experts),
        (RANGE_ROWS, SAMPLES),
        num_warps=1,
    )
    return PartLimits(begin_PE, end_PE)
