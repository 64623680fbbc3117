"""Rows that some rank needs, to where it reads them (``parallel/push.py``): out, home again, and out of the bank.

    push_rows     row t -> bank of r, place rank·each + t      for each rank r with copy[t, r] >= 0
    needed_rows   which tokens that came have an expert here, u = r·M + t of rank r; counted on the device
    push_back     row u -> bank of r, place rank·each + t - first      for each of these
    take_rows     own bank, place r·each + t - first -> row u          for those of other ranks

Layout: rows (·, C) of words, contiguous; the banks of other ranks are addresses in a table on the device, so writes to
them go over NVLink. Rows that nobody needs are neither read nor written. What pushes is written by few programs that
stay: stores to another GPU are not waited for, so TILE_BYTES of loads in flight on each of PROGRAMS multiprocessors
are to fill NVLink. Which rows the next tile has is looked up while those of this one are loaded. Targets take turns, so
that no GPU has to take from all at once: ``push_rows`` begins with the rank after this one, and rows that
``needed_rows`` lists one after the other are of different ranks. Its list has no fixed order; places have.

No flag is told here: that happens in the next launch of the stream (``kernels/sm90/exchange_flags.py``), whose release
at system scope comes after all writes of this one.

Bytes: N·C read and N·C written for N rows that are needed (``push_rows`` reads a row once for all ranks), and 4·R a
token, 4·K a place, 4 a row to look up. Roofline on H200 for what goes to others: NVLink, 450 GB/s each way; not timed
yet.
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
TAKING, TAKEN_BYTES = 512, 16 * 1024
"""Programs and tiles of ``take_rows``, which has the whole GPU."""
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
def _row_of(found_ptr, n, count):
    """The n-th row that is needed; -1 past the last."""
    return tl.load(found_ptr + 1 + n, mask=n < count, other=-1)


@triton.jit
def _place(row, places, first, each):
    """(rank, place of its tokens, whether there is one) of a row in this exchange."""
    source = tl.maximum(row, 0) // places
    place = row - source * places - first
    return source, place, (row >= 0) & (place >= 0) & (place < each)


@triton.jit
def _bank(table_ptr, rank, inside, rows_ptr, ALIGNED: tl.constexpr):
    """Where the banks of these ranks begin."""
    address = tl.load(table_ptr + rank, mask=inside, other=0)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    bank = address.to(rows_ptr.dtype)
    return tl.multiple_of(bank, 16) if ALIGNED else bank


@triton.jit(do_not_specialize=["num_rows", "rank", "each"])
def _push_rows_kernel(
    rows_ptr, copy_ptr, own_ptr, table_ptr, num_rows, rank, each,
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
        first = rank.to(tl.int64) * each * C
        for i in range(1, R):
            target = (rank + i) % R
            mask = ((needed >> target) & 1 != 0)[:, None] & in_columns
            tl.store(_bank(table_ptr, target, True, rows_ptr, ALIGNED) + first + at, values, mask=mask)
        tl.store(own_ptr + at, values, mask=((needed >> rank) & 1 != 0)[:, None] & in_columns)
        needed = following


@triton.jit(do_not_specialize=["places", "experts"])
def _needed_rows_kernel(
    ids_ptr, found_ptr, places, experts, K: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, k = n % R * places + n // R, tl.arange(0, BLOCK_K)[None, :]
    mask = (n < R * places)[:, None] & (k < K)
    id = tl.load(ids_ptr + row[:, None].to(tl.int64) * K + k, mask=mask, other=-1)
    needed = tl.max(tl.where((id >= 0) & (id < experts), 1, 0), 1)
    first = tl.atomic_add(found_ptr, tl.sum(needed, 0), sem="relaxed")
    tl.store(found_ptr + 1 + first + tl.cumsum(needed, 0) - needed, row, mask=needed > 0)


@triton.jit(do_not_specialize=["rank", "places", "first", "each"])
def _push_back_kernel(
    rows_ptr, found_ptr, table_ptr, rank, places, first, each,
    C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PANELS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    count = tl.load(found_ptr)
    tiles = tl.cdiv(count, BLOCK_T) * PANELS
    tile = tl.program_id(0)
    row = _row_of(found_ptr, tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), count)
    while tile < tiles:
        target, place, inside = _place(row, places, first, each)
        column = tile % PANELS * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < C)[None, :]
        values = tl.load(rows_ptr + row[:, None].to(tl.int64) * C + column[None, :], mask=mask, other=0)
        bank = _bank(table_ptr, target, inside, rows_ptr, ALIGNED) + (rank * each + place).to(tl.int64) * C
        tile += tl.num_programs(0)
        row = _row_of(found_ptr, tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), count)
        tl.store(bank[:, None] + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["rank", "places", "first", "each"])
def _take_rows_kernel(
    out_ptr, bank_ptr, found_ptr, rank, places, first, each,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PANELS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    count = tl.load(found_ptr)
    tiles = tl.cdiv(count, BLOCK_T) * PANELS
    tile = tl.program_id(0)
    while tile < tiles:
        row = _row_of(found_ptr, tile // PANELS * BLOCK_T + tl.arange(0, BLOCK_T), count)
        source, place, inside = _place(row, places, first, each)
        column = tile % PANELS * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (inside & (source != rank))[:, None] & (column < C)[None, :]
        at = (source * each + place).to(tl.int64)
        values = tl.load(bank_ptr + at[:, None] * C + column[None, :], mask=mask, other=0)
        tl.store(out_ptr + row[:, None].to(tl.int64) * C + column[None, :], values, mask=mask)
        tile += tl.num_programs(0)


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


def needed_rows(ids_UK: Tensor, experts: int, ranks: int) -> Tensor:
    places, k = ids_UK.shape[0] // ranks, ids_UK.shape[1]
    found = ids_UK.new_zeros(1 + ids_UK.shape[0])
    block_k = next_power_of_2(k)
    block_t = max(1, min(256, 4096 // block_k))
    launch(
        _needed_rows_kernel,
        (cdiv(ids_UK.shape[0], block_t),),
        (ids_UK, found, places, experts),
        (k, ranks, block_t, block_k),
    )
    return found


def push_back(rows_UC: Tensor, needed: Tensor, to: Banks) -> None:
    columns = rows_UC.shape[1]
    rows, width, warps = _tile(rows_UC, TILE_BYTES)
    launch(
        _push_back_kernel,
        (min(PROGRAMS, cdiv(rows_UC.shape[0], rows) * cdiv(columns, width)),),
        (rows_UC, needed, to.table_R, to.rank, to.places, to.first, to.each),
        (columns, _aligned(rows_UC), rows, width),
        num_warps=warps,
    )


def take_rows(out_UC: Tensor, needed: Tensor, of: Banks) -> None:
    columns = out_UC.shape[1]
    rows, width, warps = _tile(out_UC, TAKEN_BYTES)
    launch(
        _take_rows_kernel,
        (min(TAKING, cdiv(out_UC.shape[0], rows) * cdiv(columns, width)),),
        (out_UC, of.bytes_R[of.rank].view(out_UC.dtype), needed, of.rank, of.places, of.first, of.each),
        (columns, rows, width),
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
