"""torch.compile with a number of tokens that only the data says: tokens are chosen by a mask inside the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import supersonic_moe as sm

E, H, I, K = 8, 16, 8, 2  # noqa: E741
W1, W2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
ROUNDING = sm.TokenRounding(mode="UP", tile=4)


def loss(x: Tensor) -> Tensor:
    _, ids = sm.route(x[:, :E], K, "sigmoid_grouped_topk")
    counts = sm.plan_from_topk(ids, E).expert_counts
    return sm.switch_load_balancing_loss(x[:, :E], counts, router="sigmoid_grouped_topk")


def experts(x: Tensor) -> Tensor:
    scores, ids = sm.route(x[:, :E], K)
    return sm.topk_experts(x, ids, scores, W1, W2).square().sum()


def received(x: Tensor) -> Tensor:
    scores, ids = sm.route(x[:, :E], K)
    plan, scores_S = sm.plan_from_deepep(ids, scores, [128] * E)
    return sm.experts_from_plan(x, scores_S, plan, W1, W2).square().sum()


def rounded(x: Tensor) -> Tensor:
    result = sm.token_rounding(x[:, :E], K, ROUNDING)
    return result.scores.square().sum()


def dispatched(x: Tensor) -> Tensor:
    return sm.dispatched_experts(x, torch.arange(1, E + 1), W1, W2).square().sum()


@pytest.fixture
def sizes_from_data() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("call", [loss, experts, received, rounded, dispatched])
def test_compiles_for_a_number_of_tokens_that_depends_on_data(
    call: Callable[[Tensor], Tensor], sizes_from_data: None
) -> None:
    compiled = torch.compile(lambda x, mask: call(x[mask]), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 33):
        x, mask = torch.randn(tokens, H, requires_grad=True), torch.rand(tokens) > 0.5
        got, want = compiled(x, mask), call(x[mask])
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (got, want)))
