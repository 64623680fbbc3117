"""Gradients of gradients (``create_graph=True``): right in plain torch, an error elsewhere, never a wrong number."""

from __future__ import annotations

import functools
from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import supersonic_moe as sm

gradgradcheck = functools.partial(torch.autograd.gradgradcheck, fast_mode=True)
T, H, I, E, K = 5, 4, 3, 4, 2  # noqa: E741


def operands(dtype: torch.dtype = torch.float64, device: str = "cpu", scale: int = 1) -> tuple[Tensor, ...]:
    """x, scores, w1, b1, w2, b2"""
    torch.manual_seed(0)
    x = torch.randn(T, H * scale, dtype=dtype, device=device).requires_grad_()
    scores = torch.rand(T, K, dtype=torch.promote_types(dtype, torch.float32), device=device).requires_grad_()
    weights = oracle.weights(E, H * scale, I * scale, 2, dtype=dtype, device=device, scale=0.5)
    return x, scores, *weights


IDS = torch.tensor([[0, 1], [2, 0], [-1, 2], [1, E], [2, 1]])  # a sentinel of each kind; nothing for expert 3

ENTRIES: dict[str, Callable[..., Tensor]] = {
    "topk_experts": lambda x, s, w1, w2, **b: sm.topk_experts(x, IDS.to(x.device), s, w1, w2, **b),
    "routed_experts": lambda x, s, w1, w2, **b: sm.routed_experts(
        x, torch.arange(T, device=x.device).repeat_interleave(K), IDS.flatten().to(x.device), s.flatten(), w1, w2, **b
    ),
    "dispatched_experts": lambda x, s, w1, w2, **b: sm.dispatched_experts(
        x, torch.tensor([1, 1, 3, 4], device=x.device), w1, w2, scores_R=s[:, 0], **b
    ),
    "experts_from_plan": lambda x, s, w1, w2, **b: sm.experts_from_plan(
        x, s.flatten(), sm.plan_from_topk(IDS.to(x.device), E, tile=4), w1, w2, **b
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_second_derivatives_of_experts(entry: str) -> None:
    x, scores, w1, b1, w2, b2 = operands()
    biased = lambda x, s, w1, b1, w2, b2: ENTRIES[entry](x, s, w1, w2, b1=b1, b2=b2)  # noqa: E731
    assert gradgradcheck(biased, (x, scores, w1, b1, w2, b2))


@pytest.mark.parametrize("activation", ["geglu", "silu", sm.Activation.gpt_oss(limit=0.9)], ids=str)
def test_second_derivatives_of_activations(activation: str | sm.Activation) -> None:
    x, scores, w1, _, w2, _ = operands()
    if activation == "silu":
        w1 = w1[:, :I].detach().requires_grad_()
    call = lambda x, s, w1, w2: sm.topk_experts(x, IDS, s, w1, w2, activation=activation)  # noqa: E731
    assert gradgradcheck(call, (x, scores, w1, w2))


ROUTERS = [
    sm.SoftmaxAfterTopK(),
    sm.SoftmaxBeforeTopK(),
    sm.SigmoidGroupedTopK(scaling_factor=2.5),
    sm.SigmoidGroupedTopK(renormalize=False),
    sm.TokenRounding(mode="NR-f", tile=2),
    sm.TokenRounding(base=sm.SigmoidGroupedTopK(), mode="UP", tile=2),
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: str(router)[:40])
def test_second_derivatives_of_the_whole_layer(router: sm.TopKRouter | sm.TokenRounding) -> None:
    x, _, w1, _, w2, _ = operands()
    gate = torch.randn(E, H, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        out = sm.moe_layer(x, gate, w1, w2, K, router=router)
        aux = sm.switch_load_balancing_loss(out.router_logits, out.expert_counts, router=router)
        return x + out.output, aux

    assert gradgradcheck(layer, (x, gate, w1, w2))


def test_a_gradient_penalty_agrees_with_the_definition() -> None:
    """x + moe(x) with a graph that is kept: the skip alone gave a number that looked right."""
    x, scores, w1, b1, w2, b2 = operands()
    act, layout = sm.Activation("swiglu"), sm.GateUpLayout.INTERLEAVED

    def ours(x: Tensor) -> Tensor:
        return (x + sm.topk_experts(x, IDS, scores, w1, w2, b1=b1, b2=b2)).square().sum()

    def definition(x: Tensor) -> Tensor:
        rows = oracle.experts(x, oracle.topk_triples(IDS, scores, E), w1, b1, w2, b2, act, layout)
        return (x + rows).square().sum()

    def penalty(loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        value = loss(x)
        (dx,) = torch.autograd.grad(value, x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum() + value, (x, scores, w1, b1, w2, b2)))

    torch.testing.assert_close(penalty(ours), penalty(definition))
    twice = [torch.func.grad(lambda x, f=f: torch.func.grad(f)(x).square().sum())(x) for f in (ours, definition)]
    torch.testing.assert_close(*twice)


REFUSED: dict[str, Callable[..., Tensor]] = {
    "fp8": lambda x, s, w1, w2: sm.topk_experts(x, IDS, s, w1, w2, recipe=sm.Fp8Recipe()),
    "main_grad": lambda x, s, w1, w2: sm.topk_experts(x, IDS, s, w1, w2, accumulate_into_main_grad=True),
}


@pytest.mark.parametrize("loss", [Tensor.sum, lambda out: out.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("way", REFUSED)
def test_where_there_are_none_an_error_says_so(way: str, skip: bool, loss: Callable[[Tensor], Tensor]) -> None:
    """Whatever the penalty is differentiated by, and also where another path gives it a gradient."""
    x, scores, w1, _, w2, _ = operands(torch.bfloat16, scale=8)
    for w in (w1, w2):
        w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    out = REFUSED[way](x, scores, w1, w2)
    (dx,) = torch.autograd.grad(loss(x + out if skip else out), x, create_graph=True)
    for by in (x, scores, w1):
        with pytest.raises(
            RuntimeError, match=r"second derivatives of the experts exist in plain torch only.*Call the"
        ):
            torch.autograd.grad(dx.float().square().sum() + x.float().square().sum(), by, retain_graph=True)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("way", REFUSED)
def test_a_graph_that_nobody_differentiates_changes_nothing(way: str, recomputed: bool) -> None:
    call = functools.partial(checkpoint, REFUSED[way], use_reentrant=False) if recomputed else REFUSED[way]
    results = []
    for create_graph in (False, True):
        x, scores, w1, _, w2, _ = operands(torch.bfloat16, scale=8)
        for w in (w1, w2):
            w.main_grad = torch.zeros_like(w, dtype=torch.float32)
        loss = call(x, scores, w1, w2).square().sum()
        results.append(torch.autograd.grad(loss, (x, scores), create_graph=create_graph))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_second_derivatives_of_a_layer_in_a_checkpoint() -> None:
    """Which hands out what it holds once a pass, to whichever derivative."""
    x, _, w1, _, w2, _ = operands()
    gate = torch.randn(E, H, dtype=torch.float64, requires_grad=True)
    layer = lambda *given: sm.moe_layer(*given, K).output  # noqa: E731
    found = []
    for call in (layer, functools.partial(checkpoint, layer, use_reentrant=False)):
        (dx,) = torch.autograd.grad(call(x, gate, w1, w2).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, gate, w1, w2)))
    torch.testing.assert_close(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, sm.Fp8Recipe()], ids=["bf16", "fp8"])
def test_gpu_kernels_refuse_and_the_reference_does_not(recipe: sm.Fp8Recipe | None) -> None:
    x, scores, w1, _, w2, _ = operands(torch.bfloat16, "cuda", scale=16)
    ids = IDS.cuda()
    out = x + sm.topk_experts(x, ids, scores, w1, w2, recipe=recipe)
    (dx,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.float().square().sum().backward()
    x, scores, w1, _, w2, _ = operands(torch.float64, "cuda")
    call = lambda x, s, w1, w2: sm.topk_experts(x, ids, s, w1, w2, backend="reference")  # noqa: E731
    assert gradgradcheck(call, (x, scores, w1, w2))
