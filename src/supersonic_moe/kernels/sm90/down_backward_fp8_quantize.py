"""The FP8 backward of down-projection and gated activation with results quantized for the GEMMs that follow, on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], act(Z[r] + b1)>                   score gradient, without the part of b2
    dZ[r] = act'(Z[r] + b1) · (s[r] · dA[r])          sA[r] = s[r] · act(Z[r] + b1)

Layout (row-major; formats: ``quantization/block_format.py``)
    Inputs as in down_backward_fp8.py, Z (P, 2I) e4m3, gate and up alternating. Row r of expert e has the position
    padded_offsets[e] + r - offsets[e], G positions in all. dZ comes as it lies, (P, 2I), with a scale for each row
    and 128 columns, stored transposed, and transposed, (2I, G), with tile scales (2I/128, G/128): what
    ``quantize_both_orders`` gives. sA comes transposed, (I, G), with tile scales (I/128, G/128). dS is the sum of
    partial sums of 256 activations.
Tiles
    128 rows × 256 activations, main loop as in grouped_gemm_fp8.py. The rows of a tile are one block of positions, so a
    scale is found inside a thread block; codes are transposed in shared memory (transpose_e4m3.cuh).
Maths
    As in down_backward_fp8.py, but dZ and sA are rounded once, to e4m3. Rows of score 0 give zeros, and so do the
    positions behind an expert's last row up to whole blocks; positions from padded_offsets[E] on are not written. A
    row that reads no token has the score 0.
Cost
    2·P·H·I FLOP. Bytes: P·H + E·I·H + 7·P·I, and 1/32 of what is scaled by rows for scales. Stored in bf16 and
    quantized by passes of their own, dZ and sA would move 12·P·I more. The epilogue has some 40 instructions for an
    activation, 8 more than that of down_backward_fp8.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.interface import Arrivals, BothOrders, DownBackward, Quantized, Segments
from supersonic_moe.kernels.sm90.down_backward_fp8 import (
    common_arguments,
    down_backward_fp8,
    loadable,
    spec_of,
    staging_bytes,
)
from supersonic_moe.kernels.sm90.gates import (
    ALL_KINDS,
    INT8,
    INTERLEAVED,
    SWIGLU,
    constants_of,
    fused_in_fp8,
    kind_of,
)
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_N, WARP_ROWS, GemmConfig, choose, fp8_form
from supersonic_moe.kernels.sm90.operands import summed
from supersonic_moe.kernels.sm90.row_blocks import ALL_TILES, IN_PARTS, arrivals
from supersonic_moe.kernels.triton import quantize_both_orders, quantize_columns
from supersonic_moe.quantization.block_format import BLOCK, blocks, empty_e4m3, empty_scales

NAME = "down_backward_fp8_quantize"
STAGING_BYTES = staging_bytes(interleaved=True, saved_fp8=True) + 2 * 128 * 12 * 4  # twelve numbers of each math thread

SPECS = tuple(
    spec_of(fp8_form(cluster, gather, STAGING_BYTES), kind, True, True, NAME, **choice)
    for kind, choice in (*((kind, {}) for kind in ALL_KINDS), (SWIGLU, INT8))
    for gather, cluster in ((False, 1), (True, 1), (True, 2))
) + tuple(spec_of(fp8_form(cluster, True, STAGING_BYTES), SWIGLU, True, True, NAME, **IN_PARTS) for cluster in (1, 2))


@functools.cache
def _kernel(config: GemmConfig, kind: int, in_parts: bool = False, int8: bool = False) -> Kernel:
    return kernel_of(spec_of(config, kind, True, True, NAME, **(IN_PARTS if in_parts else INT8 if int8 else {})))


def down_backward_fp8_quantize(
    step: DownBackward[Quantized], segments: Segments, pow2: bool, arriving: Arrivals | None = None
) -> tuple[BothOrders, Quantized, Tensor]:
    """(dZ in both orders, s · A transposed (I, G), dS (P)). Only Z of one byte with gate and up alternating is fused;
    everything else is composed of ``down_backward_fp8`` and the quantizers. Rows of dO may arrive meanwhile where they
    are gathered, with SwiGLU and Z in e4m3.
    """
    dout, (w2, _), z, _, _, _, _, (activation, layout) = step
    like, rows, width, capacity = z.q, dout.num_rows, w2.shape[1], segments.row_index.shape[0]
    int8 = like.dtype is torch.int8
    if not fused_in_fp8(activation, int8) or layout is not INTERLEAVED or like.dtype.itemsize > 1 or rows == 0:
        dz_PN, as_PI, ds_P = down_backward_fp8(step, arriving)
        as_IG = quantize_columns(as_PI, segments.row_index, pow2, tiled=True)
        return quantize_both_orders(dz_PN, segments.row_index, pow2), as_IG, ds_P
    dzq_PN, dz_row_scale = empty_e4m3(like, rows, 2 * width), empty_scales(like, rows, blocks(2 * width), tma=True)
    dzq_NG, asq_IG = empty_e4m3(like, 2 * width, capacity), empty_e4m3(like, width, capacity)
    dz_scale = empty_scales(like, blocks(2 * width), capacity // BLOCK, tma=True)
    as_scale = empty_scales(like, blocks(width), capacity // BLOCK, tma=True)
    partial_ds_BP = like.new_empty(-(-width // BLOCK_N), rows, dtype=torch.float32)
    config = choose(width, dout.gather_index is not None, staging_bytes=STAGING_BYTES)
    kind, scores_P = kind_of(activation), loadable(step.row_scores)
    parts = arrivals(arriving, dout.gather_index is not None and kind == SWIGLU and not int8)
    with on_device(w2):
        _kernel(config, kind, parts is not ALL_TILES, int8).launch(
            config.grid(w2.get_device()),
            **common_arguments(step, scores_P, config),
            **constants_of(activation),
            map_dz=tensor_map(dzq_PN, box=(WARP_ROWS, BLOCK)),
            map_dz_transposed=tensor_map(dzq_NG, box=(BLOCK, BLOCK)),
            map_as_transposed=tensor_map(asq_IG, box=(BLOCK, BLOCK)),
            padded_offsets=segments.offsets,
            dz=dzq_PN,
            row_scales=dz_row_scale,
            row_scales_stride=dz_row_scale.stride(1),
            dz_scales=dz_scale,
            dz_scales_stride=dz_scale.stride(1),
            as_scales=as_scale,
            as_scales_stride=as_scale.stride(1),
            dscores=partial_ds_BP,
            pow2=int(pow2),
            **parts,
        )
    dz = BothOrders(Quantized(dzq_PN, dz_row_scale), Quantized(dzq_NG, dz_scale))
    return dz, Quantized(asq_IG, as_scale), summed(partial_ds_BP)
