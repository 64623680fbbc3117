"""Backward through the down-projection and a squared ReLU in one kernel on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], A[r]>                             A = relu(Z + b1)²; without the part of b2
    dZ[r] = 2 relu(Z[r] + b1) · (s[r] · dA[r])        sA[r] = s[r] · A[r]

Layout (row-major)
    dO (T, H) bf16, read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies. W2 (E, H, I), I
    contiguous. Z, dZ and sA (P, I), s (P) fp32. dS comes as a partial sum of each block of 256 activations, (ceil(I /
    256), P) fp32, added up in a fixed order.
Tiles, maths
    As in down_backward.py; of a stage of three buffers Z and sA take two.
Cost
    2·P·H·I FLOP. Bytes: 2·(P·H + E·I·H + 3·P·I); apart, the pass of the activation would move 2·P·I more, and the GEMM
    would wait for none of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import DownBackward
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BLOCK_N, OPCODES, GemmConfig, bf16_form, choose
from supersonic_moe.kernels.sm90.operands import map_of_rows, map_of_run, map_of_stored_rows, product_of, summed


def _spec(config: GemmConfig) -> KernelSpec:
    return config.spec("down_backward_ungated", OPCODES)


SPECS = tuple(_spec(bf16_form(BLOCK_N, cluster, gather)) for gather in (False, True) for cluster in (1, 2))


@functools.cache
def _kernel(config: GemmConfig) -> Kernel:
    return kernel_of(_spec(config))


def down_backward_ungated(step: DownBackward[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(dZ (P, I), s · A (P, I), dS (P) fp32), for ``relu_sq`` and W2 with I contiguous."""
    dout, w2_EHI, z_PI, b1_EI, scores_P, expert_offsets, _, _ = step
    dout_TH, index = dout
    num_experts, hidden, width = w2_EHI.shape
    rows, blocks_n = dout.num_rows, -(-width // BLOCK_N)
    dz_PI, as_PI = z_PI.new_empty(rows, width), z_PI.new_empty(rows, width)
    partial_ds_BP = z_PI.new_empty(blocks_n, rows, dtype=torch.float32)
    if rows == 0:
        return dz_PI, as_PI, partial_ds_BP.new_empty(0)
    config = choose(width, index is not None, rows=rows // num_experts)
    with on_device(dout_TH):
        map_as = map_of_stored_rows(as_PI)
        _kernel(config).launch(
            config.grid(dout_TH.get_device()),
            map_do=map_of_rows(dout_TH, index, box=(BLOCK_M, config.block_k)),
            map_do_run=map_of_run(dout_TH, index, config.run_box, map_as),
            map_w=tensor_map(w2_EHI, box=(1, config.block_k, 64)),
            map_z=map_of_stored_rows(z_PI, rows=BLOCK_M),
            map_dz=map_of_stored_rows(dz_PI),
            map_as=map_as,
            **product_of(index, expert_offsets, num_experts, width, hidden, b1_EI, config),
            scores=scores_P,
            dz=dz_PI,
            as_=as_PI,
            dscores=partial_ds_BP,
            rows_allocated=rows,
        )
    return dz_PI, as_PI, summed(partial_ds_BP)
