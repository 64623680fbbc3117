"""Where the rows of each expert go when every expert gets whole blocks of 128 positions.

FP8 weight gradients contract over tokens in blocks of 128 that share a scale, so no block may mix experts. This kernel
turns the offsets of a routing plan into an index that the transposing quantizers follow: the row at each position, and
the token that this row reads, or -1. It runs once a backward pass and serves all four operands.

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


@triton.jit(do_not_specialize=["capacity"])
def _pad_segments_kernel(
    expert_offsets_ptr, gather_index_ptr, padded_offsets_ptr, row_index_ptr, token_index_ptr, capacity, E,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert, count, before = expert_chunks(expert_offsets_ptr, E, BLOCK, BLOCK_E)
    if block == 0:
        tl.store(padded_offsets_ptr, 0)
        end = tl.minimum((before + count) * BLOCK, capacity)
        tl.store(padded_offsets_ptr + 1 + expert, end, mask=expert < E)
    mine = (before <= block) & (block < before + count)
    e = tl.sum(tl.where(mine, expert, 0), 0)
    skipped = block - tl.sum(tl.where(mine, before, 0), 0)
    lane = tl.arange(0, BLOCK)
    row = tl.load(expert_offsets_ptr + e) + skipped * BLOCK + lane
    has_row = (row < tl.load(expert_offsets_ptr + e + 1)) & (tl.sum(mine.to(tl.int32), 0) > 0)
    token = tl.load(gather_index_ptr + row, mask=has_row, other=-1)
    position = block * BLOCK + lane
    tl.store(row_index_ptr + position, tl.where(token >= 0, row, -1), mask=position < capacity)
    tl.store(token_index_ptr + position, token, mask=position < capacity)


def pad_segments(expert_offsets: Tensor, gather_index_P: Tensor, capacity: int) -> Segments:
    """Positions of each expert, G = ``capacity`` in all. The caller keeps the last offset <= P."""
    num_experts = expert_offsets.shape[0] - 1
    padded_offsets = torch.empty_like(expert_offsets)
    row_index_G, token_index_G = gather_index_P.new_empty(capacity), gather_index_P.new_empty(capacity)
    launch(
        _pad_segments_kernel,
        (max(1, cdiv(capacity, BLOCK)),),
        (expert_offsets, gather_index_P, padded_offsets, row_index_G, token_index_G, capacity, num_experts),
        (BLOCK, next_power_of_2(num_experts)),
    )
    return Segments(padded_offsets, row_index_G, token_index_G)
