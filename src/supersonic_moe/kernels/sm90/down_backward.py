"""Backward through the down-projection and the gated activation in one kernel on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], act(H[r] + b1)>                   score gradient, without the part of b2
    dH[r] = act'(H[r] + b1) · (s[r] · dA[r])          sA[r] = s[r] · act(H[r] + b1)

Layout (row-major)
    dO (T, H) bf16, read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies. W2 (E, H, I), I
    contiguous. H and dH (P, 2I) in the column order of the weight, sA (P, I), s (P) fp32. dS comes as a partial sum of
    each block of 256 activations, (ceil(I / 256), P) fp32, added up in a fixed order.
Tiles
    128 rows × 256 activations, main loop as in grouped_gemm.py; then the tile's part of H passes through the ring
    (down_backward.cu).
Maths
    fp32 throughout: dA is never rounded nor stored, the activation is recomputed from the rounded H, one rounding at
    each store. A row of score 0 (all padding) gets zeros by selection, whatever H holds there.
Cost
    2·P·H·I FLOP. Bytes: 2·(P·H + E·I·H + 5·P·I); apart, the pass of the activation would move 4·P·I more, and the GEMM
    would wait for none of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.jit.launch import F32, I32, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import Gate, Groups, Rows
from supersonic_moe.kernels.sm90.mainloop import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    OPCODES,
    WARP_ROWS,
    cluster_size,
    mainloop_spec,
    map_of_rows,
    multiprocessors,
)
from supersonic_moe.kernels.sm90.up_projection import (
    ALL_KINDS,
    UNFUSED,
    activation_constants,
    half_bases,
    kind_of,
    map_of_halves,
)


def down_backward_spec(kind: int, *, interleaved: bool, gather: bool, cluster: int) -> KernelSpec:
    constants = (("ACTIVATION", kind), ("INTERLEAVED", int(interleaved)))
    return mainloop_spec("down_backward", cluster=cluster, gather=gather, constants=constants, opcodes=OPCODES)


SPECS = tuple(
    down_backward_spec(kind, interleaved=i, gather=g, cluster=c)
    for kind in ALL_KINDS
    for i in (False, True)
    for g in (False, True)
    for c in (1, 2)
)


@functools.cache
def _kernel(kind: int, interleaved: bool, gather: bool, cluster: int) -> Kernel:
    spec = down_backward_spec(kind, interleaved=interleaved, gather=gather, cluster=cluster)
    outputs = (*[PTR] * 5, I32, I32, I32, F32, F32, F32)
    return Kernel(spec, (*[TENSOR_MAP] * 5, PTR, PTR, I32, I32, I32, *outputs))


def down_backward(
    dout: Rows[Tensor],
    w2_EHI: Tensor,
    z_PN: Tensor,
    b1_EN: Tensor | None,
    row_scores_P: Tensor,
    groups: Groups,
    gate: Gate,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dZ (P, N1), s · A (P, I), dS (P) fp32). Ungated activations and weights stored with H contiguous take the
    grouped GEMM and the activation pass instead.
    """
    activation, layout = gate
    if not activation.gated or w2_EHI.stride(2) != 1:
        return UNFUSED.down_backward(dout, w2_EHI, z_PN, b1_EN, row_scores_P, groups, gate)
    dout_TH, index = dout
    num_experts, hidden, width = w2_EHI.shape
    rows, blocks_n = dout.num_rows, -(-width // BLOCK_N)
    dz_PN, as_PI = z_PN.new_empty(z_PN.shape), z_PN.new_empty(rows, width)
    partial_ds_BP = z_PN.new_empty(blocks_n, rows, dtype=torch.float32)
    if rows == 0:
        return dz_PN, as_PI, partial_ds_BP.new_empty(0)
    interleaved = layout is GateUpLayout.INTERLEAVED
    cluster = cluster_size(rows, num_experts)
    with on_device(dout_TH):
        grid = multiprocessors(dout_TH.device.index) // cluster * cluster
        _kernel(kind_of(activation), interleaved, index is not None, cluster).launch(
            (grid, 1, 1),
            map_of_rows(dout_TH, index, box=(BLOCK_M, BLOCK_K)),
            tensor_map(w2_EHI, box=(1, BLOCK_K, 64)),
            map_of_halves(z_PN, interleaved, rows=BLOCK_M),
            map_of_halves(dz_PN, interleaved, rows=WARP_ROWS),
            tensor_map(as_PI.view(rows, 1, width), box=(WARP_ROWS, 1, 64)),
            groups.expert_offsets,
            index,
            num_experts,
            width,
            -(-hidden // BLOCK_K),
            None if b1_EN is None else b1_EN.contiguous(),
            row_scores_P,
            dz_PN,
            as_PI,
            partial_ds_BP,
            rows,
            *half_bases(layout, width),
            *activation_constants(activation),
        )
    return dz_PN, as_PI, partial_ds_BP.sum(0)
