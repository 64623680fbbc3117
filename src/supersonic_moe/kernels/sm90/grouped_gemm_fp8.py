"""Grouped GEMM in FP8 with ragged rows on sm_90a: D[r] = A[r] · B[expert of r], e4m3 with block scales, bf16 out.

Layout (formats: ``quantization/block_format.py``)
    A (P, K) with scales (P, K/128) stored K block by K block, as TMA loads 128 rows of one; or (T, K) read through an
    index of P rows, -1 for a row of zeros, with scales stored row by row. B (E, N, K), K contiguous, with a scale for
    each 128 × 128 block in any strides: the transposed weights of the data gradient bring the same scales transposed.
    D (P, N) bf16. Rows of A and B start at multiples of 16 bytes. offsets as in grouped_gemm.py.
Tiles
    128 × 256 a block in two halves of 128 columns, two math warpgroups of 64 rows, K in stages of 128 (128 bytes),
    three stages and 64 KB of staging. No clusters where A lies in order: the loads are not what limits, and a cluster
    ties two blocks together. Rows through an index cost the TMA unit a box each, so there two blocks with neighbouring
    columns gather half of the rows each, for both.
Maths
    The tensor core sums 128 of K, fp32 registers the rest (gemm/k_loop_fp8.cuh); one rounding to bf16. K and N are
    multiples of 8; what lies past N or K loads as zero.
Cost
    2·P·K·N FLOP. Bytes: P·K + E·K·N + 2·P·N at least, and 1/32 of the operands for their scales; a tile reads
    K·(128 + 256) bytes from L2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.kernels.interface import Quantized, RowBlocks, Rows
from supersonic_moe.kernels.sm90.gemm_config import (
    BLOCK_M,
    BUFFER_BYTES,
    FP8_OPCODES,
    GemmConfig,
    choose,
    fp8_form,
)
from supersonic_moe.kernels.sm90.operands import (
    map_of_rows,
    map_of_run,
    map_of_scales,
    map_of_stored_rows,
    scaled_weight,
)
from supersonic_moe.kernels.sm90.row_blocks import ALL_TILES, IN_PARTS, walks

STAGING_BYTES = 4 * BUFFER_BYTES


def _spec(config: GemmConfig, **parts: int) -> KernelSpec:
    return config.spec("grouped_gemm_fp8", FP8_OPCODES, **parts)


SPECS = (
    *(_spec(fp8_form(cluster, gather, STAGING_BYTES)) for gather, cluster in ((False, 1), (True, 1), (True, 2))),
    _spec(fp8_form(1, False, STAGING_BYTES), **IN_PARTS),
)


@functools.cache
def _kernel(config: GemmConfig, in_parts: bool = False) -> Kernel:
    return kernel_of(_spec(config, **(IN_PARTS if in_parts else {})))


def grouped_mm_fp8(
    a: Rows[Quantized], b_ENK: Quantized, expert_offsets: Tensor, parts: Sequence[RowBlocks] = ()
) -> Tensor:
    """(P, N) bf16; rows at and past ``expert_offsets[-1]`` are undefined. Scales are fp32, of A (T, K/128), of B (E,
    N/128, K/128). Rows as they lie have parts.
    """
    (a_TK, a_scale), index = a
    columns = b_ENK.shape[1]
    d_PN = a_TK.new_empty(a.num_rows, columns, dtype=torch.bfloat16)
    if d_PN.numel() == 0:
        return d_PN
    config = choose(columns, index is not None, staging_bytes=STAGING_BYTES)
    with on_device(a_TK):
        map_d = map_of_stored_rows(d_PN)
        arguments = dict(
            map_a=map_of_rows(a_TK, index, box=(BLOCK_M, config.block_k)),
            map_a_run=map_of_run(a_TK, index, config.run_box, map_d),
            map_scale_a=map_of_scales(a_scale, index, map_d),
            map_d=map_d,
            **scaled_weight(b_ENK, config),
            offsets=expert_offsets,
            index=index,
            scale_a=a_scale,
            scale_a_row=a_scale.stride(0),
            d=d_PN,
            d_row_bytes=d_PN.stride(0) * 2,
        )
        for walk, after in walks(parts, index is None):
            _kernel(config, walk is not ALL_TILES).launch(config.grid(a_TK.get_device()), **arguments, **walk)
            after(d_PN)
    return d_PN
