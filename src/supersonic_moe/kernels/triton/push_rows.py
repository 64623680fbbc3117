"""Rows that some rank needs, to where it reads them (``parallel/push.py``): out, home again, and out of the bank.

    push_rows   row t -> bank of r, place rank·count + t      for each rank r with copy[t, r] >= 0
    push_back   row r·M + first + i -> bank of r, place rank·count + i      where an id of that row is of an expert here
    take_rows   own bank, place r·count + i -> row r·M + first + i          likewise, of all ranks but this one

Layout: rows (·, C) of words, contiguous; the banks of other ranks are addresses in a table on the device, so writes to
them go over NVLink. Rows that nobody needs are neither read nor written. What pushes is written by few programs that
stay: stores to another GPU are not waited for, so TILE_BYTES of loads in flight on each of PROGRAMS multiprocessors
are to fill NVLink. Which rows of the next tile are needed is looked up while those of this one are loaded. Each rank
begins with the bank of the rank after it, so that no GPU has to take from all at once. ``take_rows`` stays on the GPU
and has a program for each tile.

No flag is told here: that happens in the next launch of the stream (``kernels/sm90/exchange_flags.py``), whose release
at system scope comes after all writes of this one.

Bytes: N·C read and N·C written for N rows that are needed (``push_rows`` reads a row once for all ranks), and 4·R or
4·K for each row to look up. Roofline on H200 for what goes to others: NVLink, 450 GB/s each way; not timed yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import Banks
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, column_block, next_power_of_2

PROGRAMS = 16
"""Of what pushes: a multiprocessor each. A guess until it is timed."""
TILE_BYTES = 64 * 1024
"""Of one of them; a thread of 512 has 8 accesses of 16 bytes in flight."""
TAKEN_BYTES = 16 * 1024
MOST_ROWS = 128
"""Of a tile: narrow rows are to keep all programs busy, too."""


@triton.jit
def _ranks_that_need(copy_ptr, row, num_rows, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """A bit for each rank."""
    r = tl.arange(0, BLOCK_R)[None, :]
    mask = (row < num_rows)[:, None] & (r < R)
    copy = tl.load(copy_ptr + row[:, None].to(tl.int64) * R + r, mask=mask, other=-1)
    return tl.sum(tl.where(copy >= 0, 1, 0) << r, 1)


@triton.jit
def _are_needed(ids_ptr, row, inside, experts, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 where an id is of an expert here, else 0."""
    k = tl.arange(0, BLOCK_K)[None, :]
    id = tl.load(ids_ptr + row[:, None].to(tl.int64) * K + k, mask=inside[:, None] & (k < K), other=-1)
    return tl.max(tl.where((id >= 0) & (id < experts), 1, 0), 1)


@triton.jit
def _bank(table_ptr, rank, inside, rows_ptr, ALIGNED: tl.constexpr):
    """Where the banks of these ranks begin."""
    address = tl.load(table_ptr + rank, mask=inside, other=0)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    bank = address.to(rows_ptr.dtype)
    return tl.multiple_of(bank, 16) if ALIGNED else bank


@triton.jit
def _home(p, rank, count, R: tl.constexpr):
    """(rank, place of its tokens, whether there is one) of the p-th row that goes home, own ones last."""
    source = p // count
    return (source + rank + 1) % R, p - source * count, p < R * count


@triton.jit(do_not_specialize=["num_rows", "rank", "count"])
def _push_rows_kernel(
    rows_ptr, copy_ptr, own_ptr, table_ptr, num_rows, rank, count,
    C: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    PANELS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles = tl.cdiv(num_rows, BLOCK_T) * PANELS
    tile = tl.program_id(0)
    needed = _ranks_that_need(copy_ptr, tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), num_rows, R, BLOCK_R)
    while tile < tiles:
        row = tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T)
        column = tile % PANELS * BLOCK_C + tl.arange(0, BLOCK_C)
        at = row[:, None].to(tl.int64) * C + column[None, :]
        in_columns = (column < C)[None, :]
        values = tl.load(rows_ptr + at, mask=(needed != 0)[:, None] & in_columns, other=0)
        tile += tl.num_programs(0)
        following = _ranks_that_need(copy_ptr, tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), num_rows, R, BLOCK_R)
        first = rank.to(tl.int64) * count * C
        for i in range(1, R):
            target = (rank + i) % R
            mask = ((needed >> target) & 1 != 0)[:, None] & in_columns
            tl.store(_bank(table_ptr, target, True, rows_ptr, ALIGNED) + first + at, values, mask=mask)
        tl.store(own_ptr + at, values, mask=((needed >> rank) & 1 != 0)[:, None] & in_columns)
        needed = following


@triton.jit(do_not_specialize=["experts", "rank", "places", "first", "count"])
def _push_back_kernel(
    rows_ptr, ids_ptr, table_ptr, experts, rank, places, first, count,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PANELS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles = tl.cdiv(R * count, BLOCK_T) * PANELS
    tile = tl.program_id(0)
    target, place, inside = _home(tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), rank, count, R)
    needed = _are_needed(ids_ptr, target * places + first + place, inside, experts, K, BLOCK_K)
    while tile < tiles:
        target, place, inside = _home(tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), rank, count, R)
        column = tile % PANELS * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (needed != 0)[:, None] & (column < C)[None, :]
        row = (target * places + first + place).to(tl.int64)
        values = tl.load(rows_ptr + row[:, None] * C + column[None, :], mask=mask, other=0)
        bank = _bank(table_ptr, target, inside, rows_ptr, ALIGNED) + (rank * count + place).to(tl.int64) * C
        tile += tl.num_programs(0)
        target, place, inside = _home(tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), rank, count, R)
        needed = _are_needed(ids_ptr, target * places + first + place, inside, experts, K, BLOCK_K)
        tl.store(bank[:, None] + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["experts", "rank", "places", "first", "count"])
def _take_rows_kernel(
    out_ptr, bank_ptr, ids_ptr, experts, rank, places, first, count,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = p // count * places + first + p % count
    needed = _are_needed(ids_ptr, row, (p < R * count) & (p // count != rank), experts, K, BLOCK_K)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (needed != 0)[:, None] & (column < C)[None, :]
    values = tl.load(bank_ptr + p[:, None].to(tl.int64) * C + column[None, :], mask=mask, other=0)
    tl.store(out_ptr + row[:, None].to(tl.int64) * C + column[None, :], values, mask=mask)


def push_rows(rows_TC: Tensor, copy_TR: Tensor, own_TC: Tensor, to: Banks) -> None:
    tokens, columns = rows_TC.shape
    if not tokens:
        return
    ranks = copy_TR.shape[1]
    rows, width, warps = _tile(rows_TC, TILE_BYTES)
    tiles = cdiv(tokens, rows) * cdiv(columns, width)
    launch(
        _push_rows_kernel,
        (min(PROGRAMS, tiles),),
        (rows_TC, copy_TR, own_TC, to.table_R, tokens, to.rank, to.each),
        (columns, ranks, _aligned(rows_TC), rows, width, next_power_of_2(ranks)),
        num_warps=warps,
    )


def push_back(rows_UC: Tensor, ids_UK: Tensor, experts: int, to: Banks) -> None:
    columns, k, ranks = rows_UC.shape[1], ids_UK.shape[1], len(to.bytes_R)
    rows, width, warps = _tile(rows_UC, TILE_BYTES)
    tiles = cdiv(ranks * to.each, rows) * cdiv(columns, width)
    launch(
        _push_back_kernel,
        (min(PROGRAMS, tiles),),
        (rows_UC, ids_UK, to.table_R, experts, to.rank, to.places, to.first, to.each),
        (columns, k, ranks, _aligned(rows_UC), rows, width, next_power_of_2(k)),
        num_warps=warps,
    )


def take_rows(out_UC: Tensor, ids_UK: Tensor, experts: int, of: Banks) -> None:
    columns, k, ranks = out_UC.shape[1], ids_UK.shape[1], len(of.bytes_R)
    rows, width, warps = _tile(out_UC, TAKEN_BYTES)
    bank = of.bytes_R[of.rank].view(out_UC.dtype)
    launch(
        _take_rows_kernel,
        (cdiv(ranks * of.each, rows), cdiv(columns, width)),
        (out_UC, bank, ids_UK, experts, of.rank, of.places, of.first, of.each),
        (columns, k, ranks, rows, width, next_power_of_2(k)),
        num_warps=warps,
    )


def _tile(rows_NC: Tensor, size: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of so many bytes, 128 of them a thread."""
    width = column_block(rows_NC.shape[1], 1024)
    row_bytes = width * rows_NC.element_size()
    rows = max(1, min(MOST_ROWS, size // row_bytes))
    return rows, width, max(1, rows * row_bytes // (128 * 32))


def _aligned(rows_NC: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes in a bank."""
    return rows_NC.shape[1] * rows_NC.element_size() % 16 == 0
