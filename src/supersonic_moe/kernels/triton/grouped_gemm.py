"""Grouped GEMMs for fp16, which ``torch.nn.functional.grouped_mm`` multiplies one group after the other, with the host
waiting for the sizes. Weights in either order, sums in fp32; widths should be multiples of 8, or loads are narrow and
registers spill.

Ragged rows, out = a[rows of e] @ b[e]. A program owns a tile of BLOCK_M rows of one expert and BLOCK_N columns. There
are at most P / BLOCK_M + E tiles of rows, so many programs start, and each finds its expert from the E + 1 offsets; the
last ones find none and leave. Programs walk all rows of one column panel first: its weights stay in L2.

Ragged contraction, out[e] = a[rows of e].T @ b[rows of e]. A program owns a tile of one expert's output and walks the
expert's rows in chunks of a fixed number, so that Triton overlaps the loads of a chunk with its products. An expert
without rows walks none and stores its zeros. The sum goes out unrounded where ``out`` is fp32, or is added to it.

FLOPs: 2·P·K·N. Roofline on H200: as in bf16. Not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, near, next_power_of_2, rows_of_chunk

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64  # 64 fp32 sums for each of 256 threads, 32 KB of operands a step
CHUNK = 512  # rows between two starts of the pipeline of loads


@triton.jit
def _rows_kernel(
    a_ptr, b_ptr, out_ptr, expert_offsets_ptr, a_stride, b_stride_e, b_stride_k, b_stride_n, E,
    K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    e, first, last = rows_of_chunk(expert_offsets_ptr, tile, E, BLOCK_M, BLOCK_E)
    if first >= last:
        return
    row = first + tl.arange(0, BLOCK_M).to(tl.int64)
    in_rows = (row < last)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = (column < N)[None, :]
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row[:, None] * a_stride + depth[None, :]
    b_ptrs = b_ptr + e.to(tl.int64) * b_stride_e + depth[:, None] * b_stride_k + column[None, :] * b_stride_n
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=in_rows & (depth < K - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=in_columns & (depth < K - k)[:, None], other=0.0)
        total = tl.dot(a, b, total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_stride_k
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * N + column[None, :], out, mask=in_rows & in_columns)


@triton.jit
def _contraction_kernel(
    a_ptr, b_ptr, out_ptr, expert_offsets_ptr, a_stride, b_stride,
    M: tl.constexpr, N: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = (row < M)[None, :]
    in_columns = (column < N)[None, :]
    first = tl.load(expert_offsets_ptr + e).to(tl.int64)
    last = tl.load(expert_offsets_ptr + e + 1).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    while first < last:
        for step in range(0, CHUNK, BLOCK_K):
            depth = first + step + tl.arange(0, BLOCK_K)
            in_depth = (depth < last)[:, None]
            a = tl.load(a_ptr + depth[:, None] * a_stride + row[None, :], mask=in_depth & in_rows, other=0.0)
            b = tl.load(b_ptr + depth[:, None] * b_stride + column[None, :], mask=in_depth & in_columns, other=0.0)
            total = tl.dot(tl.trans(a), b, total)
        first += CHUNK
    inside = (row < M)[:, None] & in_columns
    out_ptrs = out_ptr + (e.to(tl.int64) * M + row[:, None]) * N + column[None, :]
    if ACCUMULATE:
        total += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


def multiply_rows(a_PK: Tensor, b_EKN: Tensor, expert_offsets: Tensor) -> Tensor:
    """(P, N) in the dtype of ``a``, whose rows are contiguous; dead rows are undefined."""
    b_EKN = near(b_EKN)
    (num_rows, depth), (num_experts, _, columns) = a_PK.shape, b_EKN.shape
    out_PN = a_PK.new_empty(num_rows, columns)
    if num_rows:
        grid = (num_rows // BLOCK_M + num_experts, cdiv(columns, BLOCK_N))
        b_strides = b_EKN.stride(0), b_EKN.stride(1), b_EKN.stride(2)
        args = (a_PK, b_EKN, out_PN, expert_offsets, a_PK.stride(0), *b_strides, num_experts)
        constants = (depth, columns, BLOCK_M, BLOCK_N, BLOCK_K, next_power_of_2(num_experts))
        launch(_rows_kernel, grid, args, constants, num_warps=8)
    return out_PN


def contract_rows(a_PM: Tensor, b_PN: Tensor, expert_offsets: Tensor, out_EMN: Tensor, accumulate: bool) -> Tensor:
    """Into a contiguous ``out`` of any float dtype; an expert without rows gets zeros, or nothing added."""
    num_experts, m, n = out_EMN.shape
    grid = (cdiv(m, BLOCK_M), cdiv(n, BLOCK_N), num_experts)
    args = (a_PM, b_PN, out_EMN, expert_offsets, a_PM.stride(0), b_PN.stride(0))
    launch(_contraction_kernel, grid, args, (m, n, accumulate, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK), num_warps=8)
    return out_EMN
