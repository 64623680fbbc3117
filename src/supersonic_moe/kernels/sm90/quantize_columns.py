"""Rows gathered by an index, transposed and quantized along the rows, on sm_90a: operands of FP8 weight gradients.

    q[c][g] = e4m3(x[index[g]][c] / scale[c][block of g])        zeros where index[g] < 0

Layout (formats: ``quantization/block_format.py``, *columns*)
    x (R, C) bf16, index (G) int32, q (C, G), scale (C, G/128), the scales of one block of positions next to each other.
Tiles
    128 positions × 128 columns a block of 256 threads, all positions of one column panel before the next: rows that
    many positions gather then come from DRAM once. A thread holds 8 consecutive positions of 8 columns, so its codes of
    a column are 8 consecutive bytes (quantize_columns.cu).
Maths
    ``block_format``, bit for bit, as ``kernels/triton/quantize.py``, which does what is not done here: one scale for a
    whole tile, and rows or indices that do not start at multiples of 16 bytes. It refuses types other than bf16.
    A block of positions that reads the tokens of another one, ``source`` (``triton/pad_segments.py``), is left out:
    the product reads the other's. So are blocks behind the last expert's, for which room is kept.
Cost
    Bytes: 2·C for each position, all but the first read of a row from L2, and C·G: together 6 TB/s where each row is
    read eight times, which is what L2 gives. 7 instructions an element. Where all experts read the same tokens, an
    eighth of it with 8 experts.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.kernels import triton
from supersonic_moe.kernels.interface import Quantized, Segments
from supersonic_moe.quantization.block_format import BLOCK, blocks, empty_e4m3, empty_scales

SPECS = (KernelSpec("quantize_columns", "quantize_columns.cu", threads=256, opcodes=("F2FP.SATFINITE.E4M3", "HMNMX2")),)


@functools.cache
def _kernel() -> Kernel:
    return kernel_of(SPECS[0])


def quantize_columns(
    x_RC: Tensor, index_G: Tensor, pow2: bool = False, tiled: bool = False, segments: Segments | None = None
) -> Quantized:
    """(q (C, G), scale (C, G/128), or (C/128, G/128) where ``tiled``): see ``kernels/triton/quantize.py``. Here blocks
    that are not their own source, and those behind the last of ``segments``, stay unwritten.
    """
    columns, positions = x_RC.shape[1], index_G.shape[0]
    whole_chunks = columns % 8 == 0 and x_RC.stride() == (x_RC.stride(0) // 8 * 8, 1)
    whole_chunks = whole_chunks and x_RC.data_ptr() % 16 == 0 and index_G.data_ptr() % 16 == 0
    if tiled or x_RC.dtype is not torch.bfloat16 or not whole_chunks or columns * positions == 0:
        return triton.quantize_columns(x_RC, index_G, pow2, tiled, segments)
    q_CG = empty_e4m3(x_RC, columns, positions)
    scale = empty_scales(x_RC, columns, positions // BLOCK, tma=True)
    with on_device(x_RC):
        _kernel().launch(
            (positions // BLOCK, blocks(columns), 1),
            x=x_RC,
            x_row=x_RC.stride(0),
            index=index_G,
            offsets=None if segments is None else segments.offsets,
            segments=0 if segments is None else segments.offsets.shape[0] - 1,
            source=None if segments is None else segments.source,
            q=q_CG,
            q_column=q_CG.stride(0),
            scales=scale,
            scales_block=scale.stride(1),
            columns=columns,
            pow2=int(pow2),
        )
    return Quantized(q_CG, scale)
