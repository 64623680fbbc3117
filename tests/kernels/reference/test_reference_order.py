"""Sums of the reference have one order, on every device: the same inputs give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import supersonic_moe as sm
from supersonic_moe.kernels.reference.gather import add_rows


def test_rows_are_added_in_their_order(device: torch.device) -> None:
    """Values whose sum in another order has other bits: 0 + 1e8 + 1 - 1e8 = 0 in fp32, 1e8 - 1e8 + 1 = 1."""
    values = torch.tensor([[1e8], [5.0], [1.0], [-1e8], [-1e8], [1e8], [7.0]], device=device)
    index = torch.tensor([2, 0, 2, 2, 3, 3, 3], device=device)
    assert add_rows(values, index, 4).tolist() == [[5.0], [0.0], [0.0], [7.0]]
    wide, at = torch.randn(500, 40, device=device), torch.randint(9, (500,), device=device)
    want = torch.zeros(9, 40, device=device)
    for row, r in zip(wide, at.tolist(), strict=True):
        want[r] += row
    assert torch.equal(add_rows(wide, at, 9), want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("activation", "tokens", "hidden", "intermediate", "experts"),
    [("relu_sq", 15, 40, 128, 4), ("reglu", 161, 7, 44, 36), ("swiglu", 500, 64, 32, 8)],
)
def test_the_reference_repeats_its_bits_on_cuda(
    activation: str, tokens: int, hidden: int, intermediate: int, experts: int
) -> None:
    fan, k = (1 if activation == "relu_sq" else 2), min(4, experts)
    x, w1, b1, w2, b2 = (
        torch.randn(shape, device="cuda", requires_grad=True)
        for shape in (
            (tokens, hidden),
            (experts, fan * intermediate, hidden),
            (experts, fan * intermediate),
            (experts, hidden, intermediate),
            (experts, hidden),
        )
    )
    router = torch.randn(experts, hidden, device="cuda", requires_grad=True)

    def step() -> list[Tensor]:
        out, logits, counts = sm.moe_layer(
            x, router, w1, w2, k, b1=b1, b2=b2, activation=activation, backend="reference"
        )
        loss = out.square().sum() + sm.switch_load_balancing_loss(logits, counts, backend="reference")
        return [out, *torch.autograd.grad(loss, (x, router, w1, b1, w2, b2))]

    first = step()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
