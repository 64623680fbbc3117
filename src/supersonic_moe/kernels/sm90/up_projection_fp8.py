"""FP8 up-projection and gated activation in one kernel on sm_90a: Z[r] = X[r] · W1[expert of r]ᵀ and A[r] = act(Z[r] +
b1), quantized where they are computed.

Layout (row-major; formats: ``quantization/block_format.py``)
    X (T, H) e4m3 read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies, with scales as in
    grouped_gemm_fp8.py. W1 (E, 2I, H) e4m3 with 128 × 128 scales, gate and up rows in any of the three orders. A (P, I)
    e4m3. Z (P, 2I), for backward only, in the column order of the weight and without the bias: e4m3, int8 (SwiGLU), or
    bf16. Scales of A and Z are 1 × 128, stored K block by K block; in their place for int8, words of four exponents.
Tiles
    128 rows × 128 activations: one scale block of A and two of Z a row. Main loop and gather as in grouped_gemm_fp8.py.
Maths
    fp32 sums, bias and activation in fp32 on the unrounded sums; maxima of a row among four lanes; one rounding to e4m3
    for A, and one for Z.
Cost
    4·P·H·I FLOP. Bytes: P·H + 2·E·I·H + P·I + 2·P·I (Z in e4m3) or 4·P·I (bf16). Composed from its parts, the step
    moves 11·P·I more.
"""

from __future__ import annotations

import functools

import torch

from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.kernels.interface import Arrivals, Quantized, UpProjection
from supersonic_moe.kernels.sm90.gates import (
    ALL_KINDS,
    INT8,
    INTERLEAVED,
    SWIGLU,
    fused_in_fp8,
    gate_arguments,
    kind_of,
)
from supersonic_moe.kernels.sm90.gemm_config import (
    BUFFER_BYTES,
    WARP_ROWS,
    GemmConfig,
    choose,
    fp8_form,
)
from supersonic_moe.kernels.sm90.operands import (
    fp8_product_of,
    map_of_gate_and_up,
    map_of_halves,
    map_of_rows,
    map_of_run,
    map_of_scales,
    map_of_stored_rows,
)
from supersonic_moe.kernels.sm90.row_blocks import ALL_TILES, IN_PARTS, arrivals
from supersonic_moe.kernels.sm90.unfused import UNFUSED_FP8
from supersonic_moe.quantization.block_format import BLOCK, blocks, empty_e4m3, empty_saved, empty_scales

STAGING_BYTES = 5 * BUFFER_BYTES
NOTHING, IN_FP8, IN_BF16 = 0, 1, 2  # what of Z the kernel stores; one byte is int8 where it is compiled for that
FORMS = {"fp8": IN_FP8, "int8": IN_FP8, "bf16": IN_BF16, "recompute": NOTHING}
OPCODES = ("QGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "F2FP.SATFINITE.E4M3")


def _spec(config: GemmConfig, kind: int, interleaved: bool, **choice: int) -> KernelSpec:
    return config.spec("up_projection_fp8", OPCODES, ACTIVATION=kind, INTERLEAVED=int(interleaved), **choice)


SPECS = tuple(
    _spec(fp8_form(cluster, gather, STAGING_BYTES), kind, interleaved)
    for kind in ALL_KINDS
    for interleaved in (False, True)
    for gather, cluster in ((False, 1), (True, 1), (True, 2))
) + tuple(
    _spec(fp8_form(cluster, gather, STAGING_BYTES), SWIGLU, interleaved, **choice)
    for choice, forms in (
        ({}, ((False, 2),)),
        (IN_PARTS, ((True, 1), (True, 2))),
        (INT8, ((False, 1), (True, 1), (True, 2))),
    )
    for interleaved in (False, True)
    for gather, cluster in forms
)


@functools.cache
def _kernel(config: GemmConfig, kind: int, interleaved: bool, in_parts: bool = False, int8: bool = False) -> Kernel:
    return kernel_of(_spec(config, kind, interleaved, **(IN_PARTS if in_parts else INT8 if int8 else {})))


def up_projection_fp8(
    step: UpProjection[Quantized], recipe: Fp8Recipe, arriving: Arrivals | None = None
) -> tuple[Quantized, Quantized]:
    """(Z as backward will see it, A): see ``Fp8Experts``. Activations outside ``fused_in_fp8`` take the composed form,
    and so do halves of Z that do not start at a scale block. Rows may arrive meanwhile with gathered SwiGLU, but for Z
    in int8.
    """
    return up_projection_fp8_into(step, recipe, None, arriving)


def up_projection_fp8_into(
    step: UpProjection[Quantized],
    recipe: Fp8Recipe,
    a: Quantized | None,
    arriving: Arrivals | None = None,
    pairs: bool = False,
) -> tuple[Quantized, Quantized]:
    """``a``: memory for A as ``empty_e4m3`` and ``empty_scales(..., tma=True)`` lay it out; the composed form does not
    write to it. ``pairs``: as in ``down_projection_fp8``, for SwiGLU of rows that lie in order.
    """
    x, (w1, w1_scale), b1_EN, expert_offsets, _, (activation, layout), save = step
    (xq_TH, x_scale), index = x
    num_experts, n1, hidden = w1.shape
    rows, width = x.num_rows, n1 // 2
    interleaved, int8 = layout is INTERLEAVED, save and recipe.save_preactivation == "int8"
    if not fused_in_fp8(activation, int8) or not (interleaved or width % BLOCK == 0):
        return UNFUSED_FP8.up_projection_fp8(step, recipe, arriving)
    saved = FORMS[recipe.save_preactivation] if save else NOTHING
    if int8:
        z_PN, z_scale = empty_saved(xq_TH, rows, n1)
    elif saved == IN_FP8:
        z_PN, z_scale = empty_e4m3(xq_TH, rows, n1), empty_scales(xq_TH, rows, blocks(n1), tma=True)
    else:
        z_PN = xq_TH.new_empty(rows if saved == IN_BF16 else 0, n1, dtype=torch.bfloat16)
        z_scale = xq_TH.new_empty(0, blocks(n1), dtype=torch.float32)
    if a is None:
        a = Quantized(empty_e4m3(xq_TH, rows, width), empty_scales(xq_TH, rows, blocks(width), tma=True))
    z, (a_PI, a_scale) = Quantized(z_PN, z_scale), a
    if rows == 0:
        return z, a
    config, kind = choose(n1, index is not None, staging_bytes=STAGING_BYTES), kind_of(activation)
    if pairs and index is None and kind == SWIGLU:
        config = fp8_form(2, False, STAGING_BYTES)
    parts = arrivals(arriving, index is not None and kind == SWIGLU and not int8)
    with on_device(xq_TH):
        map_a = map_of_stored_rows(a_PI)
        _kernel(config, kind, interleaved, parts is not ALL_TILES, int8).launch(
            config.grid(xq_TH.get_device()),
            map_x=map_of_rows(xq_TH, index, box=(config.rows_of_a, config.block_k)),
            map_x_run=map_of_run(xq_TH, index, config.run_box, map_a),
            map_scale_x=map_of_scales(x_scale, index, map_a),
            map_w=map_of_gate_and_up(w1, interleaved, width),
            map_z=map_a if saved == NOTHING else map_of_halves(z_PN, interleaved, rows=WARP_ROWS),
            map_a=map_a,
            **fp8_product_of(index, expert_offsets, num_experts, width, hidden, b1_EN, w1_scale, config),
            scale_x=x_scale,
            scale_x_row=x_scale.stride(0),
            z=None if saved == NOTHING else z_PN,
            scale_z=None if saved != IN_FP8 else z_scale,
            a=a_PI,
            scale_a=a_scale,
            z_row_bytes=z_PN.stride(0) * z_PN.element_size(),
            a_row_bytes=a_PI.stride(0),
            scale_stride=a_scale.stride(1),
            saved=saved,
            pow2=int(recipe.pow2),
            **gate_arguments(activation, layout, width),
            **parts,
        )
    return z, a
