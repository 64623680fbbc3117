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

from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.jit.launch import F32, I32, I64, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.compose import compose_down_backward_fp8_quantised
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8, down_fp8_spec, input_maps, loadable
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import gathering_cluster
from supersonic_moe.kernels.sm90.mainloop import BLOCK_N, FP8_BLOCK_K, WARP_ROWS, multiprocessors, num_rows
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


_unfused = compose_down_backward_fp8_quantised(down_backward_fp8, quantize_tiles, quantize_columns)


def down_backward_fp8_quantised(
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
    padded_offsets: Tensor,
    row_index_G: Tensor,
    pow2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dH (P, N1), its row scales, dH transposed (N1, G), its tile scales, s · A transposed (I, G), its tile scales, dS
    (P)). ``padded_offsets`` and ``row_index`` (G): ``pad_segments``. Only e4m3 H with gate and up alternating is fused;
    everything else is composed of ``down_backward_fp8`` and the quantisers.
    """
    num_experts, width, hidden = w2q_EIH.shape
    rows, blocks_n, capacity = num_rows(doutq_TH, gather_index), -(-width // BLOCK_N), row_index_G.shape[0]
    if not activation.gated or layout is not GateUpLayout.INTERLEAVED or z_PN.dtype is not E4M3 or rows == 0:
        return _unfused(
            doutq_TH, dout_scale, gather_index, w2q_EIH, w2_scale, z_PN, z_scale, b1_EN, row_scores_P, expert_offsets,
            row_expert_P, activation, layout, padded_offsets, row_index_G, pow2,
        )  # fmt: skip
    dhq_PN, dh_row_scale = empty_e4m3(z_PN, rows, 2 * width), empty_scales(z_PN, rows, blocks(2 * width), tma=True)
    dhq_NG, asq_IG = empty_e4m3(z_PN, 2 * width, capacity), empty_e4m3(z_PN, width, capacity)
    dz_scale = empty_scales(z_PN, blocks(2 * width), capacity // BLOCK, tma=True)
    as_scale = empty_scales(z_PN, blocks(width), capacity // BLOCK, tma=True)
    partial_ds_BP = z_PN.new_empty(blocks_n, rows, dtype=torch.float32)
    gather = gather_index is not None
    cluster = gathering_cluster(blocks_n, gather)
    scores_P = loadable(row_scores_P)
    with on_device(doutq_TH):
        grid = multiprocessors(doutq_TH.device.index) // cluster * cluster
        _kernel(kind_of(activation), gather, cluster).launch(
            (grid, 1, 1),
            *input_maps(doutq_TH, dout_scale, gather_index, w2q_EIH, z_PN, z_scale, scores_P, True),
            tensor_map(dhq_PN, box=(WARP_ROWS, BLOCK)),
            tensor_map(dhq_NG, box=(BLOCK, BLOCK)),
            tensor_map(asq_IG, box=(BLOCK, BLOCK)),
            expert_offsets,
            padded_offsets,
            gather_index,
            num_experts,
            width,
            -(-hidden // FP8_BLOCK_K),
            dout_scale,
            dout_scale.stride(0),
            w2_scale,
            *w2_scale.stride(),
            None if b1_EN is None else b1_EN.contiguous(),
            dhq_PN,
            dh_row_scale,
            dh_row_scale.stride(1),
            dz_scale,
            dz_scale.stride(1),
            as_scale,
            as_scale.stride(1),
            partial_ds_BP,
            rows,
            int(pow2),
            *activation_constants(activation),
        )
    return dhq_PN, dh_row_scale, dhq_NG, dz_scale, asq_IG, as_scale, partial_ds_BP.sum(0)
