"""Where the rows of each expert go when every expert gets whole blocks of 128 positions.

FP8 weight gradients contract over tokens in blocks of 128 that share a scale, so no block may mix experts. This kernel
turns the offsets of a routing plan into an index that the transposing quantizers follow: the row at each position, and
the token that this row reads, or -1. It runs once a backward pass and serves all four operands.

Where experts read the same tokens in the same order (with as many choices as experts they all do), their columns of x
and dO are the same bytes. ``source`` says so for each block: one that begins with token 128 c reads what block c does,
if all 128 tokens of the two are equal. Block c then is its own source, so the map has one step; and nothing but the
index decides. Such columns are written once instead of E times, and the products find them in L2.

A program owns one block of positions and finds its expert from the E + 1 offsets: counts known on the device only are
never read on the host.
Bytes: 12 a position, plus 8 E a program. Roofline on H200: launch latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import Segments
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, expert_chunks, next_power_of_2
from supersonic_moe.quantization.block_format import BLOCK


@triton.jit
def _read(expert_offsets_ptr, gather_index_ptr, block, expert, count, before, BLOCK: tl.constexpr):
    """(row, token) at each position of a block; token -1 where there is none."""
    mine = (before <= block) & (block < before + count)
    e = tl.sum(tl.where(mine, expert, 0), 0)
    skipped = block - tl.sum(tl.where(mine, before, 0), 0)
    row = tl.load(expert_offsets_ptr + e) + skipped * BLOCK + tl.arange(0, BLOCK)
    has_row = (row < tl.load(expert_offsets_ptr + e + 1)) & (tl.sum(mine.to(tl.int32), 0) > 0)
    return row, tl.load(gather_index_ptr + row, mask=has_row, other=-1)


@triton.jit(do_not_specialize=["capacity"])
def _pad_segments_kernel(
    expert_offsets_ptr, gather_index_ptr, padded_offsets_ptr, row_index_ptr, token_index_ptr, source_ptr, capacity, E,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert, count, before = expert_chunks(expert_offsets_ptr, E, BLOCK, BLOCK_E)
    if block == 0:
        tl.store(padded_offsets_ptr, 0)
        end = tl.minimum((before + count) * BLOCK, capacity)
        tl.store(padded_offsets_ptr + 1 + expert, end, mask=expert < E)
    row, token = _read(expert_offsets_ptr, gather_index_ptr, block, expert, count, before, BLOCK)
    lane = tl.arange(0, BLOCK)
    position = block * BLOCK + lane
    tl.store(row_index_ptr + position, tl.where(token >= 0, row, -1), mask=position < capacity)
    tl.store(token_index_ptr + position, token, mask=position < capacity)
    first = tl.sum(tl.where(lane == 0, token, 0), 0)
    source = block
    if (first >= 0) & (first % BLOCK == 0):
        _, other = _read(expert_offsets_ptr, gather_index_ptr, first // BLOCK, expert, count, before, BLOCK)
        source = tl.where(tl.sum((token != other).to(tl.int32), 0) == 0, first // BLOCK, block)
    tl.store(source_ptr + block, source, mask=block * BLOCK < capacity)


def pad_segments(expert_offsets: Tensor, gather_index_P: Tensor, capacity: int) -> Segments:
    """Positions of each expert, G = ``capacity`` in all. The caller keeps the last offset <= P."""
    num_experts = expert_offsets.shape[0] - 1
    padded_offsets = torch.empty_like(expert_offsets)
    row_index_G, token_index_G = gather_index_P.new_empty(capacity), gather_index_P.new_empty(capacity)
    source = gather_index_P.new_empty(capacity // BLOCK)
    launch(
        _pad_segments_kernel,
        (max(1, cdiv(capacity, BLOCK)),),
        (expert_offsets, gather_index_P, padded_offsets, row_index_G, token_index_G, source, capacity, num_experts),
        (BLOCK, next_power_of_2(num_experts)),
    )
    return Segments(padded_offsets, row_index_G, token_index_G, source)
