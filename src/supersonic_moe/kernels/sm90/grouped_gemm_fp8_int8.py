"""Grouped GEMM in FP8 whose result is only gathered and summed, on sm_90a: D[r] = A[r] · B[expert of r], e4m3 with
block scales, D in int8 with a power of two for 32 columns of a row.

Layout (formats: ``quantization/block_format.py``)
    A (P, K), B (E, N, K) and offsets as in grouped_gemm_fp8.py, rows in order. D (P, N) in the *saved* format, with its
    words (P, N/128) row by row: ``gather_sum_int8`` reads whole rows.
Tiles
    As grouped_gemm_fp8.py, without an index. Half of a tile leaves during each of the next one's first two products, so
    32 KB of staging are enough.
Maths
    As there, but for the rounding: from the fp32 sums to int8, 0.8 % of a Gaussian row where bf16 has 0.17 and the
    product's operands 3.7 and more.
Cost
    2·P·K·N FLOP. Bytes: P·K + E·K·N + (1 + 1/32)·P·N at least, where bf16 has 2·P·N; and as many are saved again where
    rows are read.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BUFFER_BYTES, fp8_form
from supersonic_moe.kernels.sm90.operands import map_of_rows, map_of_scales, map_of_stored_rows, scaled_weight
from supersonic_moe.quantization.block_format import blocks, empty_e4m3, empty_scales

FORM = fp8_form(1, False, 2 * BUFFER_BYTES)
OPCODES = ("QGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "SHFL", "STS.U16")
SPECS = (FORM.spec("grouped_gemm_fp8_int8", OPCODES),)


@functools.cache
def _kernel() -> Kernel:
    return kernel_of(SPECS[0])


def grouped_mm_fp8_int8(a_PK: Quantized, b_ENK: Quantized, expert_offsets: Tensor) -> Quantized:
    """(P, N) int8 with words (P, N/128) int32; rows at and past ``expert_offsets[-1]`` are undefined. Scales are fp32,
    of A (P, K/128), stored transposed, of B (E, N/128, K/128).
    """
    (a, a_scale), rows, columns = a_PK, a_PK.shape[0], b_ENK.shape[1]
    d = Quantized(
        empty_e4m3(a, rows, columns, dtype=torch.int8), empty_scales(a, rows, blocks(columns), False, torch.int32)
    )
    if d.q.numel() == 0:
        return d
    with on_device(a):
        map_d = map_of_stored_rows(d.q)
        _kernel().launch(
            FORM.grid(a.get_device()),
            map_a=map_of_rows(a, None, box=(BLOCK_M, FORM.block_k)),
            map_scale_a=map_of_scales(a_scale, None, map_d),
            map_d=map_d,
            **scaled_weight(b_ENK, FORM),
            offsets=expert_offsets,
            d=d.q,
            d_row_bytes=d.q.stride(0),
            words=d.scale,
            words_row=d.scale.stride(0),
        )
    return d
