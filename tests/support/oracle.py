"""The definition of the layer, one token and one expert at a time, in whatever dtype comes in. Slow, obvious,
differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe import Activation, ActivationType, GateUpLayout


def gelu_tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


def expert(
    x_H: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation, layout: GateUpLayout
) -> Tensor:
    h = w1 @ x_H + (0 if b1 is None else b1)
    if act.gated:
        half = len(h) // 2
        gate, up = {
            GateUpLayout.INTERLEAVED: (h[0::2], h[1::2]),
            GateUpLayout.GATE_UP: (h[:half], h[half:]),
            GateUpLayout.UP_GATE: (h[half:], h[:half]),
        }[layout]
        if act.limit is not None:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        up = up + act.up_offset
        a = {
            ActivationType.SWIGLU: lambda g: g * torch.sigmoid(act.alpha * g),
            ActivationType.GEGLU: F.gelu,
            ActivationType.GEGLU_TANH: gelu_tanh,
            ActivationType.REGLU: F.relu,
        }[act.type](gate) * up
    else:
        a = {
            ActivationType.SILU: F.silu,
            ActivationType.GELU: F.gelu,
            ActivationType.GELU_TANH: gelu_tanh,
            ActivationType.RELU: F.relu,
            ActivationType.RELU_SQ: lambda v: F.relu(v).square(),
        }[act.type](h)
    return w2 @ a + (0 if b2 is None else b2)


def experts(x_TH, triples, w1, b1, w2, b2, act, layout):
    """triples: list of (token, expert, score tensor)."""
    rows = [torch.zeros_like(x) for x in x_TH]
    for token, e, score in triples:
        y = expert(x_TH[token], w1[e], None if b1 is None else b1[e], w2[e], None if b2 is None else b2[e], act, layout)
        rows[token] = rows[token] + score * y
    return torch.stack(rows) if rows else x_TH.clone()


def topk_triples(ids_TK, scores_TK, num_experts):
    return [
        (t, int(e), scores_TK[t, j])
        for t, row in enumerate(ids_TK.tolist())
        for j, e in enumerate(row)
        if 0 <= e < num_experts
    ]


def weights(num_experts, hidden, intermediate, fan, *, bias=(True, True), dtype=torch.float64, device="cpu", scale=1.0):
    """Leaf parameters (w1, b1, w2, b2)."""

    def leaf(*shape):
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(device=device, dtype=dtype).requires_grad_()

    w1, w2 = leaf(num_experts, fan * intermediate, hidden), leaf(num_experts, hidden, intermediate)
    b1 = leaf(num_experts, fan * intermediate) if bias[0] else None
    b2 = leaf(num_experts, hidden) if bias[1] else None
    return w1, b1, w2, b2


def rel_fro(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error, where both lie; inf if anything is not finite; the norm itself if ``want`` is 0."""
    if got.device != want.device:
        got, want = got.cpu(), want.cpu()
    got, want = got.double(), want.double()
    if not got.isfinite().all():
        return float("inf")
    size = want.norm()
    return float((got - want).norm() / size) if size > 0 else float(got.norm())
