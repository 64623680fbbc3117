"""FLOPs of the ops of the experts, for ``torch.utils.flop_counter.FlopCounterMode``.

Each counts the matrix products that it runs, as that mode does for torch's own ops: 2 FLOPs for a product and its sum
(``perf_model/roofline.py`` has the steps). Rows are those that the host knows of: slots, or what a plan has room for
where that is less. Slots without an expert (-1, token rounding's spare ones) count.

R rows, H hidden, I intermediate, N1 = 2I (gated) or I.
"""

from __future__ import annotations

from supersonic_moe.training.arguments import (
    Bf16Forward,
    Bf16Saved,
    Fp8Forward,
    Fp8Saved,
    Fp8Weights,
    Incoming,
    Inputs,
    Plan,
)


def forward(call: Bf16Forward | Fp8Forward) -> int:
    """R H N1 and R I H products."""
    _, n1, hidden = call.w1.shape
    return 2 * _rows(call.plan) * hidden * (n1 + call.w2.shape[2])


def bf16_backward(saved: Bf16Saved, incoming: Incoming) -> int:
    _, n1, hidden = saved.w1.shape
    return _backward(saved.plan, incoming.needs, hidden, n1, saved.w2.shape[2])


def fp8_backward(weights: Fp8Weights, saved: Fp8Saved, incoming: Incoming) -> int:
    """Where Z was not kept, its product runs once more."""
    _, hidden, n1 = weights.w1_transposed.shape
    again = 0 if weights.w1_q is None else 2 * _rows(saved.plan) * hidden * n1
    return again + _backward(saved.plan, incoming.needs, hidden, n1, weights.w2_transposed.shape[1])


def _backward(plan: Plan, needs: Inputs[bool], hidden: int, n1: int, intermediate: int) -> int:
    """dA always; dW2, dW1 and dx where they are wanted."""
    wide, narrow = hidden * n1, hidden * intermediate
    return 2 * _rows(plan) * (narrow * (1 + needs.w2) + wide * (needs.w1 + needs.x))


def _rows(plan: Plan) -> int:
    return min(plan.reverse_index.shape[0], plan.gather_index.shape[0])
