"""Grouped GEMM with a scale for each row on sm_90a: D[r] = s[r] · (A[r] · B[expert of r]), the example of
docs/adding-a-kernel.md.

Layout (row-major)
    A (P, K) bf16, rows sorted by expert; B (E, K, N) bf16, K contiguous; s (P) fp32; D (P, N) bf16. offsets (E + 1)
    int32 on the device; rows past offsets[E] are not written.
Maths
    fp32 accumulation, one product by s, one rounding. N and K are multiples of 8.
Cost
    2·P·K·N FLOP. Bytes: 2·(P·K + E·K·N + P·N) + 4·P.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from supersonic_moe.kernels.sm90.mainloop import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    OPCODES,
    WARP_ROWS,
    cluster_size,
    mainloop_spec,
    multiprocessors,
)
from torch import Tensor

from supersonic_moe.jit.launch import I32, I64, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map


def _spec(cluster: int) -> KernelSpec:
    spec = mainloop_spec("row_scaled_gemm", cluster=cluster, gather=False, opcodes=OPCODES)
    return replace(spec, root=Path(__file__).parent)


SPECS = (_spec(1), _spec(2))


@functools.cache
def _kernel(cluster: int) -> Kernel:
    return Kernel(_spec(cluster), (*[TENSOR_MAP] * 3, PTR, PTR, I32, I32, I32, PTR, PTR, I64))


def row_scaled_mm(a_PK: Tensor, b_EKN: Tensor, scale_P: Tensor, expert_offsets: Tensor) -> Tensor:
    """(P, N) bf16; rows at and past ``expert_offsets[-1]`` are undefined."""
    rows, (num_experts, depth, columns) = a_PK.shape[0], b_EKN.shape
    d_PN = a_PK.new_empty(rows, columns)
    cluster = cluster_size(rows, num_experts)
    with on_device(a_PK):
        _kernel(cluster).launch(
            (multiprocessors(a_PK.device.index) // cluster * cluster, 1, 1),
            tensor_map(a_PK, box=(BLOCK_M, BLOCK_K)),
            tensor_map(b_EKN.transpose(1, 2), box=(1, BLOCK_N // cluster, BLOCK_K)),
            tensor_map(d_PN.view(rows, 1, columns), box=(WARP_ROWS, 1, 64)),
            expert_offsets,
            None,
            num_experts,
            columns,
            -(-depth // BLOCK_K),
            scale_P,
            d_PN,
            d_PN.stride(0) * 2,
        )
    return d_PN
