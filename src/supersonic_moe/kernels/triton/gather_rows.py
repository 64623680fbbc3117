"""Row gather: out[p] = x[index[p]], or zeros where index[p] < 0.

Layout: x (T, H) rows at any stride, out (P, H) contiguous. A program copies a tile of (rows, columns) in 16-byte
accesses, so a thread has several rows in flight. Programs walk all rows of one column panel before the next panel:
the panel of x (T x 1024 columns) then fits the 50 MB L2 for common T, and a token that K experts read comes from DRAM
once.

Bytes: T·H read (P·H where the panel does not fit) + P·H written. Roofline on H200 at 4.26 TB/s, T 8192, K 8, H 3072,
bf16: 50 + 403 MB = 106 us.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import Rows
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, column_block

TILE_BYTES = 16 * 1024  # per program: 4 accesses of 16 bytes in flight for each of 256 threads


@triton.jit(do_not_specialize=["num_rows"])
def _gather_rows_kernel(
    x_ptr, index_ptr, out_ptr, num_rows, x_stride, H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_rows = row < num_rows
    source = tl.load(index_ptr + row, mask=in_rows, other=-1).to(tl.int64)
    in_columns = (column < H)[None, :]
    x_ptrs = x_ptr + source[:, None] * x_stride + column[None, :]
    tile = tl.load(x_ptrs, mask=(source >= 0)[:, None] & in_columns, other=0.0)
    tl.store(out_ptr + row[:, None] * H + column[None, :], tile, mask=in_rows[:, None] & in_columns)


def gather_rows(x_TH: Tensor, index_P: Tensor) -> Tensor:
    """(P, H) in the dtype of x. The caller keeps index < T."""
    num_rows, columns = index_P.shape[0], x_TH.shape[1]
    out_PH = x_TH.new_empty(num_rows, columns)
    if out_PH.numel() == 0:
        return out_PH
    block_h = column_block(columns, 1024)
    block_p = min(1024, TILE_BYTES // (block_h * x_TH.element_size()))
    grid = (cdiv(num_rows, block_p), cdiv(columns, block_h))
    args = (x_TH, index_P, out_PH, num_rows, x_TH.stride(0))
    launch(_gather_rows_kernel, grid, args, (columns, block_p, block_h), num_warps=8)
    return out_PH


def rows_of(a: Rows[Tensor]) -> Tensor:
    """(P, H): the rows themselves, copied where they come through an index."""
    return a.x if a.gather_index is None else gather_rows(a.x, a.gather_index)
