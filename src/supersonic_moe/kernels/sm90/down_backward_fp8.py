"""Backward through the down-projection and the gated activation in FP8, one kernel on sm_90a.

    dA[r] = dO[r] · W2[expert of r]                   before the score
    dS[r] = <dA[r], act(Z[r] + b1)>                   score gradient, without the part of b2
    dZ[r] = act'(Z[r] + b1) · (s[r] · dA[r])          sA[r] = s[r] · act(Z[r] + b1)

Layout (row-major; formats: ``quantization/block_format.py``)
    dO (T, H) e4m3 with row scales, through an index of P rows or as it lies, W2 transposed (E, I, H) with its scales in
    any strides: A and B of grouped_gemm_fp8.py. Z (P, 2I) as the up-projection saved it, in the column order of the
    weight: e4m3 with scales stored transposed, int8 with words of exponents, or bf16. dZ (P, 2I) and sA (P, I) bf16,
    s (P) fp32. dS comes as a partial sum of each block of 256 activations, (ceil(I / 256), P) fp32, added up in a fixed
    order.
Tiles
    128 rows × 256 activations, main loop as in grouped_gemm_fp8.py. Z has shared memory of its own, dZ leaves through
    the ring, sA takes the place of Z (down_backward_fp8.cu).
Maths
    dA is never rounded nor stored; the activation is recomputed in fp32 from Z · scale, one rounding at each store.
    Rows of score 0 (all padding) get zeros, whatever Z holds there.
    With gate and up in two halves, a scale of Z may serve only one of them: I is a multiple of 128 then.
Cost
    2·P·H·I FLOP. Bytes: P·H + E·I·H + 8·P·I, and 1/32 of e4m3 for scales; apart, dA would be written and read, 4·P·I
    more, and the GEMM would wait for nothing. The epilogue is some 32 instructions for an activation, while
    the tensor cores idle: a third of the time at H 3072 (docs/log.md).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.interface import Arrivals, DownBackward, Quantized
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
    BLOCK_M,
    BLOCK_N,
    BUFFER_BYTES,
    FP8_OPCODES,
    WARP_ROWS,
    GemmConfig,
    choose,
    fp8_form,
)
from supersonic_moe.kernels.sm90.operands import (
    fp8_product_of,
    map_of_columns,
    map_of_halves,
    map_of_rows,
    map_of_run,
    map_of_scales,
    map_of_stored_rows,
    summed,
)
from supersonic_moe.kernels.sm90.row_blocks import arrivals
from supersonic_moe.kernels.sm90.unfused import UNFUSED_FP8
from supersonic_moe.quantization.block_format import BLOCK

CHUNKS = 4  # of 64 activations, in a tile
SCALE_BYTES = 640  # 132 scales or scores of a tile's rows, in whole lines of 128 bytes


def staging_bytes(interleaved: bool, saved_fp8: bool) -> int:
    """Four staging buffers; the rows' scores, and the scales of Z: of both halves where there are two."""
    vectors = 1 + (CHUNKS * (1 if interleaved else 2) if saved_fp8 else 0)
    return 4 * BUFFER_BYTES + vectors * SCALE_BYTES


def spec_of(config: GemmConfig, kind: int, interleaved: bool, saved_fp8: bool, name: str, **choice: int) -> KernelSpec:
    constants = {"ACTIVATION": kind, "INTERLEAVED": int(interleaved), "SAVED_FP8": int(saved_fp8)}
    return config.spec(name, FP8_OPCODES, **constants, **choice)


SAVED: tuple[tuple[int, bool, dict[str, int]], ...] = (
    *((kind, saved_fp8, {}) for kind in ALL_KINDS for saved_fp8 in (False, True)),
    (SWIGLU, True, INT8),
)
"""(kind, whether Z has one byte an element, what else is chosen)"""
SPECS = tuple(
    spec_of(
        fp8_form(cluster, gather, staging_bytes(interleaved, saved_fp8)),
        kind,
        interleaved,
        saved_fp8,
        "down_backward_fp8",
        **choice,
    )
    for kind, saved_fp8, choice in SAVED
    for interleaved in (False, True)
    for gather, cluster in ((False, 1), (True, 1), (True, 2))
)


@functools.cache
def _kernel(config: GemmConfig, kind: int, interleaved: bool, saved_fp8: bool, int8: bool) -> Kernel:
    return kernel_of(spec_of(config, kind, interleaved, saved_fp8, "down_backward_fp8", **(INT8 if int8 else {})))


def down_backward_fp8(step: DownBackward[Quantized], arriving: Arrivals | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(dZ (P, N1), s · A (P, I), both bf16, dS (P) fp32). Activations outside ``fused_in_fp8``, and Z of one byte whose
    halves are no multiple of 128 wide, take the grouped GEMM and the activation pass instead.
    """
    arrivals(arriving, False)
    dout, (w2, _), z, _, _, _, _, (activation, layout) = step
    width, interleaved, saved_fp8 = w2.shape[1], layout is INTERLEAVED, z.q.dtype.itemsize == 1
    int8 = z.q.dtype is torch.int8
    if not fused_in_fp8(activation, int8) or (saved_fp8 and not interleaved and width % BLOCK):
        return UNFUSED_FP8.down_backward_fp8(step)
    rows = dout.num_rows
    dz_PN = z.q.new_empty(rows, 2 * width, dtype=torch.bfloat16)
    as_PI = dz_PN.new_empty(rows, width)
    partial_ds_BP = dz_PN.new_empty(-(-width // BLOCK_N), rows, dtype=torch.float32)
    if rows == 0:
        return dz_PN, as_PI, partial_ds_BP.new_empty(0)
    config = choose(width, dout.gather_index is not None, staging_bytes=staging_bytes(interleaved, saved_fp8))
    scores_P = loadable(step.row_scores)
    with on_device(w2):
        _kernel(config, kind_of(activation), interleaved, saved_fp8, int8).launch(
            config.grid(w2.get_device()),
            **common_arguments(step, scores_P, config),
            map_dz=map_of_halves(dz_PN, interleaved, rows=WARP_ROWS),
            map_as=map_of_stored_rows(as_PI),
            dz=dz_PN,
            as_=as_PI,
            dscores=partial_ds_BP,
            **gate_arguments(activation, layout, width),
        )
    return dz_PN, as_PI, summed(partial_ds_BP)


def common_arguments(step: DownBackward[Quantized], scores_P: Tensor, config: GemmConfig) -> dict[str, Any]:
    """Arguments of the kernel that depend neither on the activation nor on how it stores dZ and sA. ``scores``: of the
    rows, ``loadable``.
    """
    dout, (w2, w2_scale), z, b1_EN, _, expert_offsets, _, (_, layout) = step
    (doutq_TH, dout_scale), index = dout
    num_experts, width, hidden = w2.shape
    map_z = map_of_saved(z.q, layout is INTERLEAVED)
    return {
        "map_do": map_of_rows(doutq_TH, index, box=(BLOCK_M, config.block_k)),
        "map_do_run": map_of_run(doutq_TH, index, config.run_box, map_z),
        "map_scale_do": map_of_scales(dout_scale, index, map_z),
        "map_w": tensor_map(w2, box=(1, BLOCK_N, config.block_k)),
        "map_z": map_z,
        "map_scale_z": map_of_columns(z.scale) if z.q.dtype.itemsize == 1 else map_z,
        "map_scores": map_of_scores(scores_P, dout.num_rows),
        **fp8_product_of(index, expert_offsets, num_experts, width, hidden, b1_EN, w2_scale, config),
        "scale_do": dout_scale,
        "scale_do_row": dout_scale.stride(0),
        "rows_allocated": dout.num_rows,
    }


def loadable(scores_P: Tensor) -> Tensor:
    """TMA reads from multiples of 16 bytes."""
    scores_P = scores_P.contiguous()
    return scores_P if scores_P.data_ptr() % 16 == 0 else scores_P.clone()


def map_of_scores(scores_P: Tensor, rows: int) -> TensorMap:
    """Scores of a tile's rows, of whichever row the first is."""
    return tensor_map(scores_P, box=(1, BLOCK_M + 4), swizzle=0, shape=(1, rows), strides=(rows, 1))


def map_of_saved(z_PN: Tensor, interleaved: bool) -> TensorMap:
    """Z in boxes of 64 activations: in e4m3 or int8 128 bytes a row, of both halves where there are two."""
    if z_PN.dtype.itemsize > 1:
        return map_of_halves(z_PN, interleaved, rows=BLOCK_M)
    if interleaved:
        return tensor_map(z_PN, box=(BLOCK_M, 128))
    rows, columns = z_PN.shape
    return tensor_map(
        z_PN.data_ptr(),
        box=(BLOCK_M, 2, 64),
        swizzle=64,
        dtype=z_PN.dtype,
        shape=(rows, 2, columns // 2),
        strides=(z_PN.stride(0), columns // 2, 1),
    )
