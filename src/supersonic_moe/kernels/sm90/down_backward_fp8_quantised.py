"""The FP8 backward of down-projection and gated activation with results quantised for the GEMMs that follow, on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], act(H[r] + b1)>                   score gradient, without the part of b2
    dH[r] = act'(H[r] + b1) · (s[r] · dA[r])          sA[r] = s[r] · act(H[r] + b1)

Layout (row-major; formats: ``kernels/block_format.py``)
    Inputs as in down_backward_fp8.py, H (P, 2I) e4m3, gate and up alternating. Row r of expert e has the position
    padded_offsets[e] + r - offsets[e], G positions in all. dH comes as it lies, (P, 2I), with the scale of its tile for
    each row, stored transposed, and transposed, (2I, G), with tile scales (2I/128, G/128): what ``quantize_tiles``
    gives. sA comes transposed, (I, G), with tile scales (I/128, G/128). dS is the sum of partial sums of 256
    activations.
Tiles
    128 rows × 256 activations, main loop as in grouped_gemm_fp8.py. The rows of a tile are one block of positions, so a
    scale is found inside a thread block; codes are transposed in shared memory (turn_e4m3.cuh).
Maths
    As in down_backward_fp8.py, but dH and sA are rounded once, to e4m3. Rows of score 0 give zeros, and so do the
    positions behind an expert's last row up to whole blocks; positions from padded_offsets[E] on are not written. A
    row that reads no token has the score 0.
Cost
    2·P·H·I FLOP. Bytes: P·H + E·I·H + 7·P·I, and 1/32 of what is scaled by rows for scales. Stored in bf16 and
    quantised by passes of their own, dH and sA would move 12·P·I more. The epilogue has some 40 instructions for an
    activation, 8 more than that of down_backward_fp8.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.jit.launch import F32, I32, I64, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import BothOrders, Gate, Groups, Quantized, Rows, Segments
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8, down_fp8_spec, input_maps, loadable
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import gathering_cluster
from supersonic_moe.kernels.sm90.mainloop import BLOCK_N, FP8_BLOCK_K, WARP_ROWS, multiprocessors
from supersonic_moe.kernels.sm90.up_projection import ALL_KINDS, activation_constants, kind_of
from supersonic_moe.kernels.triton import quantize_columns, quantize_tiles
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks, empty_e4m3, empty_scales


def down_fp8_quantised_spec(kind: int, *, gather: bool, cluster: int) -> KernelSpec:
    return down_fp8_spec(
        kind, interleaved=True, saved_fp8=True, gather=gather, cluster=cluster, name="down_backward_fp8_quantised"
    )


SPECS = tuple(
    down_fp8_quantised_spec(kind, gather=g, cluster=c)
    for kind in ALL_KINDS
    for g, c in ((False, 1), (True, 1), (True, 2))
)


@functools.cache
def _kernel(kind: int, gather: bool, cluster: int) -> Kernel:
    scales = (PTR, I64, PTR, I64, I32, I32)
    outputs = (PTR, PTR, PTR, I64, PTR, I64, PTR, I64, PTR, I32, I32, F32, F32, F32)
    return Kernel(
        down_fp8_quantised_spec(kind, gather=gather, cluster=cluster),
        (*[TENSOR_MAP] * 9, PTR, PTR, PTR, I32, I32, I32, *scales, *outputs),
    )


def down_backward_fp8_quantised(
    dout: Rows[Quantized],
    w2_EIH: Quantized,
    z_PN: Quantized,
    b1_EN: Tensor | None,
    row_scores_P: Tensor,
    groups: Groups,
    gate: Gate,
    segments: Segments,
    pow2: bool,
) -> tuple[BothOrders, Quantized, Tensor]:
    """(dZ in both orders, s · A transposed (I, G), dS (P)). Only e4m3 Z with gate and up alternating is fused;
    everything else is composed of ``down_backward_fp8`` and the quantisers.
    """
    (activation, layout), ((doutq_TH, dout_scale), index), w2_scale = gate, dout, w2_EIH.scale
    num_experts, width, hidden = w2_EIH.q.shape
    like, rows, blocks_n, capacity = z_PN.q, dout.num_rows, -(-width // BLOCK_N), segments.row_index.shape[0]
    if not activation.gated or layout is not GateUpLayout.INTERLEAVED or like.dtype is not E4M3 or rows == 0:
        dz_PN, as_PI, ds_P = down_backward_fp8(dout, w2_EIH, z_PN, b1_EN, row_scores_P, groups, gate)
        as_IG = quantize_columns(as_PI, segments.row_index, pow2, tiled=True)
        return quantize_tiles(dz_PN, segments.row_index, pow2), as_IG, ds_P
    dzq_PN, dz_row_scale = empty_e4m3(like, rows, 2 * width), empty_scales(like, rows, blocks(2 * width), tma=True)
    dzq_NG, asq_IG = empty_e4m3(like, 2 * width, capacity), empty_e4m3(like, width, capacity)
    dz_scale = empty_scales(like, blocks(2 * width), capacity // BLOCK, tma=True)
    as_scale = empty_scales(like, blocks(width), capacity // BLOCK, tma=True)
    partial_ds_BP = like.new_empty(blocks_n, rows, dtype=torch.float32)
    gather = index is not None
    cluster = gathering_cluster(blocks_n, gather)
    scores_P = loadable(row_scores_P)
    with on_device(doutq_TH):
        grid = multiprocessors(doutq_TH.device.index) // cluster * cluster
        _kernel(kind_of(activation), gather, cluster).launch(
            (grid, 1, 1),
            *input_maps(dout, w2_EIH.q, z_PN, scores_P, True),
            tensor_map(dzq_PN, box=(WARP_ROWS, BLOCK)),
            tensor_map(dzq_NG, box=(BLOCK, BLOCK)),
            tensor_map(asq_IG, box=(BLOCK, BLOCK)),
            groups.expert_offsets,
            segments.offsets,
            index,
            num_experts,
            width,
            -(-hidden // FP8_BLOCK_K),
            dout_scale,
            dout_scale.stride(0),
            w2_scale,
            *w2_scale.stride(),
            None if b1_EN is None else b1_EN.contiguous(),
            dzq_PN,
            dz_row_scale,
            dz_row_scale.stride(1),
            dz_scale,
            dz_scale.stride(1),
            as_scale,
            as_scale.stride(1),
            partial_ds_BP,
            rows,
            int(pow2),
            *activation_constants(activation),
        )
    dz = BothOrders(Quantized(dzq_PN, dz_row_scale), Quantized(dzq_NG, dz_scale))
    return dz, Quantized(asq_IG, as_scale), partial_ds_BP.sum(0)
