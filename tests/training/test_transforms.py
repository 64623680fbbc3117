"""Transforms of ``torch.func``: reverse mode works, what does not says so, and nothing gives a wrong number."""

from __future__ import annotations

import copy
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, func

import supersonic_moe as sm

T, H, I, E, K = 5, 4, 3, 4, 2  # noqa: E741
IDS = torch.tensor([[0, 1], [2, 0], [-1, 2], [1, E], [2, 1]])


def experts(trained: bool) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    w1, _, w2, _ = (None if w is None else w.requires_grad_(trained) for w in oracle.weights(E, H, I, 2, scale=0.5))
    scores = torch.rand(T, K, dtype=torch.float64)
    return lambda x: sm.topk_experts(x, IDS, scores, w1, w2)


def tokens(*batch: int) -> Tensor:
    return torch.randn(*batch, T, H, dtype=torch.float64)


@pytest.mark.parametrize("trained", [False, True])
def test_jacobians_and_hessians_in_reverse_mode(trained: bool) -> None:
    layer, x = experts(trained), tokens()
    rows = lambda x: layer(x).sum(0)  # noqa: E731
    torch.testing.assert_close(func.jacrev(rows)(x), torch.autograd.functional.jacobian(rows, x))
    total = lambda x: layer(x).square().sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(total, x)
    assert hessian.any()
    torch.testing.assert_close(func.jacrev(func.grad(total))(x), hessian)
    (dx,) = func.vjp(layer, x)[1](torch.ones_like(x))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(layer(leaf).sum(), leaf)[0])


ROUTERS = [
    sm.SoftmaxAfterTopK(),
    sm.SoftmaxBeforeTopK(),
    sm.SigmoidGroupedTopK(num_groups=2, scaling_factor=2.5),
    sm.TokenRounding(tile=2),
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.kind)
def test_jacobians_and_hessians_of_a_whole_layer(router: sm.TopKRouter | sm.TokenRounding) -> None:
    """Of whatever the router hands back too: its gradient goes to chosen experts, of which a batch has several sets."""
    moe, x = sm.MoE(E, K, H, I, "swiglu", True, 0.5, router=router, dtype=torch.float64), tokens()
    both = lambda x: torch.cat([moe(x)[0].sum(0), moe(x)[1][None]])  # noqa: E731
    torch.testing.assert_close(func.jacrev(both)(x), torch.autograd.functional.jacobian(both, x))
    total = lambda x: moe(x)[0].square().sum()  # noqa: E731
    torch.testing.assert_close(func.jacrev(func.grad(total))(x), torch.autograd.functional.hessian(total, x))


def of_ids(x: Tensor, scores: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return sm.topk_experts(x, IDS, scores, w1, w2, b1=b1, b2=b2)


def of_logits(x: Tensor, scores: Tensor, *_: Tensor) -> Tensor:
    chosen, _ = sm.route(x, K, "sigmoid_grouped_topk")
    return chosen * sm.switch_load_balancing_loss(x, torch.arange(H))


def of_rows(x: Tensor, scores: Tensor, w1: Tensor, b1: Tensor, *_: Tensor) -> Tensor:
    return sm.grouped_linear(x, w1, torch.tensor([1, 1, 3, 4]), bias=b1)


@pytest.mark.parametrize("call", [of_ids, of_rows, of_logits])
@pytest.mark.parametrize("wanted", [(0,), (0, 1, 2, 3)], ids=str)
def test_a_compiled_gradient_is_that_of_eager_code(call: Callable[..., Tensor], wanted: tuple[int, ...]) -> None:
    """It was zeros for what the differentiated function is called with: its ``requires_grad`` is False in a trace."""
    operands = (tokens(), torch.rand(T, K, dtype=torch.float64), *oracle.weights(E, H, I, 2, scale=0.5))
    given = [t.detach() for t in operands if t is not None]
    gradient = func.grad(lambda *given: call(*given).square().sum(), argnums=wanted)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), gradient(*given))


def test_a_compiled_gradient_of_a_gradient_is_refused() -> None:
    """torch 2.13 takes the derivative of the backward of any ``autograd.Function`` for zero there."""
    layer = experts(False)
    twice = func.grad(lambda x: func.grad(lambda x: layer(x).square().sum())(x).square().sum())
    with pytest.raises(Exception, match=r"transform of torch\.func inside of another.* outside of torch\.compile"):
        torch.compile(twice, fullgraph=True, backend="eager")(tokens())


def test_a_compiled_gradient_of_a_functional_call() -> None:
    moe, x = sm.MoE(E, K, H, I, "swiglu", True, 0.5, router="sigmoid_grouped_topk", dtype=torch.float64), tokens()
    loss = lambda weights, x: sum(t.square().sum() for t in func.functional_call(moe, weights, (x,)))  # noqa: E731
    gradient = func.grad(loss, argnums=(0, 1))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    weights = dict(moe.named_parameters())
    torch.testing.assert_close(compiled(weights, x), gradient(weights, x))


@pytest.mark.parametrize("recipe", [None, sm.Fp8Recipe()])
def test_batches_of_gradients_are_refused(recipe: sm.Fp8Recipe | None) -> None:
    """By their sentence, whatever op is the first that cannot take them."""
    moe = sm.MoE(E, K, 16, 16, "swiglu", True, 0.5, recipe=recipe, dtype=torch.bfloat16)
    x = torch.randn(T, 16, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"is_grads_batched.* not supported.* torch\.func\.jacrev"):
        torch.autograd.grad(moe(x)[0], x, torch.ones(2, T, 16, dtype=torch.bfloat16), is_grads_batched=True)
    with pytest.raises(NotImplementedError, match=r"vectorize=True"):
        torch.autograd.functional.jacobian(lambda x: moe(x)[0], x.detach(), vectorize=True)


def test_jacrev_is_not_told_to_use_jacrev() -> None:
    moe = sm.MoE(E, K, 16, 16, "swiglu", True, 0.5, recipe=sm.Fp8Recipe(), dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"jacrev works where a layer runs in plain PyTorch.*Bf16Recipe\(\)"):
        func.jacrev(lambda x: moe(x)[0])(torch.randn(T, 16, dtype=torch.bfloat16))
    w, ends = torch.randn(E, I, H, dtype=torch.float64), torch.arange(1, E + 1)
    with pytest.raises(NotImplementedError, match=r"Nor is torch\.func\.jacrev of grouped_linear: call"):
        func.jacrev(lambda x: sm.grouped_linear(x, w, ends))(tokens())


def dual(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda call, x: func.jvp(call, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda call, x: func.jacfwd(call)(x),
    "hessian": lambda call, x: func.hessian(lambda x: call(x).sum())(x),
    "forward_ad": dual,
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("mode", FORWARD_MODE)
def test_forward_mode_is_refused(mode: str, trained: bool) -> None:
    """Without a trained weight it gave zeros."""
    with pytest.raises(NotImplementedError, match=r"(forward-mode derivatives are|torch\.func\.vmap is) not supported"):
        FORWARD_MODE[mode](experts(trained), tokens())
    moe = sm.MoE(E, K, H, I, "swiglu", False, 0.5).double()
    with pytest.raises(NotImplementedError, match=r"(forward-mode derivatives are|torch\.func\.vmap is) not supported"):
        FORWARD_MODE[mode](lambda x: moe(x)[0], tokens())
    w, ends = torch.randn(E, I, H, dtype=torch.float64, requires_grad=trained), torch.arange(1, E + 1)
    with pytest.raises(NotImplementedError, match=r"(forward-mode derivatives are|torch\.func\.vmap is) not supported"):
        FORWARD_MODE[mode](lambda x: sm.grouped_linear(x, w, ends), tokens())


def test_vmap_is_right_or_refused() -> None:
    layer, xs = experts(trained=False), tokens(3)
    torch.testing.assert_close(func.vmap(layer)(xs), torch.stack([layer(x) for x in xs]))
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap is not supported where gradients.*: reshape x"):
        func.vmap(experts(trained=True))(xs)


@pytest.mark.parametrize("router_dtype", [None, torch.float64])
def test_vmap_of_a_whole_layer_without_recorded_gradients(router_dtype: torch.dtype | None) -> None:
    router = sm.SigmoidGroupedTopK()
    moe, xs = sm.MoE(E, K, H, I, "swiglu", True, 0.5, router=router, router_dtype=router_dtype).double(), tokens(3)
    with torch.no_grad():
        outs, losses = func.vmap(moe)(xs)
        expected = [moe(x) for x in xs]
    torch.testing.assert_close(outs, torch.stack([out for out, _ in expected]))
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in expected]))


def test_a_transform_leaves_nothing_of_itself_in_a_layer() -> None:
    """A tensor of a transform that has ended cannot be copied, and so neither could the layer."""
    moe = sm.MoE(E, K, H, I, "swiglu", True, 0.5).double()
    moe(tokens())
    before = moe.expert_counts.clone()
    func.grad(lambda x: moe(x)[0].sum())(tokens())
    with torch.no_grad():
        func.vmap(moe)(tokens(3))
    assert copy.deepcopy(moe).expert_counts.equal(before)
