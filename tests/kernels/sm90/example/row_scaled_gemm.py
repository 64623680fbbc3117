"""Grouped GEMM with a scale for each row on sm_90a: D[r] = s[r] · (A[r] · B[expert of r]), the example of
docs/adding-a-kernel.md.

Layout (row-major)
    A (P, K) bf16, or (T, K) through an index of P rows sorted by expert; B (E, K, N) bf16, K contiguous; s (P) fp32;
    D (P, N) bf16. offsets (E + 1) int32 on the device; rows past offsets[E] are not written.
Maths
    fp32 accumulation, one product by s, one rounding. N and K are multiples of 8.
Cost
    2·P·K·N FLOP. Bytes: 2·(P·K + E·K·N + P·N) + 4·P.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import Rows
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BLOCK_N, OPCODES, GemmConfig, bf16_form, choose
from supersonic_moe.kernels.sm90.operands import map_of_rows, map_of_run, map_of_stored_rows


def _spec(config: GemmConfig) -> KernelSpec:
    return replace(config.spec("row_scaled_gemm", OPCODES), root=Path(__file__).parent)


SPECS = tuple(_spec(bf16_form(BLOCK_N, cluster, gather)) for cluster in (1, 2) for gather in (False, True))


@functools.cache
def _kernel(config: GemmConfig) -> Kernel:
    return kernel_of(_spec(config))


def row_scaled_mm(a: Rows[Tensor], b_EKN: Tensor, scale_P: Tensor, expert_offsets: Tensor) -> Tensor:
    """(P, N) bf16; rows at and past ``expert_offsets[-1]`` are undefined."""
    a_TK, index = a
    num_experts, depth, columns = b_EKN.shape
    d_PN = a_TK.new_empty(a.num_rows, columns)
    config = choose(columns, gather=index is not None, rows=a.num_rows // num_experts)
    with on_device(a_TK):
        map_d = map_of_stored_rows(d_PN)
        _kernel(config).launch(
            config.grid(a_TK.get_device()),
            map_a=map_of_rows(a_TK, index, box=(BLOCK_M, config.block_k)),
            map_a_run=map_of_run(a_TK, index, config.run_box, map_d),
            map_b=tensor_map(b_EKN.transpose(1, 2), box=(1, config.block_n // config.cluster, config.block_k)),
            map_d=map_d,
            offsets=expert_offsets,
            index=index,
            experts=num_experts,
            columns=columns,
            blocks_k=-(-depth // config.block_k),
            scales=scale_P,
            d=d_PN,
            d_row_bytes=d_PN.stride(0) * 2,
        )
    return d_PN
