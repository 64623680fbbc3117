"""Grouped GEMM with ragged rows on sm_90a: D[r] = A[r] · B[expert of r], bf16, for rows sorted by expert.

Layout (row-major)
    A (P, K), K contiguous; or (T, K) read through an index of P rows, -1 for a row of zeros. B (E, K, N) with either K
    or N contiguous: weights as they are stored serve the forward product (K contiguous) and the data gradient (N
    contiguous) without a copy. D (P, N). offsets (E + 1) int32 on the device; any number of rows an expert, none
    included; rows past offsets[E] are not written.
Tiles
    128 × 256 a block, two math warpgroups of 64 × 256 that share B, K in stages of 64 (128 bytes), four stages; or, for
    a long K, 128 × 384 and three. A cluster of two blocks takes 256 rows of one expert and loads each half of B for
    both; where an expert's last rows fill at most one block, the two take neighbouring columns of them instead.
    Persistent: one block a multiprocessor, tiles in grouped order (schedule.cuh). The last tile of an expert stores its
    rows one by one, since TMA would write into the next expert.
Maths
    fp32 accumulation in the tensor core, one rounding to bf16. N and K are multiples of 8; what lies past N or K loads
    as zero.
Cost
    2·P·K·N FLOP. Bytes: 2·(P·K + E·K·N + P·N) at least; a tile reads 2·K·(128 + 128) bytes from L2 in a cluster.
"""

from __future__ import annotations

import functools

from torch import Tensor

from supersonic_moe.jit.launch import I32, I64, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import Rows
from supersonic_moe.kernels.sm90.mainloop import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    OPCODES,
    WARP_ROWS,
    WIDE_BLOCK_N,
    cluster_size,
    mainloop_spec,
    map_of_rows,
    multiprocessors,
    tile_columns,
)


def gemm_spec(*, b_n_contiguous: bool, gather: bool, cluster: int, block_n: int) -> KernelSpec:
    constants = (("B_MN_MAJOR", int(b_n_contiguous)),)
    return mainloop_spec(
        "grouped_gemm", block_n=block_n, cluster=cluster, gather=gather, constants=constants, opcodes=OPCODES
    )


SPECS = tuple(
    gemm_spec(b_n_contiguous=n, gather=g, cluster=c, block_n=w)
    for n in (False, True)
    for g in (False, True)
    for c, w in ((1, BLOCK_N), (2, BLOCK_N), (2, WIDE_BLOCK_N))
)


@functools.cache
def _kernel(b_n_contiguous: bool, gather: bool, cluster: int, block_n: int) -> Kernel:
    spec = gemm_spec(b_n_contiguous=b_n_contiguous, gather=gather, cluster=cluster, block_n=block_n)
    return Kernel(spec, (*[TENSOR_MAP] * 3, PTR, PTR, I32, I32, I32, PTR, I64))


def grouped_mm(a: Rows[Tensor], b_EKN: Tensor, expert_offsets: Tensor) -> Tensor:
    """(P, N) bf16; rows at and past ``expert_offsets[-1]`` are undefined."""
    a_TK, index = a
    rows, depth = a.num_rows, a_TK.shape[1]
    num_experts, _, columns = b_EKN.shape
    d_PN = a_TK.new_empty(rows, columns)
    if d_PN.numel() == 0:
        return d_PN
    n_contiguous = b_EKN.stride(2) == 1
    cluster = cluster_size(rows, num_experts)
    block_n = tile_columns(columns, depth) if cluster == 2 else BLOCK_N
    if n_contiguous:
        map_b = tensor_map(b_EKN, box=(1, BLOCK_K, 64))
    else:
        map_b = tensor_map(b_EKN.transpose(1, 2), box=(1, block_n // cluster, BLOCK_K))
    with on_device(a_TK):
        grid = multiprocessors(a_TK.device.index) // cluster * cluster
        _kernel(n_contiguous, index is not None, cluster, block_n).launch(
            (grid, 1, 1),
            map_of_rows(a_TK, index, box=(BLOCK_M, BLOCK_K)),
            map_b,
            tensor_map(d_PN.view(rows, 1, columns), box=(WARP_ROWS, 1, 64)),
            expert_offsets,
            index,
            num_experts,
            columns,
            -(-depth // BLOCK_K),
            d_PN,
            d_PN.stride(0) * 2,
        )
    return d_PN
