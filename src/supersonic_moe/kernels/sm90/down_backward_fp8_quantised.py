"""The FP8 backward of down-projection and gated activation with results quantised for the GEMMs that follow, on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], act(Z[r] + b1)>                   score gradient, without the part of b2
    dZ[r] = act'(Z[r] + b1) · (s[r] · dA[r])          sA[r] = s[r] · act(Z[r] + b1)

Layout (row-major; formats: ``quantization/block_format.py``)
    Inputs as in down_backward_fp8.py, Z (P, 2I) e4m3, gate and up alternating. Row r of expert e has the position
    padded_offsets[e] + r - offsets[e], G positions in all. dZ comes as it lies, (P, 2I), with a scale for each row
    and 128 columns, stored transposed, and transposed, (2I, G), with tile scales (2I/128, G/128): what
    ``quantize_tiles`` gives. sA comes transposed, (I, G), with tile scales (I/128, G/128). dS is the sum of partial
    sums of 256 activations.
Tiles
    128 rows × 256 activations, main loop as in grouped_gemm_fp8.py. The rows of a tile are one block of positions, so a
    scale is found inside a thread block; codes are transposed in shared memory (transpose_e4m3.cuh).
Maths
    As in down_backward_fp8.py, but dZ and sA are rounded once, to e4m3. Rows of score 0 give zeros, and so do the
    positions behind an expert's last row up to whole blocks; positions from padded_offsets[E] on are not written. A
    row that reads no token has the score 0.
Cost
    2·P·H·I FLOP. Bytes: P·H + E·I·H + 7·P·I, and 1/32 of what is scaled by rows for scales. Stored in bf16 and
    quantised by passes of their own, dZ and sA would move 12·P·I more. The epilogue has some 40 instructions for an
    activation, 8 more than that of down_backward_fp8.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, on_device
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import BothOrders, Gate, Groups, Quantized, Rows, Segments
from supersonic_moe.kernels.sm90.down_backward_fp8 import (
    down_backward_fp8,
    loadable,
    map_of_saved,
    map_of_scores,
    spec_of,
    staging_bytes,
)
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BLOCK_N, WARP_ROWS, GemmConfig, choose, config_of
from supersonic_moe.kernels.sm90.operands import (
    ALL_KINDS,
    INTERLEAVED,
    KINDS,
    kind_of,
    limit_of,
    map_of_columns,
    map_of_rows,
    map_of_scales,
)
from supersonic_moe.kernels.triton import quantize_columns, quantize_tiles
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks, empty_e4m3, empty_scales

NAME = "down_backward_fp8_quantised"
STAGING_BYTES = staging_bytes(interleaved=True, saved_fp8=True)

SPECS = tuple(
    spec_of(config_of(BLOCK_N, cluster, gather, True, STAGING_BYTES), kind, True, True, NAME)
    for kind in ALL_KINDS
    for gather, cluster in ((False, 1), (True, 1), (True, 2))
)


@functools.cache
def _kernel(config: GemmConfig, kind: int) -> Kernel:
    return Kernel(spec_of(config, kind, True, True, NAME))


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
    (activation, layout), ((doutq_TH, dout_scale), index), (w2, w2_scale) = gate, dout, w2_EIH
    num_experts, width, hidden = w2.shape
    like, rows, blocks_n, capacity = z_PN.q, dout.num_rows, -(-width // BLOCK_N), segments.row_index.shape[0]
    if activation.type not in KINDS or layout is not INTERLEAVED or like.dtype is not E4M3 or rows == 0:
        dz_PN, as_PI, ds_P = down_backward_fp8(dout, w2_EIH, z_PN, b1_EN, row_scores_P, groups, gate)
        as_IG = quantize_columns(as_PI, segments.row_index, pow2, tiled=True)
        return quantize_tiles(dz_PN, segments.row_index, pow2), as_IG, ds_P
    dzq_PN, dz_row_scale = empty_e4m3(like, rows, 2 * width), empty_scales(like, rows, blocks(2 * width), tma=True)
    dzq_NG, asq_IG = empty_e4m3(like, 2 * width, capacity), empty_e4m3(like, width, capacity)
    dz_scale = empty_scales(like, blocks(2 * width), capacity // BLOCK, tma=True)
    as_scale = empty_scales(like, blocks(width), capacity // BLOCK, tma=True)
    partial_ds_BP = like.new_empty(blocks_n, rows, dtype=torch.float32)
    scores_P = loadable(row_scores_P)
    scale_w_expert, scale_w_column, scale_w_k = w2_scale.stride()
    config = choose(width, index is not None, staging_bytes=STAGING_BYTES)
    with on_device(doutq_TH):
        map_z = map_of_saved(like, interleaved=True)
        _kernel(config, kind_of(activation)).launch(
            config.grid(doutq_TH.get_device()),
            map_do=map_of_rows(doutq_TH, index, box=(BLOCK_M, config.block_k)),
            map_scale_do=map_of_scales(dout_scale, index, map_z),
            map_w=tensor_map(w2, box=(1, BLOCK_N, config.block_k)),
            map_z=map_z,
            map_scale_z=map_of_columns(z_PN.scale),
            map_scores=map_of_scores(scores_P, rows),
            map_dz=tensor_map(dzq_PN, box=(WARP_ROWS, BLOCK)),
            map_dz_transposed=tensor_map(dzq_NG, box=(BLOCK, BLOCK)),
            map_as_transposed=tensor_map(asq_IG, box=(BLOCK, BLOCK)),
            offsets=groups.expert_offsets,
            padded_offsets=segments.offsets,
            index=index,
            experts=num_experts,
            width=width,
            blocks_k=-(-hidden // config.block_k),
            scale_do=dout_scale,
            scale_do_row=dout_scale.stride(0),
            scale_w=w2_scale,
            scale_w_expert=scale_w_expert,
            scale_w_column=scale_w_column,
            scale_w_k=scale_w_k,
            b1=None if b1_EN is None else b1_EN.contiguous(),
            dz=dzq_PN,
            row_scales=dz_row_scale,
            row_scales_stride=dz_row_scale.stride(1),
            dz_scales=dz_scale,
            dz_scales_stride=dz_scale.stride(1),
            as_scales=as_scale,
            as_scales_stride=as_scale.stride(1),
            dscores=partial_ds_BP,
            rows_allocated=rows,
            pow2=int(pow2),
            alpha=activation.alpha,
            limit=limit_of(activation),
            up_offset=activation.up_offset,
        )
    dz = BothOrders(Quantized(dzq_PN, dz_row_scale), Quantized(dzq_NG, dz_scale))
    return dz, Quantized(asq_IG, as_scale), partial_ds_BP.sum(0)
