"""Up-projection and gated activation in one kernel on sm_90a: H[r] = X[r] · W1[expert of r]ᵀ, A[r] = act(H[r] + b1).

Layout (row-major)
    X (T, H) bf16, read through an index of P rows sorted by expert (-1: zeros), or (P, H) as it lies. W1 (E, 2I, H), H
    contiguous, gate and up rows in any of the three orders: the order is nothing but strides of a tensor map that sees
    W1 as (E, 2, I, H). H (P, 2I) in the column order of the weight, stored for backward only, without the bias. A (P,
    I).
Tiles
    128 rows × 128 activations; B is 128 gate rows and 128 up rows, so both halves of an activation are accumulators of
    one thread. Ring, cluster, scheduler and ragged last tiles as in grouped_gemm.py.
Maths
    fp32 accumulation, bias and activation in fp32 on the unrounded sums, one rounding for H and one for A. (A backend
    that stores H first computes A from the rounded H.)
Cost
    4·P·H·I FLOP. Bytes: 2·(P·H + 2·E·I·H + 3·P·I); the unfused pair moves 4·P·I more, a pass of 142 µs at P 65536,
    I 1536 on an H200.
"""

from __future__ import annotations

import functools
import math

from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.jit.launch import F32, I32, PTR, TENSOR_MAP, Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.compose import compose_up_projection
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
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
    num_rows,
)
from supersonic_moe.kernels.triton import activation_forward

KINDS = {ActivationType.SWIGLU: 0, ActivationType.GEGLU: 1, ActivationType.REGLU: 2}  # Act of activation.cuh
CLAMPED_SWIGLU = 3
ALL_KINDS = (*KINDS.values(), CLAMPED_SWIGLU)


@functools.cache
def kind_of(activation: Activation) -> int:
    """The kernel's ACTIVATION: SwiGLU with constants is one of its own, since they cost a third of its instructions."""
    return KINDS[activation.type] if activation == Activation(activation.type) else CLAMPED_SWIGLU


def up_spec(kind: int, *, gather: bool, cluster: int) -> KernelSpec:
    constants = (("ACTIVATION", kind),)
    return mainloop_spec("up_projection", cluster=cluster, gather=gather, constants=constants, opcodes=OPCODES)


SPECS = tuple(up_spec(kind, gather=g, cluster=c) for kind in ALL_KINDS for g in (False, True) for c in (1, 2))


@functools.cache
def _kernel(kind: int, gather: bool, cluster: int) -> Kernel:
    spec = up_spec(kind, gather=gather, cluster=cluster)
    return Kernel(spec, (*[TENSOR_MAP] * 4, PTR, PTR, I32, I32, I32, *[PTR] * 3, I32, I32, I32, F32, F32, F32))


_unfused = compose_up_projection(grouped_mm, activation_forward)


def up_projection(
    x_TH: Tensor,
    gather_index: Tensor | None,
    w1_ENH: Tensor,
    b1_EN: Tensor | None,
    expert_offsets: Tensor,
    row_expert_P: Tensor,
    activation: Activation,
    layout: GateUpLayout,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(H (P, 2I) without the bias, or (0, 2I) if not ``save``; A (P, I)). Ungated activations and weights stored with
    H outermost take the grouped GEMM and the activation pass instead.
    """
    if not activation.gated or w1_ENH.stride(2) != 1:
        return _unfused(x_TH, gather_index, w1_ENH, b1_EN, expert_offsets, row_expert_P, activation, layout, save)
    num_experts, n1, hidden = w1_ENH.shape
    rows, width = num_rows(x_TH, gather_index), n1 // 2
    z_PN = x_TH.new_empty(rows if save else 0, n1)
    a_PI = x_TH.new_empty(rows, width)
    if rows == 0:
        return z_PN, a_PI
    interleaved = layout is GateUpLayout.INTERLEAVED
    gate_base, up_base = half_bases(layout, width)
    cluster = cluster_size(rows, num_experts)
    map_a = tensor_map(a_PI.view(rows, 1, width), box=(WARP_ROWS, 1, 64))
    map_h = map_of_halves(z_PN, interleaved, rows=WARP_ROWS) if save else map_a
    with on_device(x_TH):
        grid = multiprocessors(x_TH.device.index) // cluster * cluster
        _kernel(kind_of(activation), gather_index is not None, cluster).launch(
            (grid, 1, 1),
            map_of_rows(x_TH, gather_index, box=(BLOCK_M, BLOCK_K)),
            map_of_gate_and_up(w1_ENH, interleaved, width),
            map_h,
            map_a,
            expert_offsets,
            gather_index,
            num_experts,
            width,
            -(-hidden // BLOCK_K),
            z_PN if save else None,
            a_PI,
            None if b1_EN is None else b1_EN.contiguous(),
            gate_base,
            up_base,
            int(interleaved),
            *activation_constants(activation),
        )
    return z_PN, a_PI


def map_of_gate_and_up(w1_ENH: Tensor, interleaved: bool, width: int) -> TensorMap:
    """W1 as (E, 2, I, H), bf16 or e4m3, in boxes of the rows of half a tile and 128 bytes."""
    expert, row, _ = w1_ENH.stride()
    half, step = (row, 2 * row) if interleaved else (width * row, row)
    shape = (w1_ENH.shape[0], 2, width, w1_ENH.shape[2])
    box = (1, 1, BLOCK_N // 2, 128 // w1_ENH.element_size())
    return tensor_map(w1_ENH, box=box, shape=shape, strides=(expert, half, step, 1))


def map_of_halves(z_PN: Tensor, interleaved: bool, *, rows: int) -> TensorMap:
    """H as (P, 1, 2I) or (P, 2, I), bf16 or e4m3, in boxes of 128 bytes a row: none crosses from one half into the
    other.
    """
    capacity, columns = z_PN.shape
    row, halves = z_PN.stride(0), 1 if interleaved else 2
    shape, strides = (capacity, halves, columns // halves), (row, row if interleaved else columns // 2, 1)
    return tensor_map(z_PN, box=(rows, 1, 128 // z_PN.element_size()), shape=shape, strides=strides)


def half_bases(layout: GateUpLayout, width: int) -> tuple[int, int]:
    """First columns of gate and up in a row of H."""
    bases = {GateUpLayout.INTERLEAVED: (0, 1), GateUpLayout.GATE_UP: (0, width), GateUpLayout.UP_GATE: (width, 0)}
    return bases[layout]


def activation_constants(activation: Activation) -> tuple[float, float, float]:
    """ActivationConstants of activation.cuh."""
    return activation.alpha, math.inf if activation.limit is None else activation.limit, activation.up_offset
