"""Up-projection and squared ReLU in one kernel on sm_90a: Z[r] = X[r] · W1[expert of r]ᵀ, A[r] = relu(Z[r] + b1)².

Layout (row-major)
    X (T, H) bf16, read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies. W1 (E, I, H), H
    contiguous. Z (P, I), stored for backward only, without the bias. A (P, I).
Tiles
    128 rows × 256 activations or 320, as in grouped_gemm.py; Z and A leave one after the other through borrowed stages.
Maths
    fp32 accumulation, bias and activation in fp32 on the unrounded sums, one rounding for Z and one for A.
Cost
    2·P·H·I FLOP. Bytes: 2·(P·H + E·I·H + 2·P·I); the unfused pair moves 2·P·I more.

Squared ReLU (Nemotron-H) is the only ungated activation of a published MoE; each one more would be 10 binaries here and
in down_backward_ungated.py. Others take the grouped GEMM and the activation pass.
"""

from __future__ import annotations

import functools

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import UpProjection
from supersonic_moe.kernels.sm90.gemm_config import (
    BLOCK_M,
    BLOCK_N,
    BROAD_BLOCK_N,
    OPCODES,
    GemmConfig,
    bf16_form,
    choose,
)
from supersonic_moe.kernels.sm90.operands import map_of_rows, map_of_run, map_of_stored_rows, product_of


def _spec(config: GemmConfig) -> KernelSpec:
    return config.spec("up_projection_ungated", OPCODES)


SPECS = tuple(
    _spec(bf16_form(block_n, cluster, gather))
    for gather in (False, True)
    for cluster, block_n in ((1, BLOCK_N), (2, BLOCK_N), (2, BROAD_BLOCK_N))
)


@functools.cache
def _kernel(config: GemmConfig) -> Kernel:
    return kernel_of(_spec(config))


def up_projection_ungated(step: UpProjection[Tensor]) -> tuple[Tensor, Tensor]:
    """(Z (P, I) without the bias, or (0, I) if not ``save``; A (P, I)), for ``relu_sq`` and W1 with H contiguous."""
    x, w1_EIH, b1_EI, expert_offsets, _, _, save = step
    x_TH, index = x
    num_experts, width, hidden = w1_EIH.shape
    rows = x.num_rows
    z_PI = x_TH.new_empty(rows if save else 0, width)
    a_PI = x_TH.new_empty(rows, width)
    if rows == 0:
        return z_PI, a_PI
    config = choose(width, index is not None, rows=rows // num_experts, broad=True)
    with on_device(x_TH):
        map_a = map_of_stored_rows(a_PI)
        _kernel(config).launch(
            config.grid(x_TH.get_device()),
            map_x=map_of_rows(x_TH, index, box=(BLOCK_M, config.block_k)),
            map_x_run=map_of_run(x_TH, index, config.run_box, map_a),
            map_w=tensor_map(w1_EIH, box=(1, config.block_n // config.cluster, config.block_k)),
            map_z=map_of_stored_rows(z_PI) if save else map_a,
            map_a=map_a,
            **product_of(index, expert_offsets, num_experts, width, hidden, b1_EI, config),
            z=z_PI if save else None,
            a=a_PI,
        )
    return z_PI, a_PI
