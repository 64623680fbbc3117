"""Tile widths shared by the memory-bound kernels.

Every kernel of this backend moves rows whose width is a property of the model (H, I, E) and whose number is a
property of the batch (T, P, S). Widths are compile-time constants; counts are plain arguments that Triton is told not
to specialise on, so a new batch size never recompiles.

Loops over a count are written with ``while``: the bounds of ``range`` must convert to int, which Triton 3.6's
interpreter does in a way that NumPy 2.4 refuses.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.quantization.block_format import BLOCK


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own may be called inside kernels as well, which costs the host 3 µs a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def near(w_ENK: Tensor) -> Tensor:
    """A weight in either order, copied where elements of one expert lie 2^31 or more apart: kernels that take this have
    64-bit offsets of experts, and 32-bit ones inside an expert.
    """
    (_, n, k), (_, n_stride, k_stride) = w_ENK.shape, w_ENK.stride()
    return w_ENK if max((n - 1) * n_stride, (k - 1) * k_stride) < 2**31 else w_ENK.contiguous()


@functools.cache
def column_block(columns: int, limit: int) -> int:
    """Columns per program: the widest power of two up to ``limit`` that wastes at most 1/9 of its lanes.

    So 7168 columns come in blocks of 1024, not 2048. Rows under 128 columns, and widths that no such block divides
    well, take one padded block.
    """
    block = limit
    while block >= 128:
        if cdiv(columns, block) * block <= columns * 9 / 8:
            return block
        block //= 2
    return min(limit, next_power_of_2(columns))


@functools.cache
def whole_rows(columns: int, elements: int, most: int) -> tuple[int, int]:
    """(rows, columns as a power of two) of a program that holds whole rows: ``most`` at most, and about so many
    elements.
    """
    padded = next_power_of_2(columns)
    return min(most, max(1, elements // padded)), padded


def warps(elements: int) -> int:
    """Warps for a tile, at 16 elements a thread: two 16-byte accesses in bf16."""
    return max(1, min(8, elements // (32 * 16)))


def row_tiles(rows: int, columns: int, elements: int, most: int) -> tuple[tuple[int], tuple[int, int]]:
    """(grid, (ROWS, BLOCKS)) of programs that own what ``rows_and_blocks`` says: so many elements each, of at most
    ``most`` blocks of 128 columns.
    """
    panel = max(1, column_block(columns, most * BLOCK) // BLOCK)
    of_program = elements // (panel * BLOCK)
    return (cdiv(rows, of_program) * cdiv(columns, panel * BLOCK),), (of_program, panel)


@triton.jit
def rows_and_blocks(C: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows (ROWS,), blocks (1, BLOCKS), their columns (1, BLOCKS, BLOCK)) of a program that owns ROWS rows of BLOCKS
    blocks of BLOCK columns, where programs are counted along the C columns first.
    """
    PANELS: tl.constexpr = (C + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK)
    pid = tl.program_id(0)
    row = (pid // PANELS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = (pid % PANELS) * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    return row, block, block[:, :, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]


@triton.jit
def expert_chunks(expert_offsets_ptr, E, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, its chunks of CHUNK rows, chunks of the experts before it), vectors of BLOCK_E lanes."""
    expert = tl.arange(0, BLOCK_E)
    start = tl.load(expert_offsets_ptr + expert, mask=expert < E, other=0)
    end = tl.load(expert_offsets_ptr + expert + 1, mask=expert < E, other=0)
    count = (end - start + CHUNK - 1) // CHUNK
    return expert, count, tl.cumsum(count, 0) - count


@triton.jit
def rows_of_chunk(expert_offsets_ptr, chunk, E, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end) of a chunk, numbered through all experts; no rows past the last chunk."""
    expert, count, before = expert_chunks(expert_offsets_ptr, E, CHUNK, BLOCK_E)
    mine = (before <= chunk) & (chunk < before + count)
    e = tl.sum(tl.where(mine, expert, 0), 0)  # past the last chunk 0, whose rows end before
    first = tl.load(expert_offsets_ptr + e) + (chunk - tl.sum(tl.where(mine, before, 0), 0)) * CHUNK
    return e, first, tl.minimum(first + CHUNK, tl.load(expert_offsets_ptr + e + 1))
