"""Up-projection and gated activation in one kernel on sm_90a: Z[r] = X[r] · W1[expert of r]ᵀ, A[r] = act(Z[r] + b1).

Layout (row-major)
    X (T, H) bf16, read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies. W1 (E, 2I, H), H
    contiguous, gate and up rows in any of the three orders: the order is nothing but strides of a tensor map that sees
    W1 as (E, 2, I, H). Or W1 stored (E, H, 2I): B is MN-major then. Z (P, 2I) in the column order of the weight, stored
    for backward only, without the bias. A (P, I).
Tiles
    128 rows × 128 activations; B is 128 gate rows and 128 up rows, so both halves of an activation are accumulators of
    one thread. Where gate and up alternate in a W1 stored (E, H, 2I), B is 256 columns as they lie, and the two are
    neighbours. Ring, cluster, scheduler and ragged last tiles as in grouped_gemm.py.
Maths
    fp32 accumulation, bias and activation in fp32 on the unrounded sums, one rounding for Z and one for A. (A backend
    that stores Z first computes A from the rounded Z.)
Cost
    4·P·H·I FLOP. Bytes: 2·(P·H + 2·E·I·H + 3·P·I); the unfused pair moves 4·P·I more, a pass of 142 µs at P 65536,
    I 1536 on an H200.
"""

from __future__ import annotations

import functools

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.kernels.interface import Arrivals, UpProjection
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
    map_of_gate_and_up,
    map_of_gate_and_up_columns,
    map_of_halves,
    map_of_rows,
    map_of_run,
    map_of_stored_rows,
    product_of,
)
from supersonic_moe.kernels.sm90.row_blocks import ALL_TILES, IN_PARTS, arrivals
from supersonic_moe.kernels.sm90.unfused import UNFUSED
from supersonic_moe.kernels.sm90.up_projection_ungated import up_projection_ungated

ROWS, HALVES, PAIRS = range(3)  # GateAndUp of load_b.cuh


def _spec(config: GemmConfig, kind: int, order: int, **parts: int) -> KernelSpec:
    return config.spec("up_projection", OPCODES, ACTIVATION=kind, W1_ORDER=order, **parts)


SPECS = (
    *(
        _spec(bf16_form(BLOCK_N, cluster, gather), kind, order)
        for kind, order in (
            *((kind, ROWS) for kind in ALL_BF16_KINDS),
            *((kind, PAIRS if interleaved else HALVES) for kind, interleaved in OUTERMOST_H),
        )
        for gather in (False, True)
        for cluster in (1, 2)
    ),
    _spec(bf16_form(BLOCK_N, 2, True), SWIGLU, ROWS, **IN_PARTS),
)


@functools.cache
def _kernel(config: GemmConfig, kind: int, order: int, in_parts: bool = False) -> Kernel:
    return kernel_of(_spec(config, kind, order, **(IN_PARTS if in_parts else {})))


def up_projection(step: UpProjection[Tensor], arriving: Arrivals | None = None) -> tuple[Tensor, Tensor]:
    """(Z (P, N1) without the bias, or (0, N1) if not ``save``; A (P, I)). Activations and orders of W1 without a kernel
    here take the grouped GEMM and the activation pass instead. Rows may arrive meanwhile with gathered SwiGLU, H
    contiguous in W1, where two blocks share it.
    """
    x, w1_ENH, b1_EN, expert_offsets, _, (activation, layout), save = step
    interleaved, h_contiguous = layout is INTERLEAVED, w1_ENH.stride(2) == 1
    if activation.type is UNGATED_KIND and h_contiguous:
        arrivals(arriving, False)
        return up_projection_ungated(step)
    kind = bf16_kind(activation, interleaved, h_contiguous)
    if kind is None:
        return UNFUSED.up_projection(step, arriving)
    x_TH, index = x
    num_experts, n1, hidden = w1_ENH.shape
    rows, width = x.num_rows, n1 // 2
    z_PN = x_TH.new_empty(rows if save else 0, n1)
    a_PI = x_TH.new_empty(rows, width)
    if rows == 0:
        return z_PN, a_PI
    config = choose(n1, index is not None, rows=rows // num_experts)
    parts = arrivals(arriving, index is not None and kind == SWIGLU and h_contiguous and config.cluster == 2)
    with on_device(x_TH):
        if h_contiguous:
            order, map_w = ROWS, map_of_gate_and_up(w1_ENH, interleaved, width)
        else:
            order = PAIRS if interleaved else HALVES
            map_w = map_of_gate_and_up_columns(w1_ENH, interleaved, width, config.block_k)
        map_a = map_of_stored_rows(a_PI)
        _kernel(config, kind, order, parts is not ALL_TILES).launch(
            config.grid(x_TH.get_device()),
            map_x=map_of_rows(x_TH, index, box=(BLOCK_M, config.block_k)),
            map_x_run=map_of_run(x_TH, index, config.run_box, map_a),
            map_w=map_w,
            map_z=map_of_halves(z_PN, interleaved, rows=WARP_ROWS) if save else map_a,
            map_a=map_a,
            **product_of(index, expert_offsets, num_experts, width, hidden, b1_EN, config),
            z=z_PN if save else None,
            a=a_PI,
            interleaved=int(interleaved),
            **gate_arguments(activation, layout, width),
            **parts,
        )
    return z_PN, a_PI
