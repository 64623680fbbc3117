"""The routing rule of the inference operator against one token at a time in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from inference_oracle import route_token

from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.kernels.reference.grouped_routing import route_grouped

RULES = {
    "deepseek_v3": (256, 8, 8, 4, "sigmoid", 2.5),
    "kimi_k2": (384, 8, 1, 1, "sigmoid", 2.827),
    "qwen3": (128, 8, 1, 1, "softmax", 1.0),
    "qwen3_next": (512, 10, 1, 1, "softmax", 1.0),
    "deepseek_v4": (256, 6, 1, 1, "sqrt_softplus", 1.5),
    "one_expert_a_group": (16, 3, 16, 5, "sigmoid", 1.0),
    "odd": (21, 5, 3, 2, "sqrt_softplus", 1.0),
}


def rule_of(name: str) -> GroupedRouting:
    experts, k, groups, kept, scoring, factor = RULES[name]
    return GroupedRouting(
        num_experts=experts,
        top_k=k,
        n_group=groups,
        topk_group=kept,
        scoring=Scoring(scoring),
        scaling_factor=factor,
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_like_one_token_at_a_time(name: str, biased: bool) -> None:
    rule = rule_of(name)
    logits = torch.randn(40, rule.num_experts, dtype=torch.float64) * 2
    bias = (torch.randn(rule.num_experts) * 0.1).bfloat16() if biased else None
    weights, ids = route_grouped(logits, bias, rule)
    for t in range(40):
        want_ids, want = route_token(
            logits[t].numpy(),
            np.zeros(rule.num_experts) if bias is None else bias.double().numpy(),
            n_group=rule.n_group,
            topk_group=rule.topk_group,
            top_k=rule.top_k,
            scoring=rule.scoring.value,
            factor=rule.scaling_factor,
        )
        assert ids[t].tolist() == want_ids
        np.testing.assert_allclose(weights[t], want, rtol=1e-12)
    weights32, ids32 = route_grouped(logits.float(), bias, rule)
    assert weights32.dtype is torch.float32 and ids32.dtype is torch.int32
    same = (ids32 == ids).all(1)
    assert same.float().mean() > 0.9  # a near tie may turn round in fp32
    torch.testing.assert_close(weights32[same].double(), weights[same], rtol=1e-5, atol=0)


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    rule = GroupedRouting(num_experts=8, top_k=2, n_group=1, topk_group=1)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
    bias = torch.tensor([0, 0, 0, 0, 0, 0, 5.0, 5.0])
    weights, ids = route_grouped(logits, bias, rule)
    assert ids.tolist() == [[6, 7]]
    s = torch.sigmoid(torch.tensor([-3.0, -4.0]))
    torch.testing.assert_close(weights[0], s / s.sum())


def test_large_bias_does_not_cost_precision_of_the_weights() -> None:
    """Taking the score as biased value minus bias would cancel here (flashinfer #3875)."""
    rule = GroupedRouting(num_experts=16, top_k=4, n_group=1, topk_group=1)
    logits = torch.randn(5, 16) - 12
    weights, ids = route_grouped(logits, torch.full((16,), 12.0), rule)
    s = torch.sigmoid(logits.double()).gather(1, ids.long())
    torch.testing.assert_close(weights.double(), s / s.sum(1, keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scoring", list(Scoring))
def test_exact_ties_go_to_the_lower_index(scoring: Scoring) -> None:
    rule = GroupedRouting(num_experts=32, top_k=5, n_group=8, topk_group=3, scoring=scoring)
    _, ids = route_grouped(torch.zeros(2, 32), None, rule)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    logits = torch.zeros(1, 32)
    logits[0, 30] = logits[0, 13] = 1.0  # groups 3 and 7 tie at the top, then group 0 among equals
    _, ids = route_grouped(logits, None, rule)
    assert ids.tolist() == [[13, 30, 0, 1, 2]]
    signed = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    _, ids = route_grouped(signed, None, GroupedRouting(num_experts=4, top_k=3, n_group=1, topk_group=1))
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("scoring", [Scoring.SIGMOID, Scoring.SQRT_SOFTPLUS])
def test_nan_ranks_lowest_and_stays_in_its_token(scoring: Scoring) -> None:
    rule = GroupedRouting(num_experts=16, top_k=4, n_group=4, topk_group=2, scoring=scoring)
    logits = torch.randn(6, 16)
    clean_weights, clean_ids = route_grouped(logits, None, rule)
    logits[1] = math.nan  # a padding token
    logits[2, [0, 5, 10, 15]] = math.nan
    logits[3, :14] = math.nan  # two numbers left, in one group
    weights, ids = route_grouped(logits, None, rule)
    for row in ids.tolist():
        assert len(set(row)) == 4 and all(0 <= e < 16 for e in row)
    assert ids[1].tolist() == [0, 1, 2, 3]
    assert not {0, 5, 10, 15} & set(ids[2].tolist()) and weights[2].isfinite().all()
    assert set(ids[3, :2].tolist()) == {14, 15} and ids[3, 2:].tolist() == [0, 1]
    untouched = [0, 4, 5]
    assert torch.equal(ids[untouched], clean_ids[untouched])
    assert torch.equal(weights[untouched], clean_weights[untouched])


def test_nan_in_softmax_makes_the_token_nan() -> None:
    logits = torch.randn(2, 8)
    logits[0, 3] = math.nan
    weights, ids = route_grouped(logits, None, GroupedRouting(num_experts=8, top_k=2, n_group=1, topk_group=1))
    assert weights.isfinite().all()  # sigmoid: the other logits are not concerned
    rule = GroupedRouting(num_experts=8, top_k=2, n_group=1, topk_group=1, scoring=Scoring.SOFTMAX)
    weights, ids = route_grouped(logits, None, rule)
    assert weights[0].isnan().all() and ids[0].tolist() == [0, 1] and weights[1].isfinite().all()


def test_no_tokens() -> None:
    weights, ids = route_grouped(torch.empty(0, 256), None, rule_of("deepseek_v3"))
    assert weights.shape == ids.shape == (0, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2048}, "at most 1024; got 2048"),
        ({"num_experts": 256, "top_k": 17}, "top_k must be at most 16; got 17"),
        ({"num_experts": 256, "n_group": 17}, "n_group must be at most 16"),
        ({"num_experts": 250}, "multiple of n_group; got 250 experts in 8 groups"),
        ({"num_experts": 256, "topk_group": 9}, "topk_group must not exceed n_group; got 9 of 8"),
        ({"num_experts": 16, "top_k": 9}, "groups, which hold 8 experts"),
        ({"num_experts": 256, "scaling_factor": math.nan}, "finite number; got nan"),
    ],
)
def test_refuses_what_is_no_rule(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedRouting(**settings)
