"""Expert activation and its backward on pre-activations, in the accumulation dtype.

forward:   a = act(z + b1[expert])
backward:  ds = <da, a>      as = s * a      dz = act'(z + b1) * (s * da)

with s the row's router score. ``da = dO W2`` is the gradient *before* the score, hence ds = <dO, Y> without Y
(SonicMoE, arXiv 2512.14080 §3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.kernels.interface import Gate


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def activation_forward(z_PN: Tensor, b1_EN: Tensor | None, row_expert_P: Tensor, gate: Gate) -> Tensor:
    """(P, I) in the dtype of z."""
    a_PI, _ = _act(_preactivation(z_PN, b1_EN, row_expert_P), gate)
    return a_PI.to(z_PN.dtype)


def activation_backward(
    z_PN: Tensor, b1_EN: Tensor | None, da_PI: Tensor, row_scores_P: Tensor, row_expert_P: Tensor, gate: Gate
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz (P, N1), s * a (P, I), ds (P,) in the accumulation dtype)."""
    a_PI, partials = _act(_preactivation(z_PN, b1_EN, row_expert_P), gate)
    da_acc_PI = da_PI.to(a_PI.dtype)
    s_P1 = row_scores_P.to(a_PI.dtype)[:, None]
    dz_PN = _join([s_P1 * da_acc_PI * partial for partial in partials], gate.layout)
    return dz_PN.to(z_PN.dtype), (s_P1 * a_PI).to(z_PN.dtype), (da_acc_PI * a_PI).sum(1)


def _preactivation(z_PN: Tensor, b1_EN: Tensor | None, row_expert_P: Tensor) -> Tensor:
    h = z_PN.to(acc_dtype(z_PN.dtype))
    if b1_EN is None:
        return h
    experts = b1_EN.shape[0]
    bias_PN = b1_EN.to(h.dtype)[row_expert_P.clamp(max=experts - 1).long()]
    return h + torch.where(row_expert_P[:, None] < experts, bias_PN, 0)  # a dead row's NaN must not reach db1


def _act(z_PN: Tensor, columns: Gate) -> tuple[Tensor, list[Tensor]]:
    """Value and partial derivatives (by gate, by up) or (by z,)."""
    activation, layout = columns
    kind = activation.type
    if not activation.gated:
        value, slope = _unary(kind, z_PN)
        return value, [slope]
    gate, up = _split(z_PN, layout)
    if kind is ActivationType.SWIGLU:
        value, slope = _swish(gate, activation)
        if activation.limit is None:
            u = up + activation.up_offset if activation.up_offset else up
            return value * u, [slope * u, value]
        limit = activation.limit
        u = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up)) + activation.up_offset
        return value * u, [slope * u * (gate <= limit), value * (up.abs() <= limit)]
    value, slope = _unary(_INNER[kind], gate)
    return value * up, [slope * up, value]


def _swish(gate: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """g * sigmoid(alpha * g) and its slope, with g = min(gate, limit), whose bound passes the gradient: that of torch's
    clamp did until 2.13.
    """
    g = gate if activation.limit is None else torch.where(gate > activation.limit, activation.limit, gate)
    sigmoid = torch.sigmoid(activation.alpha * g)
    return g * sigmoid, sigmoid * (1 + activation.alpha * g * (1 - sigmoid))


_INNER = {
    ActivationType.GEGLU: ActivationType.GELU,
    ActivationType.GEGLU_TANH: ActivationType.GELU_TANH,
    ActivationType.REGLU: ActivationType.RELU,
}


def _unary(kind: ActivationType, h: Tensor) -> tuple[Tensor, Tensor]:
    if kind is ActivationType.SILU:
        sigmoid = torch.sigmoid(h)
        return h * sigmoid, sigmoid * (1 + h * (1 - sigmoid))
    if kind is ActivationType.GELU:
        cdf = 0.5 * (1 + torch.erf(h * math.sqrt(0.5)))
        return h * cdf, cdf + h * torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    if kind is ActivationType.GELU_TANH:  # 0.5 (1 + tanh u) = sigmoid(2 u)
        scale = 2 * math.sqrt(2 / math.pi)
        sigmoid = torch.sigmoid(scale * h * (1 + 0.044715 * h * h))
        return h * sigmoid, sigmoid * (1 + scale * h * (1 + 3 * 0.044715 * h * h) * (1 - sigmoid))
    relu = h.relu()
    if kind is ActivationType.RELU_SQ:
        return relu * relu, 2 * relu
    return relu, (h > 0).to(h.dtype)


def _split(z_PN: Tensor, layout: GateUpLayout) -> tuple[Tensor, Tensor]:
    if layout is GateUpLayout.INTERLEAVED:
        return z_PN[:, 0::2], z_PN[:, 1::2]
    first, second = z_PN.chunk(2, dim=1)
    return (first, second) if layout is GateUpLayout.GATE_UP else (second, first)


def _join(parts: list[Tensor], layout: GateUpLayout) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if layout is GateUpLayout.INTERLEAVED:
        return torch.stack(parts, dim=2).flatten(1)
    return torch.cat(parts if layout is GateUpLayout.GATE_UP else parts[::-1], dim=1)
