"""The router's projection that also sums the two gradients of x: everything as autograd has it without."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import supersonic_moe as sm
from supersonic_moe.training.router_linear import router_linear

T, H, E = 7, 12, 5


def gradients(projection, needs: tuple[bool, bool], used: str) -> tuple[torch.Tensor | None, ...]:
    torch.manual_seed(0)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=needs[0])
    w = torch.randn(E, H, dtype=torch.float64, requires_grad=needs[1])
    logits, same = projection(x, w)
    parts = {"logits": logits.square().sum(), "experts": (same * same.detach().cos()).sum()}
    loss = sum(value for name, value in parts.items() if used in (name, "both")) + x.sum() + w.sum()
    loss.backward(retain_graph=True)
    first = [None if t.grad is None else t.grad.clone() for t in (x, w)]
    loss.backward()
    assert all(a is None or torch.equal(2 * a, t.grad) for a, t in zip(first, (x, w), strict=True))
    return logits.detach(), same.detach(), x.grad, w.grad


@pytest.mark.parametrize("used", ["both", "logits", "experts"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_are_those_of_a_linear_layer(needs, used):
    got = gradients(router_linear, needs, used)
    want = gradients(lambda x, w: (F.linear(x, w), x), needs, used)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-13, atol=1e-13)


def test_gradients_that_others_hold_stay_as_they_are():
    """The sum is formed in the experts' buffer. A hook on x, on the input of the block before, or on the output must
    not see its tensor change afterwards.
    """
    moe = sm.MoE(E, 2, H, 8, "swiglu", True, 0.1).double()
    leaf = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    held = []

    def hold(grad: torch.Tensor) -> None:
        held.append((grad, grad.clone()))

    x = leaf * 1.5
    leaf.register_hook(hold)
    x.register_hook(hold)
    out, aux = moe(x)
    out.register_hook(hold)
    ((out + x).square().sum() + aux).backward()
    assert len(held) == 3
    for now, then in held:
        assert torch.equal(now, then)
