"""The FP8 quantizers in plain torch, any device: the definition that ``quantization/block_format.py`` gives in words.

Shapes: R rows, C columns, E experts, N and K the sides of a weight, P rows of a routing plan, G positions (the rows of
each expert, padded to blocks of 128).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from supersonic_moe.kernels.interface import NEW, BothOrders, Into, Quantized, RowBlocks, Rows, Segments
from supersonic_moe.kernels.reference.gather import gather_rows
from supersonic_moe.kernels.reference.grouped_mm import grouped_mm, grouped_mm_wgrad
from supersonic_moe.quantization.block_format import (
    BLOCK,
    E4M3,
    GROUP,
    INVERSE_MAX,
    SMALLEST_AMAX,
    blocks,
    empty_e4m3,
    empty_saved,
    empty_scales,
)

# ---- one block -------------------------------------------------------------------------------------------------------


def block_scale(amax: Tensor, pow2: bool) -> Tensor:
    """fp32 scale of blocks whose largest magnitude is ``amax`` (fp32)."""
    scale = amax.clamp(min=SMALLEST_AMAX) * INVERSE_MAX
    if pow2:
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale


def _block_amax(x: Tensor, rows: int) -> Tensor:
    """Largest magnitude of each (rows x 128) block of the last two dimensions, NaN left out."""
    r, c = x.shape[-2:]
    magnitude = torch.where(x.isnan(), 0, x.float().abs())
    padded = F.pad(magnitude, (0, -c % BLOCK, 0, -r % rows))
    return padded.reshape(*x.shape[:-2], -(-r // rows), rows, blocks(c), BLOCK).amax((-3, -1))


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """One scale an element: a dimension of ``scale`` that counts blocks is repeated 128 times."""
    for dim in (-2, -1):
        if scale.shape[dim] != shape[dim]:
            scale = scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, shape[dim])
    return scale


def _quantize(x: Tensor, rows: int, pow2: bool) -> Quantized:
    scale = block_scale(_block_amax(x, rows), pow2)
    return Quantized((x.float() * _spread(1 / scale, x.shape)).to(E4M3), scale)


def dequantize_rows(x: Quantized, out_RC: Tensor | None = None) -> Tensor:
    """(R, C) bf16, into ``out`` if given."""
    values_RC = dequantize(*x, torch.float32).bfloat16()
    return values_RC if out_RC is None else out_RC.copy_(values_RC)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """q * scale for each of the formats (fp64 holds the product exactly). The shape of ``scale`` says which dimensions
    come in blocks of 128.
    """
    return q.to(dtype) * _spread(scale, q.shape).to(dtype)


# ---- the formats -----------------------------------------------------------------------------------------------------


def quantize_rows(x_RC: Tensor, pow2: bool = False, tma: bool = False) -> Quantized:
    """(q (R, C), scale (R, B)): 1 x 128 along the columns. ``tma``: see ``empty_scales``."""
    q_RC, scale_RB = _quantize(x_RC, 1, pow2)
    stored_RB = empty_scales(x_RC, x_RC.shape[0], blocks(x_RC.shape[1]), tma)
    return Quantized(empty_e4m3(x_RC, *x_RC.shape).copy_(q_RC), stored_RB.copy_(scale_RB))


def quantize_saved(z_RC: Tensor) -> Quantized:
    """(q (R, C) int8, words of exponents (R, C/128) int32): groups of 1 x 32, *saved* in ``block_format``."""
    z, (rows, columns) = z_RC.float(), z_RC.shape
    magnitude = torch.where(z.isnan(), math.inf, z.abs())
    groups = F.pad(magnitude, (0, -columns % BLOCK)).view(rows, blocks(columns), BLOCK // GROUP, GROUP)
    exponent = groups.amax(3).clamp(min=SMALLEST_AMAX).view(torch.int32).add(0x10000) >> 23
    q_RC, words_RB = empty_saved(z_RC, rows, columns)
    shifts = 8 * torch.arange(BLOCK // GROUP, device=z.device, dtype=torch.int32)
    words_RB.copy_((exponent << shifts).sum(2, dtype=torch.int32))
    inverse = (260 - exponent << 23).view(torch.float32).flatten(1).repeat_interleave(GROUP, 1)[:, :columns]
    rounded = z * inverse + 1.5 * 2**23  # whose lowest byte is the code
    return Quantized(q_RC.copy_(rounded.view(torch.int32).to(torch.int8)), words_RB)


def quantize_blocks(w_ENK: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(q (E, N, K), its transpose (E, K, N), scale (E, N/128, K/128)). The transpose's scales are ``scale.mT``."""
    q_ENK, scale = _quantize(w_ENK, BLOCK, pow2)
    q_EKN = empty_e4m3(w_ENK, *q_ENK.mT.shape).copy_(q_ENK.mT)
    return empty_e4m3(w_ENK, *q_ENK.shape).copy_(q_ENK), q_EKN, scale


def quantize_weights(weights_ENK: Sequence[Tensor], pow2: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``quantize_blocks`` of each."""
    return [quantize_blocks(w_ENK, pow2) for w_ENK in weights_ENK]


def quantize_columns(
    x_RC: Tensor, index_G: Tensor, pow2: bool = False, tiled: bool = False, segments: Segments | None = None
) -> Quantized:
    """(q (C, G), scale): column g is row index[g] of x, or zeros where index[g] < 0. All of them, whatever
    ``segments`` say.

    The scale is (C, G/128), or (C/128, G/128) where ``tiled``: one for 128 x 128 elements, a single number per block of
    the contraction where a GEMM would otherwise multiply by one number per row.
    """
    return _quantize(gather_rows(x_RC, index_G).T.contiguous(), BLOCK if tiled else 1, pow2)


def quantize_both_orders(x_RC: Tensor, index_G: Tensor, pow2: bool = False) -> BothOrders:
    """Rows (R, C) scaled 1 x 128, as a product that sums over columns reads them: a quiet row beside a loud one keeps
    its digits. Columns (C, G) with scales (C/128, G/128), for a product that sums over rows.
    """
    return BothOrders(quantize_rows(x_RC, pow2, tma=True), quantize_columns(x_RC, index_G, pow2, tiled=True))


def pad_segments(expert_offsets: Tensor, gather_index_P: Tensor, capacity: int) -> Segments:
    """Positions of each expert: its rows first, in order, then none up to whole blocks. ``capacity`` is G; see
    ``padded_capacity``.
    """
    counts = expert_offsets.diff()
    padded_offsets = F.pad(((counts + BLOCK - 1) // BLOCK * BLOCK).cumsum(0), (1, 0)).clamp(max=capacity)
    position = torch.arange(capacity, device=expert_offsets.device)
    expert = torch.searchsorted(padded_offsets[1:].contiguous(), position, right=True)
    row = position - F.pad(padded_offsets[:-1] - expert_offsets[:-1], (0, 1))[expert]
    held = row < F.pad(expert_offsets[1:], (0, 1))[expert]
    token = torch.full_like(row, -1)
    token[held] = gather_index_P[row[held]].long()
    row = torch.where(token >= 0, row, -1)
    read = token.view(-1, BLOCK)
    block = torch.arange(len(read), device=token.device)
    aligned = read[:, 0] // BLOCK
    shared = (read[:, 0] >= 0) & (read[:, 0] % BLOCK == 0) & (aligned < len(read))
    source = torch.where(shared, aligned, block)
    source = torch.where((read[source] == read).all(1), source, block)
    return Segments(padded_offsets.int(), row.int(), token.int(), source.int())


# ---- products --------------------------------------------------------------------------------------------------------


def grouped_mm_fp8(
    a: Rows[Quantized], b_ENK: Quantized, expert_offsets: Tensor, parts: Sequence[RowBlocks] = ()
) -> Tensor:
    """(P, N) bf16: rows of expert e are a[rows] @ b[e].T of the dequantized operands, fp32 products and one rounding;
    dead rows are NaN. All ``parts`` at once: the bits of a BLAS depend on how many rows it has.
    """
    exact = Rows(dequantize(*a.x, torch.float32), a.gather_index)
    d_PN = grouped_mm(exact, dequantize(*b_ENK, torch.float32).mT, expert_offsets).bfloat16()
    for part in parts:
        part.after(d_PN)
    return d_PN


def grouped_mm_wgrad_fp8(
    a_MG: Quantized, b_NG: Quantized, padded_offsets: Tensor, into: Into = NEW, source: Tensor | None = None
) -> Tensor:
    """(E, M, N): a[:, positions of e] @ b[:, positions of e].T of the dequantized operands, or its transpose (E, N, M);
    exact zeros for an expert without rows. In bf16, or into ``out`` (fp32) if given; ``accumulate`` adds to it.
    """
    a, b = dequantize(*a_MG, torch.float32), dequantize(*b_NG, torch.float32)
    if source is not None:
        a = a.view(len(a), -1, BLOCK)[:, source.long()].view_as(a)
    dw = grouped_mm_wgrad(Rows(a.T), b.T, padded_offsets, into)
    return dw if into.out is not None else dw.bfloat16()
