"""FP8 up-projection and gated activation in one kernel on sm_90a: H[r] = X[r] · W1[expert of r]ᵀ and A[r] = act(H[r] +
b1), quantised where they are computed.

Layout (row-major; formats: ``kernels/block_format.py``)
    X (T, H) e4m3 read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies, with scales as in
    grouped_gemm_fp8.py. W1 (E, 2I, H) e4m3 with 128 × 128 scales, gate and up rows in any of the three orders. A (P, I)
    e4m3. H (P, 2I), for backward only, in the column order of the weight and without the bias: e4m3, or bf16. Scales
    of A and H are 1 × 128, stored K block by K block.
Tiles
    128 rows × 128 activations: one scale block of A and two of H a row. Main loop and gather as in grouped_gemm_fp8.py.
Maths
    fp32 sums, bias and activation in fp32 on the unrounded sums; maxima of a row among four lanes; one rounding to e4m3
    for A, and one for H.
Cost
    4·P·H·I FLOP. Bytes: P·H + 2·E·I·H + P·I + 2·P·I (H in e4m3) or 4·P·I (bf16). Composed from its parts, the step
    moves 11·P·I more.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.jit.launch import F32, I32, I64, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.compose import ComposedFp8
from supersonic_moe.kernels.interface import Gate, Groups, Quantized, Rows
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import gathering_cluster, grouped_mm_fp8, map_of_scales
from supersonic_moe.kernels.sm90.mainloop import (
    BLOCK_M,
    BLOCK_N,
    FP8_BLOCK_K,
    WARP_ROWS,
    mainloop_spec,
    map_of_rows,
    multiprocessors,
)
from supersonic_moe.kernels.sm90.up_projection import (
    ALL_KINDS,
    activation_constants,
    half_bases,
    kind_of,
    map_of_gate_and_up,
    map_of_halves,
)
from supersonic_moe.kernels.triton import (
    activation_backward,
    activation_forward,
    quantize_columns,
    quantize_rows,
    quantize_tiles,
)
from supersonic_moe.quantization.block_format import BLOCK, blocks, empty_e4m3, empty_scales

WIDTH = BLOCK_N // 2  # activations of a tile
NOTHING, IN_FP8, IN_BF16 = 0, 1, 2  # what of H the kernel stores
OPCODES = ("QGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "F2FP.SATFINITE.E4M3")


def up_fp8_spec(kind: int, *, interleaved: bool, gather: bool, cluster: int) -> KernelSpec:
    return mainloop_spec(
        "up_projection_fp8",
        cluster=cluster,
        gather=gather,
        constants=(("ACTIVATION", kind), ("INTERLEAVED", int(interleaved))),
        opcodes=OPCODES,
        scaled=True,
        share_a=cluster == 2,
        staging_rooms=5,
    )


SPECS = tuple(
    up_fp8_spec(kind, interleaved=i, gather=g, cluster=c)
    for kind in ALL_KINDS
    for i in (False, True)
    for g, c in ((False, 1), (True, 1), (True, 2))
)


@functools.cache
def _kernel(kind: int, interleaved: bool, gather: bool, cluster: int) -> Kernel:
    scales_in = (PTR, I64, PTR, I64, I32, I32)
    outputs = (*[PTR] * 5, I64, I64, I64, I32, I32)
    argtypes = (*[TENSOR_MAP] * 5, PTR, PTR, I32, I32, I32, *scales_in, *outputs, I32, I32, F32, F32, F32)
    return Kernel(up_fp8_spec(kind, interleaved=interleaved, gather=gather, cluster=cluster), argtypes)


UNFUSED = ComposedFp8(
    grouped_mm_fp8, activation_forward, activation_backward, quantize_rows, quantize_columns, quantize_tiles
)


def up_projection_fp8(
    x: Rows[Quantized],
    w1_ENH: Quantized,
    b1_EN: Tensor | None,
    groups: Groups,
    gate: Gate,
    recipe: Fp8Recipe,
    save: bool,
) -> tuple[Quantized, Quantized]:
    """(Z as backward will see it, A): see ``Fp8Experts``. Ungated activations take the composed form, and so do halves
    of Z that do not start at a scale block.
    """
    (activation, layout), ((xq_TH, x_scale), index), (w1, w1_scale) = gate, x, w1_ENH
    num_experts, n1, hidden = w1.shape
    rows, width = x.num_rows, n1 // 2
    interleaved = layout is GateUpLayout.INTERLEAVED
    if not activation.gated or not (interleaved or width % BLOCK == 0):
        return UNFUSED.up_projection_fp8(x, w1_ENH, b1_EN, groups, gate, recipe, save)
    forms = {"fp8": IN_FP8, "bf16": IN_BF16, "recompute": NOTHING}
    saved = forms[recipe.save_preactivation] if save else NOTHING
    if saved == IN_FP8:
        z_PN, z_scale = empty_e4m3(xq_TH, rows, n1), empty_scales(xq_TH, rows, blocks(n1), tma=True)
    else:
        z_PN = xq_TH.new_empty(rows if saved == IN_BF16 else 0, n1, dtype=torch.bfloat16)
        z_scale = xq_TH.new_empty(0, blocks(n1), dtype=torch.float32)
    a_PI, a_scale = empty_e4m3(xq_TH, rows, width), empty_scales(xq_TH, rows, blocks(width), tma=True)
    z, a = Quantized(z_PN, z_scale), Quantized(a_PI, a_scale)
    if rows == 0:
        return z, a
    gate_base, up_base = half_bases(layout, width)
    gather = index is not None
    cluster = gathering_cluster(-(-width // WIDTH), gather)
    map_a = tensor_map(a_PI[:, None], box=(WARP_ROWS, 1, 128))
    with on_device(xq_TH):
        grid = multiprocessors(xq_TH.device.index) // cluster * cluster
        _kernel(kind_of(activation), interleaved, gather, cluster).launch(
            (grid, 1, 1),
            map_of_rows(xq_TH, index, box=(BLOCK_M, FP8_BLOCK_K)),
            map_of_scales(x_scale, index, map_a),
            map_of_gate_and_up(w1, interleaved, width),
            map_a if saved == NOTHING else map_of_halves(z_PN, interleaved, rows=WARP_ROWS),
            map_a,
            groups.expert_offsets,
            index,
            num_experts,
            width,
            -(-hidden // FP8_BLOCK_K),
            x_scale,
            x_scale.stride(0),
            w1_scale,
            *w1_scale.stride(),
            None if b1_EN is None else b1_EN.contiguous(),
            None if saved == NOTHING else z_PN,
            None if saved != IN_FP8 else z_scale,
            a_PI,
            a_scale,
            z_PN.stride(0) * z_PN.element_size(),
            a_PI.stride(0),
            a_scale.stride(1),
            saved,
            int(recipe.pow2),
            gate_base,
            up_base,
            *activation_constants(activation),
        )
    return z, a
