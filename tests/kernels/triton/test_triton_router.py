"""The Triton router against per-token oracles in fp64: choices exactly, scores and gradients within fp32 rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.router import SigmoidGroupedTopK, SoftmaxAfterTopK, SoftmaxBeforeTopK, TopKRouter
from supersonic_moe.kernels.triton import route_backward, route_forward

RULES = [
    SoftmaxAfterTopK(),
    SoftmaxBeforeTopK(),
    SoftmaxBeforeTopK(renormalize=True),
    SigmoidGroupedTopK(scaling_factor=2.5),
    SigmoidGroupedTopK(renormalize=False),
]
GROUPED = SigmoidGroupedTopK(num_groups=6, topk_groups=2, scaling_factor=1.5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of one store. Triton's interpreter truncates to bfloat16 instead of rounding."""
    return {torch.float32: 1e-5, torch.bfloat16: 2**-7 if device.type == "cpu" else 2**-8, torch.float16: 2**-10}[dtype]


def descending(values: list[float]) -> list[int]:
    """Positions, best first: NaN above all, lower position first among equals."""
    return sorted(
        range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i] if values[i] == values[i] else 0, i)
    )


def choose(logits: list[float], k: int, router: TopKRouter, bias: list[float]) -> list[int]:
    if not isinstance(router, SigmoidGroupedTopK):
        return descending(logits)[:k]
    value = [1 / (1 + math.exp(-x)) + b for x, b in zip(logits, bias, strict=True)]
    size = len(value) // router.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
    merit = [sum(sorted((value[i] for i in group), reverse=True)[:2]) for group in groups]
    reachable = sorted(i for g in descending(merit)[: router.topk_groups] for i in groups[g])
    return [reachable[i] for i in descending([value[i] for i in reachable])[:k]]


def weights(x_TE: Tensor, ids_TK: Tensor, router: TopKRouter) -> Tensor:
    """Differentiable scores of given choices."""
    if isinstance(router, SigmoidGroupedTopK):
        chosen = x_TE.sigmoid().gather(1, ids_TK)
        return router.scaling_factor * (chosen / chosen.sum(1, keepdim=True) if router.renormalize else chosen)
    chosen = x_TE.softmax(1).gather(1, ids_TK)
    if isinstance(router, SoftmaxBeforeTopK) and not router.renormalize:
        return chosen
    return chosen / chosen.sum(1, keepdim=True)


def check(logits: Tensor, k: int, router: TopKRouter, bias: Tensor | None, device: torch.device) -> None:
    on_device = logits.to(device)
    scores, ids = route_forward(on_device, k, router, None if bias is None else bias.to(device))
    assert scores.dtype is torch.float32 and ids.dtype is torch.int32
    bias_list = [0.0] * logits.shape[1] if bias is None else bias.tolist()
    assert ids.tolist() == [choose(row, k, router, bias_list) for row in logits.tolist()]

    x = logits.double().requires_grad_()
    want = weights(x, ids.long().cpu(), router)
    torch.testing.assert_close(scores.double().cpu(), want.detach(), rtol=4e-6, atol=1e-30)

    dscores = torch.randn(scores.shape)
    got = route_backward(dscores.to(device), on_device, scores, ids, router)
    assert got.dtype is logits.dtype
    (gradient,) = torch.autograd.grad(want, x, dscores.double())
    torch.testing.assert_close(got.double().cpu(), gradient, rtol=rounding(logits.dtype, device), atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("router", RULES, ids=repr)
def test_rules(router: TopKRouter, dtype: torch.dtype, device: torch.device) -> None:
    bias = torch.randn(30) if isinstance(router, SigmoidGroupedTopK) else None
    check((3 * torch.randn(37, 30)).to(dtype), 5, router, bias, device)


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(1, 1, 1), (70, 8, 8), (3, 1500, 3), (2, 64, 64)])
@pytest.mark.parametrize("router", [RULES[0], RULES[1], RULES[3]], ids=repr)
def test_shapes(router: TopKRouter, num_tokens: int, num_experts: int, k: int, device: torch.device) -> None:
    check(torch.randn(num_tokens, num_experts), k, router, None, device)


@pytest.mark.parametrize(
    ("num_experts", "k", "router"),
    [
        (24, 5, GROUPED),
        (18, 6, GROUPED),  # 3 experts a group: neither groups nor members are a power of two
        (16, 4, SigmoidGroupedTopK(num_groups=16, topk_groups=5)),  # one expert a group has no second best
        (256, 8, SigmoidGroupedTopK(num_groups=8, topk_groups=4, scaling_factor=2.5)),  # DeepSeek-V3
        (12, 12, SigmoidGroupedTopK(num_groups=3, topk_groups=3)),  # no group is left out
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_groups(num_experts: int, k: int, router: SigmoidGroupedTopK, biased: bool, device: torch.device) -> None:
    check(torch.randn(9, num_experts), k, router, torch.randn(num_experts) / 4 if biased else None, device)


@pytest.mark.parametrize("router", RULES, ids=repr)
def test_ties_go_to_the_lower_expert(router: TopKRouter, device: torch.device) -> None:
    logits = torch.randint(-2, 3, (50, 21)).float()
    logits[logits == 0] *= torch.where(torch.rand(int((logits == 0).sum())) < 0.5, -1.0, 1.0)  # -0 and +0 are equal
    check(logits, 7, router, None, device)


@pytest.mark.parametrize("router", [*RULES, GROUPED], ids=repr)
def test_odd_values_stay_in_their_token(router: TopKRouter, device: torch.device) -> None:
    clean = torch.randn(40, 18)
    dirty = clean.clone()
    dirty[3, 7] = math.nan
    dirty[4] = math.nan
    dirty[5, [2, 9]] = torch.tensor([math.nan, math.inf])
    dirty[6] = -math.inf
    dirty[7, 4] = math.inf
    dirty[8, :] = torch.tensor([-math.nan, *[0.0] * 17])  # a NaN with its sign bit set
    touched = torch.arange(3, 9)
    untouched = torch.tensor([t for t in range(40) if t not in touched])

    dscores = torch.randn(40, 6, device=device)
    scores, ids = route_forward(dirty.to(device), 6, router, None)
    gradient = route_backward(dscores, dirty.to(device), scores, ids, router)
    clean_scores, clean_ids = route_forward(clean.to(device), 6, router, None)
    clean_gradient = route_backward(dscores, clean.to(device), clean_scores, clean_ids, router)
    for got, want in ((scores, clean_scores), (ids, clean_ids), (gradient, clean_gradient)):
        assert torch.equal(got[untouched.to(device)], want[untouched.to(device)])
    for t in touched.tolist():
        row = ids[t].tolist()
        assert len(set(row)) == 6 and all(0 <= i < 18 for i in row)
    assert ids[[3, 5, 8], 0].tolist() == [7, 2, 0]
    assert router == GROUPED or ids[5, 1] == 9  # the infinite logit follows NaN, unless its group is out
    assert scores[[3, 4, 5, 8], 0].isnan().all()


def test_rows_may_be_strided_and_repeats_are_bit_exact(device: torch.device) -> None:
    wide = torch.randn(45, 96, device=device)
    view = wide[:, 16:80]
    first = route_forward(view, 4, RULES[1], None)
    again = route_forward(view.contiguous(), 4, RULES[1], None)
    dscores = torch.randn(45, 4, device=device)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(
        route_backward(dscores, view, *first, RULES[1]), route_backward(dscores, view.contiguous(), *again, RULES[1])
    )


def test_the_gradient_of_a_saturated_sigmoid_is_small_and_not_zero(device: torch.device) -> None:
    """sigmoid(20) is 1 in fp32, and its slope 2e-9."""
    router, logits = SigmoidGroupedTopK(renormalize=False), torch.full((1, 1), 20.0, device=device)
    scores, ids = route_forward(logits, 1, router, None)
    got = route_backward(torch.ones_like(scores), logits, scores, ids, router)
    torch.testing.assert_close(got.item(), math.exp(-20), rtol=1e-5, atol=0)


def test_no_tokens(device: torch.device) -> None:
    scores, ids = route_forward(torch.empty(0, 8, device=device), 2, RULES[0], None)
    assert scores.shape == ids.shape == (0, 2)
    assert route_backward(scores, torch.empty(0, 8, device=device), scores, ids, RULES[0]).shape == (0, 8)


def test_refuses_float64(device: torch.device) -> None:
    with pytest.raises(TypeError, match="float64"):
        route_forward(torch.randn(2, 8, dtype=torch.float64, device=device), 2, RULES[0], None)
