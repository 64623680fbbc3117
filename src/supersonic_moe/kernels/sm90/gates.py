"""What kernels are told of an activation and of the order of gate and up."""

from __future__ import annotations

import math

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout

INTERLEAVED, GATE_UP = GateUpLayout.INTERLEAVED, GateUpLayout.GATE_UP
KINDS = {ActivationType.SWIGLU: 0, ActivationType.GEGLU: 1, ActivationType.REGLU: 2}  # Act of activation.cuh
SWIGLU, CLAMPED_SWIGLU = KINDS[ActivationType.SWIGLU], 3
ALL_KINDS = (*KINDS.values(), CLAMPED_SWIGLU)
BF16_KINDS = {**KINDS, ActivationType.GEGLU_TANH: 4}  # in FP8 it is composed, because each kind is 21 binaries there
ALL_BF16_KINDS = (*ALL_KINDS, BF16_KINDS[ActivationType.GEGLU_TANH])
OUTERMOST_H = ((SWIGLU, False), (CLAMPED_SWIGLU, True))
"""(kind, interleaved) that has BF16 kernels for w1 stored (E, H, 2I), w2 stored (E, I, H): [gate; up] and gpt-oss."""
SWIGLU = KINDS[ActivationType.SWIGLU]
INT8 = {"SAVED_INT8": 1}
"""Constant of the FP8 kernels that store or read Z in int8; only SwiGLU has them, because each kind is 15 binaries."""
UNGATED_KIND = ActivationType.RELU_SQ  # what the kernels without a gate compute, in BF16


def kind_of(activation: Activation) -> int:
    """The kernel's ACTIVATION: SwiGLU with constants is one of its own, since they cost a third of its instructions."""
    plain = activation.limit is None and activation.alpha == 1.0 and activation.up_offset == 0.0
    return BF16_KINDS[activation.type] if plain else CLAMPED_SWIGLU


def bf16_kind(activation: Activation, interleaved: bool, contiguous: bool) -> int | None:
    """The same for the BF16 kernels with a gate, ``contiguous`` for w1 with H and w2 with I contiguous; None: there is
    no kernel.
    """
    if activation.type not in BF16_KINDS:
        return None
    kind = kind_of(activation)
    return kind if contiguous or (kind, interleaved) in OUTERMOST_H else None


def fused_in_fp8(activation: Activation, int8: bool) -> bool:
    """Whether the FP8 kernels compute it, with Z in int8 or not."""
    return activation.type in KINDS and (not int8 or kind_of(activation) == SWIGLU)


def gate_arguments(activation: Activation, layout: GateUpLayout, width: int) -> dict[str, int | float]:
    """First columns of gate and up in a row of Z, and the constants of the activation."""
    gate_base, up_base = (0, 1) if layout is INTERLEAVED else (0, width) if layout is GATE_UP else (width, 0)
    return {"gate_base": gate_base, "up_base": up_base, **constants_of(activation)}


def constants_of(activation: Activation) -> dict[str, float]:
    limit = math.inf if activation.limit is None else activation.limit
    return {"alpha": activation.alpha, "limit": limit, "up_offset": activation.up_offset}
