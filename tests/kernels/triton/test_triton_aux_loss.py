"""The Triton load-balancing loss and its gradient against autograd of the definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels.triton import switch_loss_backward, switch_loss_forward
from supersonic_moe.routing.aux_loss import switch_load_balancing_loss

LOSS_GRAD = 0.75


def definition(logits: Tensor, counts: Tensor, sigmoid: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, dlogits for a gradient of LOSS_GRAD), fp64 on the CPU."""
    x = logits.double().cpu().requires_grad_()
    counts = counts.double().cpu()
    share = counts / counts.sum() if counts.any() else counts
    p = x.sigmoid() / x.sigmoid().sum(1, keepdim=True) if sigmoid else x.softmax(1)
    loss = x.shape[1] * (share * p.mean(0)).sum()
    return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(LOSS_GRAD, dtype=torch.float64))[0]


def computed(logits: Tensor, counts: Tensor, sigmoid: bool = False) -> tuple[Tensor, Tensor]:
    loss = switch_loss_forward(logits, counts, sigmoid)
    dlogits = switch_loss_backward(torch.tensor(LOSS_GRAD, device=logits.device), logits, counts, sigmoid)
    assert loss.shape == () and loss.dtype is torch.float32
    assert dlogits.dtype is logits.dtype and dlogits.is_contiguous()
    return loss, dlogits


def check(logits: Tensor, counts: Tensor, sigmoid: bool = False) -> None:
    (loss, dlogits), (want_loss, want_dlogits) = (f(logits, counts, sigmoid) for f in (computed, definition))
    torch.testing.assert_close(loss.double().cpu(), want_loss, rtol=2e-6, atol=0)
    # The interpreter truncates to bfloat16 instead of rounding, hence a whole unit in the last place.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[logits.dtype]
    absolute = 2e-6 / len(logits) + (2**-24 if logits.dtype is torch.float16 else 0)
    torch.testing.assert_close(dlogits.double().cpu(), want_dlogits, rtol=rtol, atol=absolute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (300, 3), (65, 8), (37, 60), (9, 1500)])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_matches_the_definition(
    tokens: int, experts: int, dtype: torch.dtype, sigmoid: bool, device: torch.device
) -> None:
    """Up to several programs, rows that do not fill one, widths that are no power of two."""
    logits = (3 * torch.randn(tokens, experts)).to(device, dtype)
    check(logits, torch.randint(1, 50, (experts,), device=device, dtype=torch.int32), sigmoid)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_counts_of_any_type_with_experts_that_got_nothing(dtype: torch.dtype, device: torch.device) -> None:
    check(torch.randn(20, 6, device=device), torch.tensor([0, 7, 0, 20, 1, 12], device=device).to(dtype))


def test_no_token_or_no_routed_pair_gives_zero(device: torch.device) -> None:
    for tokens, count in ((0, 3), (0, 0), (5, 0)):
        loss, dlogits = computed(
            torch.randn(tokens, 6, device=device), torch.full((6,), count, device=device, dtype=torch.int32)
        )
        assert loss == 0 and dlogits.shape == (tokens, 6) and not dlogits.any()


def test_odd_logits(device: torch.device) -> None:
    """Masked experts have no probability and no gradient; a NaN spoils the loss, and the gradient of its token."""
    logits, counts = torch.randn(40, 7), torch.arange(7, dtype=torch.int32)
    logits[3, 2] = -math.inf
    logits[4] = 1e30 * logits[4].sign()
    check(logits.to(device), counts.to(device))
    check(logits.to(device), counts.to(device), sigmoid=True)
    clean = computed(logits.to(device), counts.to(device))[1]
    assert clean[3, 2] == 0
    for odd in (math.nan, math.inf):
        spoiled = logits.clone()
        spoiled[5, 1] = odd
        loss, dlogits = computed(spoiled.to(device), counts.to(device))
        assert loss.isnan() and dlogits[5].isnan().all()
        others = torch.arange(40) != 5
        assert torch.equal(dlogits[others.to(device)], clean[others.to(device)])


def test_strided_rows_and_repeats_are_bit_exact(device: torch.device) -> None:
    wide = torch.randn(450, 96, device=device)
    counts = torch.randint(50, (64,), device=device)
    views = wide[:, 16:80], wide[:, 16:80].contiguous(), wide[:, 16:80]
    (loss, dlogits), *others = (computed(view, counts) for view in views)
    assert all(torch.equal(loss, other) and torch.equal(dlogits, d) for other, d in others)


def test_through_autograd(device: torch.device) -> None:
    """The public function with this backend: value, gradient, and the gradient of a norm of the gradient."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
        loss = switch_load_balancing_loss(logits, torch.arange(6, device=device), backend=backend)
        (once,) = torch.autograd.grad(loss.square(), logits, retain_graph=True)
        (created,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
        (twice,) = torch.autograd.grad(created.square().sum(), logits)
        torch.testing.assert_close(created, once, rtol=1e-4, atol=1e-8)
        results.append([t.detach().double() for t in (loss, once, twice)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
