"""Bias gradients: out[e] = sum of scale[p] * a[p] over the rows p of expert e, in fp32 and in a fixed order.

Experts are as unequal as the routing makes them, and one hot expert may own every row, so work is cut by rows: expert
e has ceil(rows of e / CHUNK) chunks, and chunks are numbered through all experts. Stage 1 sums one chunk per program
into a partial; stage 2 adds an expert's partials in order. How many chunks there are is known on the device only;
P / CHUNK + E bounds it on the host, and programs past the last chunk leave at once. No atomics, so the same rows give
the same bits.

Layout: a (P, N) sorted by expert, partials (chunks, N) fp32, out (E, N) fp32; an expert without rows gets 0. Dead
rows are never read.
Bytes: P·N, and 1/64 of that for the partials. Roofline on H200 at 4.26 TB/s, P 65536, N 3072, bf16: 95 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import Rows
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, column_block, expert_chunks, next_power_of_2, rows_of_chunk

CHUNK = 256  # rows of one stage 1 program: partials are then 1/64 of the bf16 data
TILE = 4096  # elements per step of a program: four 16-byte accesses in flight for each of 128 threads


@triton.jit
def _partial_kernel(
    a_ptr, gather_ptr, scale_ptr, expert_offsets_ptr, partial_ptr, a_stride, E,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    _, first, last = rows_of_chunk(expert_offsets_ptr, chunk, E, CHUNK, BLOCK_E)
    if first >= last:
        return
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = (column < N)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    while first < last:
        row = first + tl.arange(0, BLOCK_P).to(tl.int64)
        in_rows = row < last
        source = row
        if gather_ptr is not None:
            source = tl.load(gather_ptr + row, mask=in_rows, other=-1).to(tl.int64)
        mask = (in_rows & (source >= 0))[:, None] & in_columns
        a = tl.load(a_ptr + source[:, None] * a_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            a *= tl.load(scale_ptr + row, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        total += a
        first += BLOCK_P
    tl.store(partial_ptr + chunk.to(tl.int64) * N + column, tl.sum(total, axis=0), mask=column < N)


@triton.jit
def _combine_kernel(
    partial_ptr, expert_offsets_ptr, out_ptr, E,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    expert, count, before = expert_chunks(expert_offsets_ptr, E, CHUNK, BLOCK_E)
    first = tl.sum(tl.where(expert == e, before, 0), 0)
    last = first + tl.sum(tl.where(expert == e, count, 0), 0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = (column < N)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    while first < last:
        chunk = first + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        total += tl.load(partial_ptr + chunk * N + column[None, :], mask=(chunk < last) & in_columns, other=0.0)
        first += BLOCK_P
    tl.store(out_ptr + e.to(tl.int64) * N + column, tl.sum(total, axis=0), mask=column < N)


def segment_sum(a: Rows[Tensor], row_scale_P: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """(E, N) fp32."""
    a_TN, index = a
    num_rows, columns = a.num_rows, a_TN.shape[1]
    num_experts = expert_offsets.shape[0] - 1
    out_EN = a_TN.new_empty(num_experts, columns, dtype=torch.float32)
    if out_EN.numel() == 0:
        return out_EN
    max_chunks = num_rows // CHUNK + min(num_experts, num_rows)
    partials_CN = a_TN.new_empty(max_chunks, columns, dtype=torch.float32)
    block_n = column_block(columns, 512)
    static = columns, CHUNK, next_power_of_2(num_experts), min(CHUNK, TILE // block_n), block_n
    panels = cdiv(columns, block_n)
    if max_chunks:
        args = (a_TN, index, row_scale_P, expert_offsets, partials_CN, a_TN.stride(0), num_experts)
        launch(_partial_kernel, (max_chunks, panels), args, static)
    launch(_combine_kernel, (num_experts, panels), (partials_CN, expert_offsets, out_EN, num_experts), static)
    return out_EN
