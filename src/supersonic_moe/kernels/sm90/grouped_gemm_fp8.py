"""Grouped GEMM in FP8 with ragged rows on sm_90a: D[r] = A[r] · B[expert of r], e4m3 with block scales, bf16 out.

Layout (formats: ``kernels/block_format.py``)
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
    The tensor core sums 128 of K, fp32 registers the rest (mainloop_fp8.cuh); one rounding to bf16. K and N are
    multiples of 8; what lies past N or K loads as zero.
Cost
    2·P·K·N FLOP. Bytes: P·K + E·K·N + 2·P·N at least, and 1/32 of the operands for their scales; a tile reads
    K·(128 + 256) bytes from L2.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import I32, I64, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.interface import Quantized, Rows
from supersonic_moe.kernels.sm90.mainloop import (
    BLOCK_M,
    BLOCK_N,
    FP8_BLOCK_K,
    FP8_OPCODES,
    WARP_ROWS,
    mainloop_spec,
    map_of_rows,
    multiprocessors,
)


def gemm_fp8_spec(*, gather: bool, cluster: int) -> KernelSpec:
    return mainloop_spec(
        "grouped_gemm_fp8", cluster=cluster, gather=gather, opcodes=FP8_OPCODES, scaled=True, share_a=cluster == 2
    )


SPECS = tuple(gemm_fp8_spec(gather=g, cluster=c) for g, c in ((False, 1), (True, 1), (True, 2)))


@functools.cache
def _kernel(gather: bool, cluster: int) -> Kernel:
    argtypes = (*[TENSOR_MAP] * 4, PTR, PTR, I32, I32, I32, PTR, I64, PTR, I64, I32, I32, PTR, I64)
    return Kernel(gemm_fp8_spec(gather=gather, cluster=cluster), argtypes)


def gathering_cluster(column_blocks: int, gather: bool) -> int:
    """Blocks that share gathered rows; the column blocks have to come in pairs."""
    return 2 if gather and column_blocks % 2 == 0 else 1


def map_of_scales(scale_RB: Tensor, index: Tensor | None, unused: TensorMap) -> TensorMap:
    """Scales of A in the order that the kernel reads: by TMA without an index, else by row, without a map."""
    contiguous = 0 if index is None else 1
    if scale_RB.stride(contiguous) != 1 and scale_RB.shape[contiguous] > 1:
        way = "transposed (tma=True)" if index is None else "row by row (tma=False)"
        with_index = "without" if index is None else "with"
        raise ValueError(
            f"the scales of rows must be stored {way} {with_index} an index; got strides {scale_RB.stride()} for shape "
            f"{tuple(scale_RB.shape)}. Quantise with quantize_rows(..., tma={index is None})."
        )
    return unused if index is not None else map_of_columns(scale_RB)


def map_of_columns(scale_RB: Tensor) -> TensorMap:
    """Scales stored transposed, as TMA loads those of 128 rows at once, of whichever row the first is."""
    (rows, count), (row, column) = scale_RB.shape, scale_RB.stride()
    return tensor_map(scale_RB, box=(1, BLOCK_M + 4), swizzle=0, shape=(count, rows), strides=(column, row))


def grouped_mm_fp8(a: Rows[Quantized], b_ENK: Quantized, expert_offsets: Tensor) -> Tensor:
    """(P, N) bf16; rows at and past ``expert_offsets[-1]`` are undefined. Scales are fp32, of A (T, K/128), of B (E,
    N/128, K/128).
    """
    ((a_TK, a_scale), index), (b, b_scale) = a, b_ENK
    rows, depth = a.num_rows, a_TK.shape[1]
    num_experts, columns, _ = b.shape
    d_PN = a_TK.new_empty(rows, columns, dtype=torch.bfloat16)
    if d_PN.numel() == 0:
        return d_PN
    gather = index is not None
    cluster = gathering_cluster(-(-columns // BLOCK_N), gather)
    map_d = tensor_map(d_PN, box=(WARP_ROWS, 1, 64), shape=(rows, 1, columns), strides=(columns, columns, 1))
    with on_device(a_TK):
        grid = multiprocessors(a_TK.device.index) // cluster * cluster
        _kernel(gather, cluster).launch(
            (grid, 1, 1),
            map_of_rows(a_TK, index, box=(BLOCK_M, FP8_BLOCK_K)),
            map_of_scales(a_scale, index, map_d),
            tensor_map(b, box=(1, BLOCK_N, FP8_BLOCK_K)),
            map_d,
            expert_offsets,
            index,
            num_experts,
            columns,
            -(-depth // FP8_BLOCK_K),
            a_scale,
            a_scale.stride(0),
            b_scale,
            *b_scale.stride(),
            d_PN,
            d_PN.stride(0) * 2,
        )
    return d_PN
