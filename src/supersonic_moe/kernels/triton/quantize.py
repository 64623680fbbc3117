"""FP8 quantizers: rows, weight blocks, and operands of weight gradients, each in one pass over its bf16 input.

The arithmetic is that of ``quantization/block_format.py``, bit for bit. Moving bytes and turning tiles cost time:

* ``quantize_rows``: a program owns a few rows of a few 128-column blocks; each maximum takes three warp shuffles.
* ``quantize_weights``, ``quantize_columns``: a program owns a tile of 128 x 128 elements and writes
  it transposed. A tile is indexed (32, 4, 128): Triton keeps the middle dimension in the registers of one thread, so
  the four bytes of four consecutive rows become one 32-bit word without an exchange, and the transposition through
  shared memory moves words, not bytes: a quarter of the accesses. 128 threads hold 128 elements each, 16 loads of 16
  bytes in flight. Instructions and registers are what limits: a tile stays in bf16 pairs, as loaded, until its codes
  are computed, and the conversion, which makes two of them, writes them where the words want them (``_codes_ptx``).
  That is 7 to 9 instructions an element in 96 to 128 registers, for four or five programs an SM; with fp32 tiles it
  was 10 to 12, and two or three programs.

Rows of the FP8 outputs start at multiples of 16 bytes, and so do the scales that TMA loads: what its descriptors want.

Bytes an element, bf16 in, and roofline on H200 at 4.26 TB/s:

| function | read + written | case | roofline |
|---|---|---|---|
| quantize_rows | 2 + 1 | 8192 x 3072 | 18 us |
| quantize_weights | 2 + 2 | 8 x 3072 x 3072 | 71 us |
| quantize_columns | 2 + 1 | 65536 x 1536 | 71 us |
| quantize_columns, gathered | 2 of each token + 1 | 8192 tokens to 65536 x 3072 | 59 us; 403 MB come from L2 |
| quantize_both_orders | 2 · 2 + 2, two passes | 65536 x 3072 | 284 us |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import BothOrders, Quantized, Segments
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import row_tiles, rows_and_blocks
from supersonic_moe.quantization import block_format
from supersonic_moe.quantization.block_format import blocks, empty_e4m3, empty_scales

TILE = 8192  # elements of a program of quantize_rows: eight 16-byte loads in flight for each of 128 threads
BLOCK = tl.constexpr(block_format.BLOCK)
SMALLEST_AMAX = tl.constexpr(block_format.SMALLEST_AMAX)
INVERSE_MAX = tl.constexpr(block_format.INVERSE_MAX)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# ---- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def _block_scale(amax, POW2: tl.constexpr):
    """(scale, its reciprocal). ``tl.max`` leaves NaN out of amax; a block of NaN alone falls to the floor."""
    scale = tl.where(amax > SMALLEST_AMAX, amax, SMALLEST_AMAX) * INVERSE_MAX
    if POW2:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    if INTERPRETED:
        return scale, tl.div_rn(1.0, scale)
    return scale, tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [scale], tl.float32, is_pure=True, pack=1)


@triton.jit
def _e4m3(x):
    """Round to nearest even. The conversion of Triton 3.6's interpreter drops the carry of a mantissa that rounds up to
    the next power of two and keeps only three bits of a NaN, so there x is first put on the e4m3 grid (adding 1.5 *
    2^(exponent + 20) leaves three bits), and NaN gets those three bits set.
    """
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        exponent = tl.maximum(bits & 0x7F800000, (127 - 6) << 23)
        magic = 1.5 * (exponent + (20 << 23)).to(tl.float32, bitcast=True)
        on_grid = (tl.abs(x) + magic) - magic
        nan = tl.full(x.shape, 0x7FF00000, tl.int32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, tl.where(bits < 0, -1.0 * on_grid, on_grid), nan)
    return x.to(tl.float8e4nv)


@triton.jit
def _tile_rows():
    """(32, 4): the rows of a tile, four consecutive ones in the second dimension."""
    return tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


def _codes_ptx(rows: bool) -> str:
    """Codes of four rows of four adjacent columns. $0..3: a word for each column, the first row in its lowest byte;
    with ``rows``, $4..7: a word for each row. Then the rows, two registers of bf16 pairs each, and a factor a column.
    """
    outputs, convert = (8 if rows else 4), "cvt.rn.satfinite.e4m3x2.f32"  # its first source goes to the higher byte
    lines = ["{ .reg .f32 x<8>; .reg .b16 h<10>;"]
    for pair in range(2):
        for row in range(4):
            source = outputs + 2 * row + pair
            lines += [f"shl.b32 x{row}, ${source}, 16;", f"and.b32 x{4 + row}, ${source}, 0xffff0000;"]
        for side in range(2):
            column, factor = [f"x{4 * side + row}" for row in range(4)], outputs + 8 + 2 * pair + side
            lines += [f"mul.rn.f32 {x}, {x}, ${factor};" for x in column]
            lines += [f"{convert} h{8 + i}, {column[2 * i + 1]}, {column[2 * i]};" for i in range(2)]
            lines += [f"mov.b32 ${2 * pair + side}, {{h8, h9}};"]
        if rows:
            lines += [f"{convert} h{4 * pair + row}, x{4 + row}, x{row};" for row in range(4)]
    if rows:
        lines += [f"mov.b32 ${4 + row}, {{h{row}, h{4 + row}}};" for row in range(4)]
    return "\n".join([*lines, "}"])


TRANSPOSED = tl.constexpr(_codes_ptx(rows=False))
BOTH_ORDERS = tl.constexpr(_codes_ptx(rows=True))
LARGEST = tl.constexpr(  # of two columns of four rows in bf16, with a sign that means nothing
    "{ .reg .b32 a, b; max.xorsign.abs.bf16x2 a, $1, $2; max.xorsign.abs.bf16x2 b, $3, $4; "
    "max.xorsign.abs.bf16x2 $0, a, b; }"
)


@triton.jit
def _four_rows(x):
    """(32, 4, 128) -> four of (32, 128), the n-th of every four rows. They are in one thread: nothing moves."""
    even, odd = tl.split(tl.reshape(tl.permute(x, (0, 2, 1)), (BLOCK // 4, BLOCK, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _column_amax(x):
    """(32, 4, 128) bf16 -> (32, 128) fp32: the largest magnitude of four rows, NaN left out."""
    if INTERPRETED:
        return tl.max(tl.abs(x.to(tl.float32)), 1)
    tl.static_assert(x.dtype == tl.bfloat16, "quantizers take bfloat16")
    x0, x1, x2, x3 = _four_rows(x)
    largest = tl.inline_asm_elementwise(LARGEST, "=r,r,r,r,r", [x0, x1, x2, x3], tl.bfloat16, is_pure=True, pack=2)
    return tl.abs(largest.to(tl.float32))


@triton.jit
def _transposed_words(x, inverse):
    """e4m3 of x * inverse, (32, 4, 128) bf16 and (1, 128) fp32, as (128, 32) words of four codes, the lowest row in the
    lowest byte.
    """
    if INTERPRETED:
        codes = _e4m3(x.to(tl.float32) * inverse[:, None, :]).to(tl.uint8, bitcast=True).to(tl.int32)
        return tl.trans(tl.sum(codes << (8 * tl.arange(0, 4)[None, :, None]), 1))
    x0, x1, x2, x3 = _four_rows(x)
    words = tl.inline_asm_elementwise(
        TRANSPOSED, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,f,f,f,f", [x0, x1, x2, x3, inverse], tl.int32,
        is_pure=True, pack=4,
    )  # fmt: skip
    return tl.trans(words)


@triton.jit
def _both_orders(x, inverse):
    """The same words, and the codes as x lies."""
    if INTERPRETED:
        return _transposed_words(x, inverse), _e4m3(x.to(tl.float32) * inverse[:, None, :])
    x0, x1, x2, x3 = _four_rows(x)
    words, q0, q1, q2, q3 = tl.inline_asm_elementwise(
        BOTH_ORDERS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,f,f,f,f", [x0, x1, x2, x3, inverse],
        (tl.int32, tl.uint8, tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4,
    )  # fmt: skip
    codes = tl.reshape(tl.join(tl.join(q0, q2), tl.join(q1, q3)), (BLOCK // 4, BLOCK, 4))
    return tl.trans(words), tl.permute(codes, (0, 2, 1)).to(tl.float8e4nv, bitcast=True)


# ---- rows ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "scale_block_stride"])
def _rows_kernel(
    x_ptr, q_ptr, scale_ptr, num_rows, x_stride, q_stride, scale_row_stride, scale_block_stride,
    C: tl.constexpr, POW2: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, block, column = rows_and_blocks(C, ROWS, BLOCKS, BLOCK)
    row = row[:, None]
    mask = (row < num_rows)[:, :, None] & (column < C)
    x = tl.load(x_ptr + (row * x_stride)[:, :, None] + column, mask=mask, other=0.0).to(tl.float32)
    scale, inverse = _block_scale(tl.max(tl.abs(x), 2), POW2)
    tl.store(q_ptr + (row * q_stride)[:, :, None] + column, _e4m3(x * inverse[:, :, None]), mask=mask)
    scale_ptrs = scale_ptr + row * scale_row_stride + block * scale_block_stride.to(tl.int64)
    tl.store(scale_ptrs, scale, mask=(row < num_rows) & (block * BLOCK < C))


def quantize_rows(x_RC: Tensor, pow2: bool = False, tma: bool = False) -> Quantized:
    """(q (R, C), scale (R, B)). ``tma`` stores the scales of one block of columns next to each other, as TMA loads them
    with a tile of rows; otherwise those of one row, as a gather of rows does.
    """
    num_rows, columns = x_RC.shape
    out = Quantized(empty_e4m3(x_RC, num_rows, columns), empty_scales(x_RC, num_rows, blocks(columns), tma))
    return quantize_rows_into(out, x_RC, pow2, tma)


def quantize_rows_into(out: Quantized, x_RC: Tensor, pow2: bool = False, tma: bool = False) -> Quantized:
    """``quantize_rows`` into memory of the caller, which is returned."""
    (num_rows, columns), (q_RC, scale_RB) = x_RC.shape, out
    if q_RC.numel() == 0:
        return out
    grid, tile = row_tiles(num_rows, columns, TILE, 2 if tma else 8)
    strides = x_RC.stride(0), q_RC.stride(0), scale_RB.stride(0), scale_RB.stride(1)
    launch(_rows_kernel, grid, (x_RC, q_RC, scale_RB, num_rows, *strides), (columns, pow2, *tile))
    return out


# ---- weights ---------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_tile(
    tile, w_ptr, q_ptr, transposed_ptr, scale_ptr, w_expert_stride, w_stride,
    N: tl.constexpr, K: tl.constexpr, Q_STRIDE: tl.constexpr, WORDS: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """One of the tiles of an expert's weight, counted along K first. Offsets of a tile are 64-bit and those inside it
    32-bit: 64-bit offsets of every row would take a third more registers.
    """
    TILES_N: tl.constexpr = (N + BLOCK - 1) // BLOCK
    TILES_K: tl.constexpr = (K + BLOCK - 1) // BLOCK
    expert = tl.program_id(1).to(tl.int64)
    first_n = tile // TILES_K * BLOCK
    first_k = tile % TILES_K * BLOCK
    row = _tile_rows()
    column = tl.arange(0, BLOCK)
    in_k = first_k + column < K
    mask = (first_n + row < N)[:, :, None] & in_k[None, None, :]
    w_ptr += expert * w_expert_stride + first_n.to(tl.int64) * w_stride + first_k
    w = tl.load(w_ptr + (row * w_stride)[:, :, None] + column[None, None, :], mask=mask, other=0.0)
    scale, inverse = _block_scale(tl.max(_column_amax(w)), POW2)
    transposed, q = _both_orders(w, tl.broadcast_to(inverse, (1, BLOCK)))
    q_ptr += (expert * N + first_n) * Q_STRIDE + first_k
    tl.store(q_ptr + (row * Q_STRIDE)[:, :, None] + column[None, None, :], q, mask=mask)
    word = tile // TILES_K * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    words_ptr = transposed_ptr.to(tl.pointer_type(tl.int32)) + (expert * K + first_k) * WORDS
    tl.store(words_ptr + column[:, None] * WORDS + word, transposed, mask=in_k[:, None] & (word < WORDS))
    tl.store(scale_ptr + expert * TILES_N * TILES_K + tile, scale)


@triton.jit
def _blocks_kernel(
    w1_ptr, q1_ptr, transposed1_ptr, scale1_ptr, w1_expert_stride, w1_stride,
    w2_ptr, q2_ptr, transposed2_ptr, scale2_ptr, w2_expert_stride, w2_stride,
    N1: tl.constexpr, K1: tl.constexpr, Q1_STRIDE: tl.constexpr, WORDS1: tl.constexpr,
    N2: tl.constexpr, K2: tl.constexpr, Q2_STRIDE: tl.constexpr, WORDS2: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    TILES1: tl.constexpr = ((N1 + BLOCK - 1) // BLOCK) * ((K1 + BLOCK - 1) // BLOCK)
    tile = tl.program_id(0)
    if tile < TILES1:
        _quantize_tile(
            tile, w1_ptr, q1_ptr, transposed1_ptr, scale1_ptr, w1_expert_stride, w1_stride,
            N1, K1, Q1_STRIDE, WORDS1, POW2,
        )  # fmt: skip
    elif w2_ptr is not None:
        _quantize_tile(
            tile - TILES1, w2_ptr, q2_ptr, transposed2_ptr, scale2_ptr, w2_expert_stride, w2_stride,
            N2, K2, Q2_STRIDE, WORDS2, POW2,
        )  # fmt: skip


_NO_WEIGHT = (None, None, None, None, 0, 0), (0, 0, 0, 0), 0


def quantize_weights(weights_ENK: Sequence[Tensor], pow2: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q (E, N, K), its transpose (E, K, N), scale (E, N/128, K/128)) of one weight, or of both of a layer in one
    launch; the transpose's scales are ``scale.mT``.

    Either N or K is contiguous in a weight, and a program reads along it. Where that is N, scale is a transposed view.
    """
    results = []
    launched: list[tuple[tuple[Any, ...], tuple[int, ...], int]] = [_NO_WEIGHT, _NO_WEIGHT]
    for i, stored in enumerate(weights_ENK):
        turned = stored.stride(2) != 1 and stored.stride(1) == 1
        w_ENK = stored.mT if turned else stored
        if w_ENK.stride(1) >= 2**31 // block_format.BLOCK:  # offsets inside a tile are 32-bit
            w_ENK = w_ENK.contiguous()
        experts, n, k = w_ENK.shape
        q_ENK, q_EKN = empty_e4m3(w_ENK, experts, n, k), empty_e4m3(w_ENK, experts, k, n)
        scale = w_ENK.new_empty(experts, blocks(n), blocks(k), dtype=torch.float32)
        results.append((q_EKN, q_ENK, scale.mT) if turned else (q_ENK, q_EKN, scale))
        tensors = w_ENK, q_ENK, q_EKN, scale, w_ENK.stride(0), w_ENK.stride(1)
        launched[i] = tensors, (n, k, q_ENK.stride(1), q_EKN.stride(1) // 4), blocks(n) * blocks(k)
    (args1, sizes1, tiles1), (args2, sizes2, tiles2) = launched
    grid = tiles1 + tiles2, weights_ENK[0].shape[0]
    if 0 not in grid:
        launch(_blocks_kernel, grid, (*args1, *args2), (*sizes1, *sizes2, pow2))
    return results


def quantize_blocks(w_ENK: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize_weights`` of one weight."""
    return quantize_weights((w_ENK,), pow2)[0]


# ---- operands of weight gradients ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_blocks"])
def _columns_kernel(
    x_ptr, index_ptr, transposed_ptr, scale_ptr, num_blocks, x_stride, scale_stride,
    C: tl.constexpr, POW2: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    block, panel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(index_ptr + block * BLOCK + _tile_rows()).to(tl.int64)
    column = panel * BLOCK + tl.arange(0, BLOCK)
    mask = (row >= 0)[:, :, None] & (column < C)[None, None, :]
    x = tl.load(x_ptr + (row * x_stride)[:, :, None] + column[None, None, :], mask=mask, other=0.0)
    amax = _column_amax(x)
    if TILED:
        scale, inverse = _block_scale(tl.max(amax), POW2)
        tl.store(scale_ptr + block * scale_stride + panel, scale)
        inverse = tl.broadcast_to(inverse, (1, BLOCK))
    else:
        scale, inverse = _block_scale(tl.max(amax, 0, keep_dims=True), POW2)
        tl.store(scale_ptr + block * scale_stride + column[None, :], scale, mask=(column < C)[None, :])
    words = num_blocks.to(tl.int64) * (BLOCK // 4)
    word = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    transposed_ptrs = transposed_ptr.to(tl.pointer_type(tl.int32)) + column[:, None] * words + word[None, :]
    tl.store(transposed_ptrs, _transposed_words(x, inverse), mask=(column < C)[:, None])


def quantize_columns(
    x_RC: Tensor, index_G: Tensor, pow2: bool = False, tiled: bool = False, segments: Segments | None = None
) -> Quantized:
    """(q (C, G), scale (C, G/128), or (C/128, G/128) where ``tiled``): column g is row index[g] of x, or zeros where
    index[g] < 0. G is a multiple of 128. The scales of one block of positions lie next to each other. All blocks are
    written, whatever ``segments`` say.

    Programs walk all positions of one column panel before the next, so that rows that many positions gather come from
    DRAM once: a panel of 8192 tokens is 2 MB of the 50 MB L2.
    """
    columns, num_blocks = x_RC.shape[1], index_G.shape[0] // block_format.BLOCK
    q_CG = empty_e4m3(x_RC, columns, index_G.shape[0])
    scale = empty_scales(x_RC, blocks(columns) if tiled else columns, num_blocks, tma=True)
    if q_CG.numel():
        arguments = x_RC, index_G, q_CG, scale, num_blocks, x_RC.stride(0), scale.stride(1)
        launch(_columns_kernel, (num_blocks, blocks(columns)), arguments, (columns, pow2, tiled))
    return Quantized(q_CG, scale)


def quantize_both_orders(x_RC: Tensor, index_G: Tensor, pow2: bool = False) -> BothOrders:
    """Rows (R, C), in the layout of ``quantize_rows(..., tma=True)``, and columns (C, G) in tiles: two passes."""
    return BothOrders(quantize_rows(x_RC, pow2, tma=True), quantize_columns(x_RC, index_G, pow2, tiled=True))
