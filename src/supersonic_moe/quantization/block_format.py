"""The FP8 block formats, defined to the bit: every quantizer, fused into a GEMM or not, gives these bytes.

Elements are e4m3 (``torch.float8_e4m3fn``: 4 exponent and 3 mantissa bits, largest value 448, no infinity, one NaN code
per sign). A block of elements shares one fp32 scale:

    amax  = max(2^-100, largest |x| of the block, NaN elements left out)
    scale = amax * fp32(1/448)            one rounded multiplication
            pow2: rounded up to a power of two,  bits(scale) <- (bits(scale) + 0x7fffff) & 0x7f800000
    q     = e4m3(x * fp32(1 / scale))     IEEE reciprocal once a block, one rounded product, round to nearest even
    x    ~= q * scale

These are IEEE fp32 operations in a fixed order, so torch, Triton and CUDA (``fmaxf``, ``__fmul_rn``, ``__frcp_rn``,
``cvt.rn.satfinite.e4m3x2.f32``) agree on every bit. Dividing x by the scale instead would gain 2^-20 of an e4m3 step
and cost a division an element. What follows from the definition:

* |x * (1 / scale)| <= 448 (1 + 2^-22) rounds to at most 448: nothing saturates. The largest element gets code 448
  with fp32 scales, 224 to 448 with powers of two.
* The floor 2^-100 keeps ``scale`` and its reciprocal normal numbers, so a block of zeros needs no special case (q = 0)
  and flushing of subnormals cannot change a byte. Elements below 2^-117 or so become 0.
* A NaN element becomes a NaN code (of either sign) and leaves its block alone. An infinite element makes the scale
  infinite, hence the reciprocal 0 and every value of the block NaN (0 * inf): no non-finite input ends as a finite
  value.
* Rounding error of a finite element: |x - q * scale| <= scale * 2^(max(floor(log2 |x / scale|), -6) - 4), half a step
  of e4m3, plus three fp32 roundings.

Blocks, with B = ceil(C / 128) and the last block of a dimension partial:

| format | data | scales | for |
|---|---|---|---|
| rows | (R, C) | (R, B): 1 x 128 along C | activations and their gradients |
| blocks | (E, N, K), and its transpose (E, K, N) | (E, N/128, K/128): 128 x 128, shared | weights |
| columns | (C, G): transposed, tokens contiguous | (C, G/128): 1 x 128 along tokens | operands of weight gradients |
| saved | (R, C) int8 | (R, B) words: 1 x 32, powers of two | what backward reads of Z |
| tiles | (C, G), and (R, C) as it lay | (C/128, G/128): 128 x 128, shared | the same, one scale for both uses |

A pre-activation that is saved for backward is no operand of a product, so it may have another format, *saved*: int8
with a power of two for each 1 x 32. Its error on Gaussian data is 0.8 %, where three bits of mantissa leave 2.6.

    amax  = max(2^-100, largest |x| of the group), NaN if one of them is
    e     = exponent field of bits(amax) + 0x10000        the next one where 127.5 steps or more would be needed
    step  = 2^(e - 127) / 64                              infinite for a group that is not finite or above 2^127 * 1.99
    q     = x / step, rounded to the nearest even integer: -127 .. 127                         x  = q * step

Exponents of the four groups of 128 columns are the bytes of one 32-bit word, lowest columns lowest, which lies where a
block's scale lies in the rows format: as many bytes, loaded by the same instructions. An element far below the largest
of its 32 loses what e4m3 would keep, below 1/250 of it all of its digits.

Hopper's FP8 tensor cores read both operands along the contraction, which is the rows in a weight gradient: hence the
transposed formats. G counts *positions*: the rows of each expert, rounded up to whole blocks of 128, so that no block
mixes experts. ``pad_segments`` gives the row at each position, -1 where there is none; such positions hold zeros and
add nothing to a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
INVERSE_MAX = float.fromhex("0x1.24924ap-9")  # fp32(1/448)
BLOCK = 128
SMALLEST_AMAX = 2.0**-100
GROUP = 32  # columns of a power of two in the saved format


def blocks(n: int) -> int:
    """Blocks that cover n elements."""
    return -(-n // BLOCK)


def padded_capacity(num_rows: int, num_experts: int) -> int:
    """Upper bound of the positions that any split of ``num_rows`` among ``num_experts`` needs, a multiple of 128."""
    return (num_rows + min(num_rows, num_experts) * (BLOCK - 1)) // BLOCK * BLOCK


def empty_e4m3(like: Tensor, *shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    """Rows start at multiples of 16 bytes, as TMA wants: a view of a wider buffer where columns is no such multiple."""
    columns = shape[-1]
    if columns % 16 == 0:
        return like.new_empty(*shape, dtype=dtype)  # a tuple takes torch half as long again
    return like.new_empty(*shape[:-1], -(-columns // 16) * 16, dtype=dtype)[..., :columns]


def empty_scales(like: Tensor, rows: int, columns: int, tma: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, columns) fp32; ``tma`` stores it transposed, at a stride that is a multiple of 16 bytes."""
    if not tma:
        return like.new_empty(rows, columns, dtype=dtype)
    return like.new_empty_strided((rows, columns), (1, -(-rows // 4) * 4), dtype=dtype)


def empty_saved(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(q (rows, columns) int8, words of exponents (rows, columns/128) int32, stored transposed): the saved format."""
    q = empty_e4m3(like, rows, columns, dtype=torch.int8)
    return q, empty_scales(like, rows, blocks(columns), True, torch.int32)


def saved_steps(words_RB: Tensor, columns: int) -> Tensor:
    """(R, columns) fp32: what a code of the saved format counts."""
    exponents = torch.stack([words_RB >> 8 * group & 0xFF for group in range(BLOCK // GROUP)], 2).flatten(1)
    steps = (exponents << 23).view(torch.float32) / 64
    return steps.repeat_interleave(GROUP, 1)[:, :columns]


# ---- layouts that other code has not kept ----------------------------------------------------------------------------


def aligned_rows(q: Tensor) -> Tensor:
    """``q`` as ``empty_e4m3`` lays it out: itself, or a copy where a hook on saved tensors (offloading, say) has
    brought back other strides or another address. Another dtype has no such layout.
    """
    *outer, columns = q.stride()
    if q.dtype.itemsize > 1 or (columns == 1 and all(n % 16 == 0 for n in (*outer, q.data_ptr()))):
        return q
    return empty_e4m3(q, *q.shape, dtype=q.dtype).copy_(q)


def transposed_scales(scale_RB: Tensor) -> Tensor:
    """Likewise, as ``empty_scales(..., tma=True)`` does."""
    row, column = scale_RB.stride()
    if row == 1 and column % 4 == 0 and scale_RB.data_ptr() % 16 == 0:
        return scale_RB
    rows, columns = scale_RB.shape
    return empty_scales(scale_RB, rows, columns, tma=True, dtype=scale_RB.dtype).copy_(scale_RB)
