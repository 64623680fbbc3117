"""Grouped GEMM with ragged rows on sm_90a: D[r] = A[r] · B[expert of r], bf16, for rows sorted by expert.

Layout (row-major)
    A (P, K), K contiguous. B (E, K, N) with either K or N contiguous: weights as they are stored serve the forward
    product (K contiguous) and the data gradient (N contiguous) without a copy. D (P, N). offsets (E + 1) int32 on the
    device; any number of rows an expert, none included; rows past offsets[E] are not written.
Tiles
    128 × 256 a block, two math warpgroups of 64 × 256 that share B, K in stages of 64 (128 bytes), four stages. A
    cluster of two blocks takes 256 rows of one expert and loads each half of B for both. Persistent: one block a
    multiprocessor, tiles in grouped order (schedule.cuh). The last tile of an expert stores its rows one by one, since
    TMA would write into the next expert.
Maths
    fp32 accumulation in the tensor core, one rounding to bf16. N and K are multiples of 8; what lies past N or K loads
    as zero.
Cost
    2·P·K·N FLOP. Bytes: 2·(P·K + E·K·N + P·N) at least; a tile reads 2·K·(128 + 128) bytes from L2 in a cluster.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import I32, I64, PTR, TENSOR_MAP, Kernel
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
STAGES = 4
GROUP_M = 16  # row blocks walked before the next column: 8 to 64 measured within 2-3 % (docs/log.md)
THREADS = 384
STAGE_BYTES = (BLOCK_M + BLOCK_N) * 128
SMEM_BYTES = STAGES * (STAGE_BYTES + 32 + 16) + 4 * 64 * 128  # stages, notes, barriers; two staging panels a warpgroup
OPCODES = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM")


def gemm_spec(*, b_n_contiguous: bool, cluster: int) -> KernelSpec:
    return KernelSpec(
        name="grouped_gemm",
        source="grouped_gemm.cu",
        constants=(
            ("BLOCK_N", BLOCK_N),
            ("STAGES", STAGES),
            ("CLUSTER", cluster),
            ("B_MN_MAJOR", int(b_n_contiguous)),
            ("GROUP_M", GROUP_M),
        ),
        threads=THREADS,
        smem_bytes=SMEM_BYTES,
        cluster=cluster,
        opcodes=OPCODES,
    )


SPECS = tuple(gemm_spec(b_n_contiguous=n, cluster=c) for n in (False, True) for c in (1, 2))


@functools.cache
def _kernel(b_n_contiguous: bool, cluster: int) -> Kernel:
    argtypes = (TENSOR_MAP, TENSOR_MAP, TENSOR_MAP, PTR, I32, I32, I32, PTR, I64)
    return Kernel(gemm_spec(b_n_contiguous=b_n_contiguous, cluster=cluster), argtypes)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def cluster_size(rows: int, num_experts: int) -> int:
    """Two blocks share B where an expert has at least two blocks of rows on average; else the second would idle."""
    return 2 if rows >= 2 * BLOCK_M * num_experts else 1


def grouped_mm(a_PK: Tensor, b_EKN: Tensor, expert_offsets: Tensor) -> Tensor:
    """(P, N) bf16; rows at and past ``expert_offsets[-1]`` are undefined."""
    rows, depth = a_PK.shape
    num_experts, _, columns = b_EKN.shape
    d_PN = a_PK.new_empty(rows, columns)
    if d_PN.numel() == 0:
        return d_PN
    n_contiguous = b_EKN.stride(2) == 1
    cluster = cluster_size(rows, num_experts)
    map_a = tensor_map(a_PK, box=(BLOCK_M, BLOCK_K))
    if n_contiguous:
        map_b = tensor_map(b_EKN, box=(1, BLOCK_K, 64))
    else:
        map_b = tensor_map(b_EKN.transpose(1, 2), box=(1, BLOCK_N // cluster, BLOCK_K))
    map_d = tensor_map(d_PN, box=(64, 64))
    with torch.cuda.device(a_PK.device):
        grid = multiprocessors(a_PK.device.index) // cluster * cluster
        _kernel(n_contiguous, cluster).launch(
            (grid, 1, 1),
            map_a,
            map_b,
            map_d,
            expert_offsets,
            num_experts,
            columns,
            -(-depth // BLOCK_K),
            d_PN,
            d_PN.stride(0) * 2,
        )
    return d_PN
