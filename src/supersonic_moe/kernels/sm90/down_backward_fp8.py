"""Backward through the down-projection and the gated activation in FP8, one kernel on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], act(H[r] + b1)>                   score gradient, without the part of b2
    dH[r] = act'(H[r] + b1) · (s[r] · dA[r])          sA[r] = s[r] · act(H[r] + b1)

Layout (row-major; formats: ``kernels/block_format.py``)
    dO (T, H) e4m3 with row scales, through an index of P rows or as it lies, W2 transposed (E, I, H) with its scales in
    any strides: A and B of grouped_gemm_fp8.py. H (P, 2I) as the up-projection saved it, in the column order of the
    weight: e4m3 with scales stored transposed, or bf16. dH (P, 2I) and sA (P, I) bf16, s (P) fp32. dS comes as a
    partial sum of each block of 256 activations, (ceil(I / 256), P) fp32, added up in a fixed order.
Tiles
    128 rows × 256 activations, main loop as in grouped_gemm_fp8.py. H has shared memory of its own, dH leaves through
    the ring, sA takes the place of H (down_backward_fp8.cu).
Maths
    dA is never rounded nor stored; the activation is recomputed in fp32 from H · scale, one rounding at each store.
    Rows of score 0 (all padding) get zeros, whatever H holds there.
    With gate and up in two halves, a scale of H may serve only one of them: I is a multiple of 128 then.
Cost
    2·P·H·I FLOP. Bytes: P·H + E·I·H + 8·P·I, and 1/32 of e4m3 for scales; apart, dA would be written and read, 4·P·I
    more, and the GEMM would wait for nothing. The epilogue is some 32 instructions for an activation, while
    the tensor cores idle: a third of the time at H 3072 (docs/log.md).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.jit.launch import F32, I32, I64, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.compose import compose_down_backward_fp8
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import gathering_cluster, grouped_mm_fp8, map_of_scales
from supersonic_moe.kernels.sm90.mainloop import (
    BLOCK_M,
    BLOCK_N,
    FP8_BLOCK_K,
    FP8_OPCODES,
    WARP_ROWS,
    mainloop_spec,
    map_of_rows,
    multiprocessors,
    num_rows,
)
from supersonic_moe.kernels.sm90.up_projection import (
    ALL_KINDS,
    activation_constants,
    half_bases,
    kind_of,
    map_of_halves,
)
from supersonic_moe.kernels.triton import activation_backward
from supersonic_moe.quantization.block_format import BLOCK, E4M3

CHUNKS = 4  # of 64 activations, in a tile
SCALE_BYTES = 640  # 132 scales or scores of a tile's rows, in whole lines of 128 bytes


def down_fp8_spec(
    kind: int, *, interleaved: bool, saved_fp8: bool, gather: bool, cluster: int, name: str = "down_backward_fp8"
) -> KernelSpec:
    constants = (("ACTIVATION", kind), ("INTERLEAVED", int(interleaved)), ("SAVED_FP8", int(saved_fp8)))
    vectors = 1 + (CHUNKS * (1 if interleaved else 2) if saved_fp8 else 0)  # scores, scales of H
    return mainloop_spec(
        name,
        cluster=cluster,
        gather=gather,
        constants=constants,
        opcodes=FP8_OPCODES,
        scaled=True,
        share_a=cluster == 2,
        extra_bytes=vectors * SCALE_BYTES,
    )


SPECS = tuple(
    down_fp8_spec(kind, interleaved=i, saved_fp8=saved, gather=g, cluster=c)
    for kind in ALL_KINDS
    for i in (False, True)
    for saved in (False, True)
    for g, c in ((False, 1), (True, 1), (True, 2))
)


@functools.cache
def _kernel(kind: int, interleaved: bool, saved_fp8: bool, gather: bool, cluster: int) -> Kernel:
    spec = down_fp8_spec(kind, interleaved=interleaved, saved_fp8=saved_fp8, gather=gather, cluster=cluster)
    scales = (PTR, I64, PTR, I64, I32, I32)
    outputs = (*[PTR] * 4, I32, I32, I32, F32, F32, F32)
    return Kernel(spec, (*[TENSOR_MAP] * 8, PTR, PTR, I32, I32, I32, *scales, *outputs))


_unfused = compose_down_backward_fp8(grouped_mm_fp8, activation_backward)


def down_backward_fp8(
    doutq_TH: Tensor,
    dout_scale: Tensor,
    gather_index: Tensor | None,
    w2q_EIH: Tensor,
    w2_scale: Tensor,
    z_PN: Tensor,
    z_scale: Tensor,
    b1_EN: Tensor | None,
    row_scores_P: Tensor,
    expert_offsets: Tensor,
    row_expert_P: Tensor,
    activation: Activation,
    layout: GateUpLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH (P, N1), s · A (P, I), both bf16, dS (P) fp32). Ungated activations, and e4m3 H whose halves are no multiple
    of 128 wide, take the grouped GEMM and the activation pass instead.
    """
    num_experts, width, hidden = w2q_EIH.shape
    interleaved, saved_fp8 = layout is GateUpLayout.INTERLEAVED, z_PN.dtype is E4M3
    if not activation.gated or (saved_fp8 and not interleaved and width % BLOCK):
        return _unfused(
            doutq_TH, dout_scale, gather_index, w2q_EIH, w2_scale, z_PN, z_scale, b1_EN, row_scores_P, expert_offsets,
            row_expert_P, activation, layout,
        )  # fmt: skip
    rows, blocks_n = num_rows(doutq_TH, gather_index), -(-width // BLOCK_N)
    dz_PN = z_PN.new_empty(rows, 2 * width, dtype=torch.bfloat16)
    as_PI = dz_PN.new_empty(rows, width)
    partial_ds_BP = dz_PN.new_empty(blocks_n, rows, dtype=torch.float32)
    if rows == 0:
        return dz_PN, as_PI, partial_ds_BP.new_empty(0)
    gather = gather_index is not None
    cluster = gathering_cluster(blocks_n, gather)
    scores_P = loadable(row_scores_P)
    map_dh = map_of_halves(dz_PN, interleaved, rows=WARP_ROWS)
    with on_device(doutq_TH):
        grid = multiprocessors(doutq_TH.device.index) // cluster * cluster
        _kernel(kind_of(activation), interleaved, saved_fp8, gather, cluster).launch(
            (grid, 1, 1),
            *input_maps(doutq_TH, dout_scale, gather_index, w2q_EIH, z_PN, z_scale, scores_P, interleaved),
            map_dh,
            tensor_map(as_PI.view(rows, 1, width), box=(WARP_ROWS, 1, 64)),
            expert_offsets,
            gather_index,
            num_experts,
            width,
            -(-hidden // FP8_BLOCK_K),
            dout_scale,
            dout_scale.stride(0),
            w2_scale,
            *w2_scale.stride(),
            None if b1_EN is None else b1_EN.contiguous(),
            dz_PN,
            as_PI,
            partial_ds_BP,
            rows,
            *half_bases(layout, width),
            *activation_constants(activation),
        )
    return dz_PN, as_PI, partial_ds_BP.sum(0)


def loadable(scores_P: Tensor) -> Tensor:
    """TMA reads from multiples of 16 bytes."""
    scores_P = scores_P.contiguous()
    return scores_P if scores_P.data_ptr() % 16 == 0 else scores_P.clone()


def input_maps(
    doutq_TH: Tensor,
    dout_scale: Tensor,
    gather_index: Tensor | None,
    w2q_EIH: Tensor,
    z_PN: Tensor,
    z_scale: Tensor,
    scores_P: Tensor,
    interleaved: bool,
) -> tuple[TensorMap, ...]:
    """dO, its scales, W2, H, its scales, the rows' scores."""
    map_h, vector = _map_of_saved(z_PN, interleaved), (1, BLOCK_M + 4)
    return (
        map_of_rows(doutq_TH, gather_index, box=(BLOCK_M, FP8_BLOCK_K)),
        map_of_scales(dout_scale, gather_index, map_h),
        tensor_map(w2q_EIH, box=(1, BLOCK_N, FP8_BLOCK_K)),
        map_h,
        tensor_map(z_scale.t(), box=vector, swizzle=0) if z_PN.dtype is E4M3 else map_h,
        tensor_map(scores_P[None], box=vector, swizzle=0),
    )


def _map_of_saved(z_PN: Tensor, interleaved: bool) -> TensorMap:
    """H in boxes of 64 activations: in e4m3 128 bytes a row, of both halves where there are two."""
    if z_PN.dtype is not E4M3:
        return map_of_halves(z_PN, interleaved, rows=BLOCK_M)
    if interleaved:
        return tensor_map(z_PN, box=(BLOCK_M, 128))
    rows, columns = z_PN.shape
    return tensor_map(
        z_PN.data_ptr(),
        box=(BLOCK_M, 2, 64),
        swizzle=64,
        dtype=E4M3,
        shape=(rows, 2, columns // 2),
        strides=(z_PN.stride(0), columns // 2, 1),
    )
