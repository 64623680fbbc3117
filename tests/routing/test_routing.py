"""Top-K routers and auxiliary losses: a per-token definition, Hugging Face's routers, ties and odd values."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from supersonic_moe.config.router import (
    SigmoidGroupedTopK,
    SoftmaxAfterTopK,
    SoftmaxBeforeTopK,
    TokenRounding,
    as_router,
)
from supersonic_moe.kernels import reference
from supersonic_moe.routing import topk
from supersonic_moe.routing.aux_loss import (
    router_z_loss,
    sequence_expert_counts,
    sequence_load_balancing_loss,
    switch_load_balancing_loss,
)
from supersonic_moe.routing.topk import route

ROUTERS = [
    SoftmaxAfterTopK(),
    SoftmaxBeforeTopK(),
    SoftmaxBeforeTopK(renormalize=True),
    SigmoidGroupedTopK(),
    SigmoidGroupedTopK(num_groups=4, topk_groups=2, scaling_factor=2.5),
    SigmoidGroupedTopK(num_groups=2, topk_groups=1, scaling_factor=1.5, renormalize=False),
]


def naive_route(logits, k, router, bias=None):
    """The definition, one token at a time, differentiable through torch scalars. Returns (ids, rows of scores)."""
    all_ids, all_scores = [], []
    for x in logits:
        num_experts = len(x)
        key = x.detach()
        allowed = list(range(num_experts))
        if isinstance(router, SigmoidGroupedTopK):
            affinity = x.sigmoid()
            key = affinity.detach() if bias is None else affinity.detach() + bias
            size = num_experts // router.num_groups
            groups = [list(range(g * size, (g + 1) * size)) for g in range(router.num_groups)]
            worth = [sum(sorted((float(key[e]) for e in group), reverse=True)[:2]) for group in groups]
            best = sorted(range(len(groups)), key=lambda g: -worth[g])[: router.topk_groups]  # sorted() is stable
            allowed = [e for g in sorted(best) for e in groups[g]]
        ids = sorted(allowed, key=lambda e: -float(key[e]))[:k]
        if isinstance(router, SigmoidGroupedTopK):
            total = sum(affinity[e] for e in ids) + 1e-20 if router.renormalize and k > 1 else 1.0
            scores = [affinity[e] / total * router.scaling_factor for e in ids]
        else:
            pool = ids if isinstance(router, SoftmaxAfterTopK) or router.renormalize else range(num_experts)
            total = sum(x[e].exp() for e in pool)
            scores = [x[e].exp() / total for e in ids]
        all_ids.append(ids)
        all_scores.append(scores)
    return all_ids, all_scores


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize(("tokens", "k"), [(7, 1), (5, 3), (33, 4)])
def test_matches_the_definition(router, tokens, k):
    logits = (3 * torch.randn(tokens, 8, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(8, dtype=torch.float64) if isinstance(router, SigmoidGroupedTopK) else None
    scores, ids = route(logits, k, router, correction_bias=bias)
    want_ids, want_scores = naive_route(logits, k, router, bias)
    assert ids.dtype == torch.int32 and ids.tolist() == want_ids
    want = torch.stack([torch.stack(row) for row in want_scores])
    torch.testing.assert_close(scores, want, rtol=1e-12, atol=0)
    g = torch.randn_like(scores)
    (got_dx,), (want_dx,) = torch.autograd.grad(scores, logits, g), torch.autograd.grad(want, logits, g)
    torch.testing.assert_close(got_dx, want_dx, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_gradcheck(router):
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64) if isinstance(router, SigmoidGroupedTopK) else None
    assert torch.autograd.gradcheck(lambda x: route(x, 3, router, correction_bias=bias)[0], logits)


def test_all_experts_chosen_is_plain_softmax():
    logits = torch.randn(6, 5)
    scores, ids = route(logits, 5, "softmax_after_topk")
    dense = torch.zeros(6, 5).scatter_(1, ids.long(), scores)
    torch.testing.assert_close(dense, logits.softmax(1))


ODD = st.sampled_from([0.0, -0.0, 1.0, -2.0, 0.5, math.inf, -math.inf, math.nan, 1e30, -1e30])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(ODD, min_size=8, max_size=8), min_size=0, max_size=5),
    k=st.integers(1, 4),
    router=st.sampled_from(ROUTERS),
)
def test_ids_are_distinct_and_in_range_whatever_the_logits(rows, k, router):
    logits = torch.tensor(rows, dtype=torch.float32).reshape(-1, 8).requires_grad_()
    scores, ids = route(logits, k, router)
    for row_ids, row in zip(ids.tolist(), rows, strict=True):
        assert len(set(row_ids)) == k and all(0 <= e < 8 for e in row_ids)
        if not any(math.isnan(v) for v in row):
            assert row_ids == naive_route(torch.tensor([row]), k, router)[0][0]
    poisoned = torch.tensor([any(math.isnan(v) for v in row) for row in rows], dtype=torch.bool)
    assert scores[poisoned].isnan().any(1).all()
    (dlogits,) = torch.autograd.grad(scores, logits, torch.randn_like(scores))
    clean = torch.tensor([all(math.isfinite(v) for v in row) for row in rows], dtype=torch.bool)
    assert scores[clean].isfinite().all() and dlogits[clean].isfinite().all()


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_equal_logits_go_to_the_lower_index(router):
    scores, ids = route(torch.zeros(3, 8), 2, router)
    assert ids.tolist() == [[0, 1]] * 3 and torch.equal(scores[:, 0], scores[:, 1])
    logits = torch.randint(-1, 2, (9, 256)).float()  # many ties, and too many experts for a sort that is stable by luck
    assert route(logits, 64, router)[1].tolist() == naive_route(logits, 64, router)[0]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_minus_infinity_masks_an_expert(router):
    """Never chosen while another expert of the allowed groups is left, and weighs exactly 0 when it must be."""
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf, -math.inf, -1.0, -math.inf]])
    scores, ids = route(logits, 4, router)
    left = [e for e in ids[0].tolist() if logits[0, e] > -math.inf]
    assert ids[0, : len(left)].tolist() == left and len(left) >= 2
    assert (scores[0, : len(left)] > 0).all() and (scores[0, len(left) :] == 0).all()


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_a_nan_token_leaves_the_others_alone(router):
    logits = torch.randn(6, 8)
    bad = logits.clone()
    bad[2, 5] = math.nan
    keep = torch.tensor([0, 1, 3, 4, 5])
    results = []
    for x in (logits, bad):
        x.requires_grad_()
        scores, ids = route(x, 2, router)
        (dx,) = torch.autograd.grad(scores, x, torch.ones_like(scores) * torch.tensor([1.0, -2.0]))
        results.append([t[keep] for t in (scores, ids, dx)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_low_precision_logits_compute_in_fp32(router, dtype):
    """Bit for bit what the same logits give in fp32, but for the gradient's final rounding."""
    low = torch.randn(9, 8).to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    (scores, ids), (want_scores, want_ids) = route(low, 3, router), route(full, 3, router)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, want_scores) and torch.equal(ids, want_ids)
    g = torch.randn_like(scores)
    (dlow,), (dfull,) = torch.autograd.grad(scores, low, g), torch.autograd.grad(want_scores, full, g)
    assert dlow.dtype == dtype and torch.equal(dlow, dfull.to(dtype))


def test_no_tokens():
    for router in ROUTERS:
        logits = torch.zeros(0, 8, requires_grad=True)
        scores, ids = route(logits, 2, router)
        assert scores.shape == ids.shape == (0, 2)
        assert torch.autograd.grad(scores.sum(), logits)[0].shape == (0, 8)


def test_correction_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    scores, ids = route(
        logits, 2, SigmoidGroupedTopK(renormalize=False), correction_bias=torch.tensor([0.0, -9.0, 0.0, 9.0])
    )
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(scores, logits[:, [3, 0]].sigmoid())


# ---- Hugging Face's routers, their own weights and ours --------------------------------------------------------------


def dense(scores, ids, num_experts):
    return torch.zeros(scores.shape[0], num_experts, dtype=scores.dtype).scatter(1, ids.long(), scores)


def hf_router(kind):
    shape = dict(num_experts_per_tok=3, hidden_size=16, num_local_experts=8, num_experts=8)
    if kind == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Router

        return Router(SimpleNamespace(**shape)), "softmax_after_topk"
    if kind == "deepseek_v3":
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as Router

        extra = dict(routed_scaling_factor=2.5, n_group=4, topk_group=2, norm_topk_prob=True)
        return Router(SimpleNamespace(**shape, **extra)), SigmoidGroupedTopK(
            num_groups=4, topk_groups=2, scaling_factor=2.5
        )
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

    norm = kind == "qwen3_moe_norm"
    return Router(SimpleNamespace(**shape, norm_topk_prob=norm)), SoftmaxBeforeTopK(renormalize=norm)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_moe_norm", "deepseek_v3"])
def test_agrees_with_hugging_face(kind):
    pytest.importorskip("transformers")
    theirs, config = hf_router(kind)
    with torch.no_grad():
        theirs.weight.normal_()
    bias = getattr(theirs, "e_score_correction_bias", None)
    if bias is not None:
        bias.normal_()
    x, g = torch.randn(50, 16), torch.randn(50, 8)
    _, their_scores, their_ids = theirs(x)
    want = dense(their_scores, their_ids, 8)
    weight = theirs.weight.detach().clone().requires_grad_()
    got = dense(*route(x @ weight.T, 3, config, correction_bias=bias), 8)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    (want_dw,) = torch.autograd.grad(want, theirs.weight, g)
    (got_dw,) = torch.autograd.grad(got, weight, g)
    torch.testing.assert_close(got_dw, want_dw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_one_expert_a_token_keeps_its_affinity(scale):
    """As in DeepSeek-V3's published router and Megatron's: a sum of one is not divided by, so the output teaches the
    router.
    """
    logits = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    scores, ids = route(logits, 1, SigmoidGroupedTopK(scaling_factor=scale))
    best = logits.sigmoid().max(1)
    torch.testing.assert_close(scores[:, 0], scale * best.values)
    assert torch.equal(ids[:, 0].long(), best.indices)
    g = torch.randn(50, dtype=torch.float64)
    got, want = (torch.autograd.grad(s, logits, g)[0] for s in (scores[:, 0], scale * best.values))
    torch.testing.assert_close(got, want)
    assert got.abs().amax(1).min() > 0


# ---- op contracts, compilation, arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_opcheck(router):
    logits = torch.randn(5, 8)
    bias = torch.randn(8) if isinstance(router, SigmoidGroupedTopK) else None
    config = (*topk.encode(router, 2), "auto")
    assert topk._decode(*config[:-1]) == router
    opcheck(torch.ops.supersonic_moe.route_forward.default, (logits, bias, 2, *config))
    scores, ids = reference.route_forward(logits, 2, router, bias)
    opcheck(torch.ops.supersonic_moe.route_backward.default, (torch.randn(5, 2), logits, scores, ids, *config))


def test_opcheck_of_the_loss():
    logits, counts, dloss = torch.randn(5, 8), torch.arange(8), torch.tensor(0.5)
    opcheck(torch.ops.supersonic_moe.switch_loss_forward.default, (logits, counts, "auto", True))
    opcheck(torch.ops.supersonic_moe.switch_loss_backward.default, (dloss, logits, counts, "auto", True))


@pytest.mark.parametrize("router", ROUTERS[1:5:3], ids=str)
def test_compiles_without_graph_breaks(router):
    compiled = torch.compile(lambda x: route(x, 2, router), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9):
        x = torch.randn(tokens, 8, requires_grad=True)
        (got, got_ids), (want, want_ids) = compiled(x), route(x, 2, router)
        assert torch.equal(got, want) and torch.equal(got_ids, want_ids)
        grads = [torch.autograd.grad(s.square().sum(), x)[0] for s in (got, want)]
        assert torch.equal(*grads)


def test_strided_logits_and_expanded_gradients(device):
    """The ops see contiguous tensors whatever the caller has: here transposed logits, and sum()'s stride-0 gradient."""
    base = torch.randn(8, 6, device=device, requires_grad=True)
    scores, ids = route(base.T, 2, "softmax_before_topk")
    want_scores, want_ids = route(base.T.contiguous(), 2, "softmax_before_topk")
    assert torch.equal(scores, want_scores) and torch.equal(ids, want_ids)
    assert torch.equal(*(torch.autograd.grad(s.sum(), base)[0] for s in (scores, want_scores)))


def test_names():
    assert as_router("softmax_after_topk") == SoftmaxAfterTopK()
    assert as_router("softmax_before_topk") == SoftmaxBeforeTopK(renormalize=False)
    assert as_router("softmax_before_topk_renormalized") == SoftmaxBeforeTopK(renormalize=True)
    assert as_router("sigmoid_grouped_topk") == SigmoidGroupedTopK()
    assert as_router("token_rounding") == TokenRounding()
    assert as_router(ROUTERS[4]) is ROUTERS[4]


X = torch.zeros(4, 6)
BAD = [
    (
        lambda: route(X, 7, "softmax_after_topk"),
        ValueError,
        "k must not exceed the number of experts; got k = 7 with 6",
    ),
    (lambda: route(X, 0), ValueError, "k must be at least 1"),
    (lambda: route(X, 1.0), TypeError, "k must be a positive integer"),
    (lambda: route(X[0], 2), ValueError, "logits must have 2 dimensions"),
    (lambda: route(X.long(), 2), TypeError, "logits must be bfloat16"),
    (lambda: route(X.tolist(), 2), TypeError, "logits must be a torch.Tensor"),
    (lambda: route(X, 2, "top_k"), ValueError, "unknown router 'top_k'; choose one of softmax_after_topk"),
    (lambda: route(X, 2, 3), TypeError, "unknown router 3"),
    (lambda: route(X, 2, TokenRounding()), TypeError, "route chooses exactly K experts"),
    (lambda: route(X, 2, correction_bias=torch.zeros(6)), ValueError, "correction_bias belongs to SigmoidGroupedTopK"),
    (
        lambda: route(X, 2, "sigmoid_grouped_topk", correction_bias=torch.zeros(5)),
        ValueError,
        "correction_bias must have length 6",
    ),
    (lambda: route(X, 2, SigmoidGroupedTopK(num_groups=4)), ValueError, "must be a multiple of num_groups"),
    (lambda: route(X, 3, SigmoidGroupedTopK(num_groups=3)), ValueError, "k must not exceed the experts of the chosen"),
    (lambda: route(X, 2, backend="cutlass"), ValueError, "unknown backend 'cutlass'"),
    (lambda: SigmoidGroupedTopK(num_groups=2, topk_groups=3), ValueError, "topk_groups must not exceed num_groups"),
    (lambda: SigmoidGroupedTopK(num_groups=0), ValueError, "num_groups must be at least 1"),
    (lambda: SigmoidGroupedTopK(scaling_factor=math.inf), ValueError, "scaling_factor must be finite"),
    (lambda: SigmoidGroupedTopK(scaling_factor=-1.0), ValueError, "scaling_factor must be a positive finite"),
    (lambda: switch_load_balancing_loss(X, torch.zeros(5)), ValueError, "expert_counts must have length 6"),
    (lambda: switch_load_balancing_loss(X, torch.zeros(6), router="top_k"), ValueError, "unknown router 'top_k'"),
    (lambda: sequence_load_balancing_loss(X, torch.zeros(6)), ValueError, "router_logits must have 3 dimensions"),
    (lambda: sequence_load_balancing_loss(X[None], torch.zeros(4, 6)), ValueError, r"must have shape \(1, 6\)"),
    (lambda: sequence_expert_counts(X.int(), 3, 6), ValueError, "num_sequences must divide the tokens of topk_ids"),
    (lambda: router_z_loss(X[0]), ValueError, "router_logits must have 2 dimensions"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- auxiliary losses ------------------------------------------------------------------------------------------------


def test_switch_loss_matches_its_definition():
    logits = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 0, 9, 1, 7, 2])
    share = [sum(logits[t].softmax(0)[e] for t in range(11)) / 11 for e in range(6)]
    want = 6 * sum(p * int(c) / 22 for p, c in zip(share, counts, strict=True))
    torch.testing.assert_close(switch_load_balancing_loss(logits, counts), want)
    assert torch.autograd.gradcheck(lambda x: switch_load_balancing_loss(x, counts), logits)
    assert torch.autograd.gradgradcheck(lambda x: switch_load_balancing_loss(x, counts), logits)


def test_switch_loss_extremes():
    collapsed = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).expand(7, 4)
    assert switch_load_balancing_loss(collapsed, torch.tensor([7, 0, 0, 0])) == pytest.approx(4)
    assert switch_load_balancing_loss(torch.zeros(8, 4), torch.full((4,), 4)) == pytest.approx(1)
    assert switch_load_balancing_loss(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int32)) == 0
    assert switch_load_balancing_loss(torch.zeros(3, 4), torch.zeros(4)) == 0
    assert switch_load_balancing_loss(torch.tensor([[0.0, math.nan]]), torch.tensor([2, 0])).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_switch_loss_computes_low_precision_logits_in_fp32(dtype):
    low = torch.randn(9, 8).to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    counts = torch.arange(8)
    losses = [switch_load_balancing_loss(x, counts) for x in (low, full)]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)
    (dlow,), (dfull,) = (torch.autograd.grad(loss, x) for loss, x in zip(losses, (low, full), strict=True))
    assert dlow.dtype == dtype and torch.equal(dlow, dfull.to(dtype))


def test_switch_loss_compiles_without_graph_breaks():
    compiled = torch.compile(switch_load_balancing_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    counts = torch.arange(8)
    for tokens in (6, 9):
        x = torch.randn(tokens, 8, requires_grad=True)
        got, want = compiled(x, counts), switch_load_balancing_loss(x, counts)
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(loss.square(), x)[0] for loss in (got, want)))


def test_losses_and_routers_under_functional_transforms():
    """torch.func reaches the autograd functions by a path of its own."""
    x, counts = torch.randn(5, 8, dtype=torch.float64), torch.arange(8)

    def total(logits):
        return switch_load_balancing_loss(logits, counts) + route(logits, 2)[0].square().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(x), torch.autograd.grad(total(leaf), leaf)[0])


def test_switch_loss_is_hugging_faces_over_k():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 8)
    _, ids = route(logits, 3)
    ours = switch_load_balancing_loss(logits, torch.bincount(ids.flatten(), minlength=8))
    torch.testing.assert_close(3 * ours, mixtral.load_balancing_loss_func((logits,), 8, 3))


SIGMOID = [SigmoidGroupedTopK(num_groups=2), "sigmoid_grouped_topk", TokenRounding(base=SigmoidGroupedTopK())]


@pytest.mark.parametrize("router", SIGMOID, ids=str)
def test_the_loss_of_a_sigmoid_router_is_of_normalised_sigmoids(router):
    logits = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 0, 9, 1, 7, 2])

    def loss(x):
        return switch_load_balancing_loss(x, counts, router=router)

    share = sum(row.sigmoid() / row.sigmoid().sum() for row in logits) / 11
    want = 6 * sum(p * int(c) / 22 for p, c in zip(share, counts, strict=True))
    torch.testing.assert_close(loss(logits), want)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss(logits), want)))
    assert torch.autograd.gradcheck(loss, logits) and torch.autograd.gradgradcheck(loss, logits)
    assert (loss(logits) - switch_load_balancing_loss(logits, counts)).abs() > 1e-3


def test_the_loss_of_a_sigmoid_router_at_large_logits():
    logits = torch.tensor([[40.0, -40.0, 0.0], [-500.0, -500.0, -500.0]], requires_grad=True)
    loss = switch_load_balancing_loss(logits, torch.tensor([1, 1, 0]), router="sigmoid_grouped_topk")
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and dlogits.isfinite().all()
    assert 0 < abs(dlogits[0, 0]) < 1e-15  # 1 - sigmoid(40) = 4e-18, not 0


@pytest.mark.parametrize("router", ["softmax_after_topk", "sigmoid_grouped_topk"])
def test_sequence_loss_is_the_mean_loss_of_the_sequences(router):
    """DeepSeek-V3, eq. 17-20: f = E / (K S) counts, P = mean of the normalised scores, of one sequence at a time."""
    logits = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    _, ids = route(logits.reshape(-1, 6), 2, router)
    counts = sequence_expert_counts(ids, 3, 6)
    assert counts.dtype is torch.int32
    assert counts.tolist() == [torch.bincount(part.flatten(), minlength=6).tolist() for part in ids.view(3, -1)]
    losses = [
        switch_load_balancing_loss(x, c, router=router, backend="reference")
        for x, c in zip(logits, counts, strict=True)
    ]
    got, want = sequence_load_balancing_loss(logits, counts, router=router), sum(losses) / 3
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)))
    assert torch.autograd.gradgradcheck(lambda x: sequence_load_balancing_loss(x, counts, router=router), logits)
    assert sequence_load_balancing_loss(logits[:0], counts[:0], router=router) == 0


def test_sequence_counts_skip_ids_out_of_range():
    ids = torch.tensor([[0, -1], [2, 3], [1, 1], [7, 2]])
    assert sequence_expert_counts(ids, 2, 3).tolist() == [[1, 0, 1], [0, 2, 1]]
    assert sequence_expert_counts(ids[:0], 2, 3).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("router", ["softmax_after_topk", "sigmoid_grouped_topk"])
def test_counts_of_the_global_batch_give_its_loss(router):
    """The mean over equal micro-batches, each with the counts of all, is the loss of the whole batch."""
    logits = torch.randn(4, 9, 6, dtype=torch.float64, requires_grad=True)
    whole = logits.reshape(-1, 6)
    counts = torch.bincount(route(whole, 2, router)[1].flatten(), minlength=6)
    want = switch_load_balancing_loss(whole, counts, router=router)
    got = sum(switch_load_balancing_loss(part, counts, router=router) for part in logits) / 4
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)))


def test_losses_of_a_sigmoid_router_compile_without_graph_breaks():
    def total(x, counts, per_sequence):
        switch = switch_load_balancing_loss(x, counts, router="sigmoid_grouped_topk")
        return switch + sequence_load_balancing_loss(x.view(3, -1, 8), per_sequence, router="sigmoid_grouped_topk")

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9):
        x, counts = torch.randn(tokens, 8, requires_grad=True), (torch.arange(8), torch.arange(24).view(3, 8))
        got, want = compiled(x, *counts), total(x, *counts)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))


def test_z_loss_matches_its_definition():
    logits = (4 * torch.randn(5, 6, dtype=torch.float64)).requires_grad_()
    want = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 5
    assert float(router_z_loss(logits.detach())) == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(router_z_loss, logits)
    assert router_z_loss(logits[:0]) == 0
    assert router_z_loss(torch.full((2, 4), 300.0, dtype=torch.float16)).isfinite()
