"""Backward through the down-projection and the gated activation in one kernel on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], act(Z[r] + b1)>                   score gradient, without the part of b2
    dZ[r] = act'(Z[r] + b1) · (s[r] · dA[r])          sA[r] = s[r] · act(Z[r] + b1)

Layout (row-major)
    dO (T, H) bf16, read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies. W2 (E, H, I), I
    contiguous or H. Z and dZ (P, 2I) in the column order of the weight, sA (P, I), s (P) fp32. dS comes as a partial
    sum of each block of 256 activations, (ceil(I / 256), P) fp32, added up in a fixed order.
Tiles
    128 rows × 256 activations, main loop as in grouped_gemm.py; then the tile's part of Z passes through the ring
    (down_backward.cu).
Maths
    fp32 throughout: dA is never rounded nor stored, the activation is recomputed from the rounded Z, one rounding at
    each store. A row of score 0 (all padding) gets zeros by selection, whatever Z holds there.
Cost
    2·P·H·I FLOP. Bytes: 2·(P·H + E·I·H + 5·P·I); apart, the pass of the activation would move 4·P·I more, and the GEMM
    would wait for none of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import Arrivals, DownBackward
from supersonic_moe.kernels.sm90.down_backward_ungated import down_backward_ungated
from supersonic_moe.kernels.sm90.gates import (
    ALL_BF16_KINDS,
    INTERLEAVED,
    OUTERMOST_H,
    SWIGLU,
    UNGATED_KIND,
    bf16_kind,
    gate_arguments,
)
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BLOCK_N, OPCODES, WARP_ROWS, GemmConfig, bf16_form, choose
from supersonic_moe.kernels.sm90.operands import (
    map_of_halves,
    map_of_rows,
    map_of_run,
    map_of_stored_rows,
    product_of,
    summed,
)
from supersonic_moe.kernels.sm90.row_blocks import ALL_TILES, IN_PARTS, arrivals
from supersonic_moe.kernels.sm90.unfused import UNFUSED


def _spec(config: GemmConfig, kind: int, interleaved: bool, i_contiguous: bool, **parts: int) -> KernelSpec:
    constants = {"ACTIVATION": kind, "INTERLEAVED": int(interleaved), "B_MN_MAJOR": int(i_contiguous)}
    return config.spec("down_backward", OPCODES, **constants, **parts)


SPECS = tuple(
    _spec(bf16_form(BLOCK_N, cluster, gather), kind, interleaved, i_contiguous)
    for kind, interleaved, i_contiguous in (
        *((kind, interleaved, True) for kind in ALL_BF16_KINDS for interleaved in (False, True)),
        *((kind, interleaved, False) for kind, interleaved in OUTERMOST_H),
    )
    for gather in (False, True)
    for cluster in (1, 2)
) + tuple(_spec(bf16_form(BLOCK_N, 2, True), SWIGLU, interleaved, True, **IN_PARTS) for interleaved in (False, True))


@functools.cache
def _kernel(config: GemmConfig, kind: int, interleaved: bool, i_contiguous: bool, in_parts: bool = False) -> Kernel:
    return kernel_of(_spec(config, kind, interleaved, i_contiguous, **(IN_PARTS if in_parts else {})))


def down_backward(step: DownBackward[Tensor], arriving: Arrivals | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(dZ (P, N1), s · A (P, I), dS (P) fp32). Activations and orders of W2 without a kernel here take the grouped GEMM
    and the activation pass instead. Rows of dO may arrive meanwhile with gathered SwiGLU, I contiguous in W2, where two
    blocks share it.
    """
    dout, w2_EHI, z_PN, b1_EN, scores_P, expert_offsets, _, (activation, layout) = step
    interleaved, i_contiguous = layout is INTERLEAVED, w2_EHI.stride(2) == 1
    if activation.type is UNGATED_KIND and i_contiguous:
        arrivals(arriving, False)
        return down_backward_ungated(step)
    kind = bf16_kind(activation, interleaved, i_contiguous)
    if kind is None:
        return UNFUSED.down_backward(step, arriving)
    dout_TH, index = dout
    num_experts, hidden, width = w2_EHI.shape
    rows, blocks_n = dout.num_rows, -(-width // BLOCK_N)
    dz_PN, as_PI = z_PN.new_empty(z_PN.shape), z_PN.new_empty(rows, width)
    partial_ds_BP = z_PN.new_empty(blocks_n, rows, dtype=torch.float32)
    if rows == 0:
        return dz_PN, as_PI, partial_ds_BP.new_empty(0)
    config = choose(width, index is not None, rows=rows // num_experts)
    parts = arrivals(arriving, index is not None and kind == SWIGLU and i_contiguous and config.cluster == 2)
    with on_device(dout_TH):
        map_as = map_of_stored_rows(as_PI)
        if i_contiguous:
            map_w = tensor_map(w2_EHI, box=(1, config.block_k, 64))
        else:
            map_w = tensor_map(w2_EHI.mT, box=(1, config.block_n // config.cluster, config.block_k))
        _kernel(config, kind, interleaved, i_contiguous, parts is not ALL_TILES).launch(
            config.grid(dout_TH.get_device()),
            map_do=map_of_rows(dout_TH, index, box=(BLOCK_M, config.block_k)),
            map_do_run=map_of_run(dout_TH, index, config.run_box, map_as),
            map_w=map_w,
            map_z=map_of_halves(z_PN, interleaved, rows=BLOCK_M),
            map_dz=map_of_halves(dz_PN, interleaved, rows=WARP_ROWS),
            map_as=map_as,
            **product_of(index, expert_offsets, num_experts, width, hidden, b1_EN, config),
            scores=scores_P,
            dz=dz_PN,
            as_=as_PI,
            dscores=partial_ds_BP,
            rows_allocated=rows,
            **gate_arguments(activation, layout, width),
            **parts,
        )
    return dz_PN, as_PI, summed(partial_ds_BP)
