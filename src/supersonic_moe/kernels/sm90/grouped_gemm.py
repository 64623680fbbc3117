"""Grouped GEMM with ragged rows on sm_90a: D[r] = A[r] · B[expert of r], bf16, for rows sorted by expert.

Layout (row-major)
    A (P, K), K contiguous; or (T, K) read through an index of P rows, -1 for a row of zeros. B (E, K, N) with either K
    or N contiguous: weights as they are stored serve the forward product (K contiguous) and the data gradient (N
    contiguous) without a copy. D (P, N). offsets (E + 1) int32 on the device; any number of rows an expert, none
    included; rows past offsets[E] are not written.
Tiles
    128 × 256 a block, two math warpgroups of 64 × 256 that share B, K in stages of 64 (128 bytes), four stages; or 128
    × 320 where that pads N less; or, for a long K, 128 × 384 and three stages. A cluster of two blocks takes 256 rows
    of one expert and loads each half of B for both; where an expert's last rows fill at most one block, the two take
    neighbouring columns of them instead. Persistent: one block a multiprocessor, tiles in grouped order
    (schedule.cuh). The last tile of an expert stores its rows one by one, since TMA would write into the next expert.
Maths
    fp32 accumulation in the tensor core, one rounding to bf16. N and K are multiples of 8; what lies past N or K loads
    as zero.
Cost
    2·P·K·N FLOP. Bytes: 2·(P·K + E·K·N + P·N) at least; a tile reads 2·K·(128 + 128) bytes from L2 in a cluster.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import RowBlocks, Rows
from supersonic_moe.kernels.sm90.gemm_config import (
    BLOCK_M,
    BLOCK_N,
    BROAD_BLOCK_N,
    OPCODES,
    WIDE_BLOCK_N,
    GemmConfig,
    bf16_form,
    choose,
)
from supersonic_moe.kernels.sm90.operands import map_of_rows, map_of_run, map_of_stored_rows
from supersonic_moe.kernels.sm90.row_blocks import ALL_TILES, IN_PARTS, walks


def _spec(config: GemmConfig, n_contiguous: bool, **parts: int) -> KernelSpec:
    return config.spec("grouped_gemm", OPCODES, B_MN_MAJOR=int(n_contiguous), **parts)


SPECS = tuple(
    _spec(bf16_form(block_n, cluster, gather), n_contiguous)
    for n_contiguous in (False, True)
    for gather in (False, True)
    for cluster, block_n in ((1, BLOCK_N), (2, BLOCK_N), (2, BROAD_BLOCK_N), (2, WIDE_BLOCK_N))
) + tuple(_spec(bf16_form(block_n, 2, False), False, **IN_PARTS) for block_n in (BLOCK_N, BROAD_BLOCK_N, WIDE_BLOCK_N))


@functools.cache
def _kernel(config: GemmConfig, n_contiguous: bool, in_parts: bool = False) -> Kernel:
    return kernel_of(_spec(config, n_contiguous, **(IN_PARTS if in_parts else {})))


def grouped_mm(a: Rows[Tensor], b_EKN: Tensor, expert_offsets: Tensor, parts: Sequence[RowBlocks] = ()) -> Tensor:
    """(P, N) bf16; rows at and past ``expert_offsets[-1]`` are undefined. Rows as they lie have parts where K is
    contiguous in B and two blocks share it.
    """
    a_TK, index = a
    rows, depth = a.num_rows, a_TK.shape[1]
    num_experts, _, columns = b_EKN.shape
    d_PN = a_TK.new_empty(rows, columns)
    if d_PN.numel() == 0:
        return d_PN
    n_contiguous = b_EKN.stride(2) == 1
    config = choose(columns, index is not None, rows=rows // num_experts, depth=depth)
    block_k = config.block_k
    with on_device(a_TK):
        if n_contiguous:
            map_b = tensor_map(b_EKN, box=(1, block_k, 64))
        else:
            box = (1, config.block_n // config.cluster, block_k)
            expert, k, column = b_EKN.stride()
            map_b = tensor_map(b_EKN, box=box, shape=(num_experts, columns, depth), strides=(expert, column, k))
        arguments = dict(
            map_a=map_of_rows(a_TK, index, box=(BLOCK_M, block_k)),
            map_a_run=map_of_run(a_TK, index, config.run_box, map_b),
            map_b=map_b,
            map_d=map_of_stored_rows(d_PN),
            offsets=expert_offsets,
            index=index,
            experts=num_experts,
            columns=columns,
            blocks_k=-(-depth // block_k),
            d=d_PN,
            d_row_bytes=d_PN.stride(0) * 2,
        )
        for walk, after in walks(parts, index is None and not n_contiguous and config.cluster == 2):
            kernel = _kernel(config, n_contiguous, walk is not ALL_TILES)
            kernel.launch(config.grid(a_TK.get_device()), **arguments, **walk)
            after(d_PN)
    return d_PN
