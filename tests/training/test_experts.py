"""Experts against the per-token definition in fp64: values and every gradient, for each activation, layout, bias and
routing.
"""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch

import supersonic_moe as sm
from supersonic_moe import Activation, ActivationType, GateUpLayout
from supersonic_moe.kernels import reference

T, H, I, E, K = 7, 5, 3, 4, 2  # noqa: E741

ACTIVATIONS = [*(Activation(a) for a in ActivationType), Activation.gpt_oss(limit=0.9), Activation.swiglu_clamped(0.7)]
CASES = [(a, lo) for a in ACTIVATIONS for lo in (GateUpLayout if a.gated else [GateUpLayout.INTERLEAVED])]
BIASES = list(itertools.product((False, True), repeat=2))
ROUTERS = [
    sm.SoftmaxAfterTopK(),
    sm.SoftmaxBeforeTopK(),
    sm.SoftmaxBeforeTopK(renormalize=True),
    sm.SigmoidGroupedTopK(num_groups=2, topk_groups=1),
]


def case_name(value):
    if isinstance(value, Activation):
        return value.type.value + ("" if value.limit is None else f"_limit{value.limit}_offset{value.up_offset}")
    if isinstance(value, tuple):
        return "b1b2"[: 2 * value[0]] + "b2" * value[1] or "nobias"
    return getattr(value, "value", type(value).__name__ + ("_renorm" if getattr(value, "renormalize", False) else ""))


def naive_scores(logits, ids, router):
    """Scores of the chosen ids, one token at a time, for autograd."""
    rows = []
    for logit, chosen in zip(logits, ids.long(), strict=True):
        if isinstance(router, sm.SoftmaxAfterTopK):
            rows.append(torch.softmax(logit[chosen], 0))
        elif isinstance(router, sm.SoftmaxBeforeTopK):
            p = torch.softmax(logit, 0)[chosen]
            rows.append(p / p.sum() if router.renormalize else p)
        else:
            p = torch.sigmoid(logit)[chosen]
            rows.append((p / p.sum() if router.renormalize else p) * router.scaling_factor)
    return torch.stack(rows)


def assert_same(got, want, what):
    assert got.shape == want.shape, what
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-10), f"{what}: max error {(got - want).abs().max():.3e}"


@pytest.mark.parametrize("router", ROUTERS, ids=case_name)
@pytest.mark.parametrize("bias", BIASES, ids=case_name)
@pytest.mark.parametrize(("activation", "layout"), CASES, ids=case_name)
def test_layer_matches_definition(activation, layout, bias, router):
    w1, b1, w2, b2 = oracle.weights(E, H, I, activation.fan, bias=bias)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    router_w = torch.randn(E, H, dtype=torch.float64, requires_grad=True)
    leaves = [t for t in (x, router_w, w1, b1, w2, b2) if t is not None]
    dout = torch.randn(T, H, dtype=torch.float64)

    got = sm.moe_layer(x, router_w, w1, w2, K, b1=b1, b2=b2, router=router, activation=activation, layout=layout)
    got_grads = torch.autograd.grad(got.output, leaves, dout)

    logits = x @ router_w.T
    _, ids = sm.route(logits.detach(), K, router)
    want = oracle.experts(
        x, oracle.topk_triples(ids, naive_scores(logits, ids, router), E), w1, b1, w2, b2, activation, layout
    )
    want_grads = torch.autograd.grad(want, leaves, dout)

    assert_same(got.output, want, "output")
    assert_same(got.router_logits, logits, "router_logits")
    assert got.expert_counts.tolist() == torch.bincount(ids.flatten().long(), minlength=E).tolist()
    for name, g, w in zip(("x", "router_w", "w1", "b1", "w2", "b2"), got_grads, want_grads, strict=False):
        assert_same(g, w, f"gradient {name}")


@pytest.mark.parametrize(("activation", "layout"), CASES, ids=case_name)
def test_gradcheck(activation, layout):
    w1, b1, w2, b2 = oracle.weights(3, 3, 2, activation.fan)  # small: two forwards for every element
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(3, K, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 2], [2, 1], [0, 1]])

    def layer(x, scores, w1, b1, w2, b2):
        return sm.topk_experts(x, ids, scores, w1, w2, b1=b1, b2=b2, activation=activation, layout=layout)

    assert torch.autograd.gradcheck(layer, (x, scores, w1, b1, w2, b2))


@pytest.mark.parametrize("bias", BIASES, ids=case_name)
def test_masked_ids_and_triples_agree_with_definition(bias):
    """Skipped ids, tokens without experts, repeated experts, triples in any order: one definition for all."""
    act, layout = Activation(ActivationType.SWIGLU), GateUpLayout.GATE_UP
    w1, b1, w2, b2 = oracle.weights(E, H, I, 2, bias=bias)
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, -1, 3], [-1, -1, -1], [2, 2, 0], [E, 1, 0], [3, -7, E + 5]])
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    leaves = [t for t in (x, scores, w1, b1, w2, b2) if t is not None]
    dout = torch.randn(5, H, dtype=torch.float64)
    want = oracle.experts(x, oracle.topk_triples(ids, scores, E), w1, b1, w2, b2, act, layout)
    want_grads = torch.autograd.grad(want, leaves, dout)

    def same_as_definition(out):
        assert_same(out, want, "output")
        for g, w in zip(torch.autograd.grad(out, leaves, dout), want_grads, strict=True):
            assert_same(g, w, "gradient")

    kwargs = dict(b1=b1, b2=b2, activation=act, layout=layout)
    same_as_definition(sm.topk_experts(x, ids, scores, w1, w2, **kwargs))
    shuffle = torch.randperm(15)
    tokens = torch.arange(5).repeat_interleave(3)
    same_as_definition(
        sm.routed_experts(x, tokens[shuffle], ids.flatten()[shuffle], scores.flatten()[shuffle], w1, w2, **kwargs)
    )
    for tile in (1, 4):
        plan = sm.plan_from_topk(ids, E, tile=tile)
        same_as_definition(sm.experts_from_plan(x, scores.flatten(), plan, w1, w2, **kwargs))


def test_nan_token_reaches_no_weight_through_padding():
    """Padding reads no token, so a NaN in an unrouted token leaves every gradient finite."""
    w1, b1, w2, b2 = oracle.weights(E, H, I, 2)
    x = torch.randn(3, H, dtype=torch.float64)
    x[0] = float("nan")
    x.requires_grad_()
    plan = sm.plan_from_topk(torch.tensor([[-1], [2], [2]]), E, tile=8)
    out = sm.experts_from_plan(x, torch.ones(3, dtype=torch.float64), plan, w1, w2, b1=b1, b2=b2)
    grads = torch.autograd.grad(out.sum(), (x, w1, b1, w2, b2))
    assert out.isfinite().all()
    assert (out[0] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0] == 0).all()


@pytest.mark.parametrize("scored", [False, True])
def test_dispatched_rows(scored):
    act, layout = Activation(ActivationType.GEGLU), GateUpLayout.UP_GATE
    w1, b1, w2, b2 = oracle.weights(E, H, I, 2)
    x = torch.randn(9, H, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(9, dtype=torch.float64, requires_grad=True) if scored else None
    offs = torch.tensor([3, 3, 4, 7], dtype=torch.int32)
    experts = [0, 0, 0, 2, 3, 3, 3]
    triples = [(r, e, scores[r] if scored else 1.0) for r, e in enumerate(experts)]
    leaves = [x, w1, b1, w2, b2] + ([scores] if scored else [])
    dout = torch.randn(9, H, dtype=torch.float64)
    got = sm.dispatched_experts(x, offs, w1, w2, scores_R=scores, b1=b1, b2=b2, activation=act, layout=layout)
    want = oracle.experts(x, triples, w1, b1, w2, b2, act, layout)
    assert_same(got, want, "output")
    assert (got[7:] == 0).all()
    for g, w in zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, leaves, dout), strict=True):
        assert_same(g, w, "gradient")


def test_transposed_weights_are_views_with_the_same_result():
    x = torch.randn(T, H, dtype=torch.float64)
    ids, scores = torch.randint(E, (T, K)), torch.rand(T, K, dtype=torch.float64)
    w1, _, w2, _ = oracle.weights(E, H, I, 2, bias=(False, False))
    w1_t = w1.detach().transpose(1, 2).contiguous().requires_grad_()
    w2_t = w2.detach().transpose(1, 2).contiguous().requires_grad_()
    want = sm.topk_experts(x, ids, scores, w1, w2)
    got = sm.topk_experts(x, ids, scores, w1_t.transpose(1, 2), w2_t.transpose(1, 2))
    assert_same(got, want, "output")
    for g, w in zip(
        torch.autograd.grad(got.sum(), (w1_t, w2_t)), torch.autograd.grad(want.sum(), (w1, w2)), strict=True
    ):
        assert_same(g, w.transpose(1, 2), "gradient")
        assert g.is_contiguous(), "autograd copies a gradient of other strides than its parameter's"


def test_no_tokens():
    w1, b1, w2, b2 = oracle.weights(E, H, I, 2)
    x = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    out = sm.moe_layer(x, torch.randn(E, H, dtype=torch.float64), w1, w2, K, b1=b1, b2=b2).output
    assert out.shape == (0, H)
    for g in torch.autograd.grad(out.sum(), (x, w1, b1, w2, b2)):
        assert (g == 0).all()


def test_frozen_weights_cost_no_weight_gradient():
    """Only what needs a gradient is computed: with frozen weights the op returns empty tensors in their place."""
    w1, b1, w2, b2 = (t.detach() for t in oracle.weights(E, H, I, 2))
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    ids, scores = torch.randint(E, (T, K)), torch.rand(T, K, dtype=torch.float64)
    out = sm.topk_experts(x, ids, scores, w1, w2, b1=b1, b2=b2)
    (dx,) = torch.autograd.grad(out.sum(), (x,))
    x2 = x.detach().requires_grad_()
    want = oracle.experts(
        x2,
        oracle.topk_triples(ids, scores, E),
        w1,
        b1,
        w2,
        b2,
        Activation(ActivationType.SWIGLU),
        GateUpLayout.INTERLEAVED,
    )
    assert_same(dx, torch.autograd.grad(want.sum(), (x2,))[0], "dx")


def test_repeats_are_bit_exact():
    w1, b1, w2, b2 = oracle.weights(8, 16, 8, 2, dtype=torch.float32)
    x = torch.randn(50, 16, requires_grad=True)
    ids, scores = torch.randint(8, (50, 3)), torch.rand(50, 3, requires_grad=True)

    def run():
        out = sm.topk_experts(x, ids, scores, w1, w2, b1=b1, b2=b2)
        return out, *torch.autograd.grad(out.square().sum(), (x, scores, w1, b1, w2, b2))

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


# ---- what callers bring ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_dtype", "read"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_kernels_read_scores_of_any_dtype_in_that_of_their_sums(given, x_dtype, read, monkeypatch):
    """Megatron's moe_router_dtype="fp64": no kernel may get fp64 scores beside bf16 experts. Gradients come back as
    the scores came.
    """
    w1, _, w2, _ = oracle.weights(E, H, I, 2, bias=(False, False), dtype=x_dtype)
    x, ids = torch.randn(T, H, dtype=x_dtype), torch.randint(E, (T, K))
    scores, seen, pick = torch.rand(T, K).to(given).requires_grad_(), set(), reference.pick
    monkeypatch.setattr(reference, "pick", lambda values, *rest: seen.add(values.dtype) or pick(values, *rest))
    out = sm.topk_experts(x, ids, scores, w1, w2)
    out.sum().backward()
    assert seen == {read} and scores.grad.dtype == given
    assert torch.equal(out, sm.topk_experts(x, ids, scores.to(read), w1, w2))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sm90", "triton"])
def test_gpu_fp64_scores_beside_bf16_experts(backend):
    w1, _, w2, _ = oracle.weights(E, 64, 32, 2, bias=(False, False), dtype=torch.bfloat16, device="cuda")
    x, ids = torch.randn(T, 64, dtype=torch.bfloat16, device="cuda"), torch.randint(E, (T, K), device="cuda")
    scores, results = torch.rand(T, K, dtype=torch.float64, device="cuda", requires_grad=True), []
    for given in (scores, scores.detach().float().requires_grad_()):
        out = sm.topk_experts(x, ids, given, w1, w2, backend=backend)
        results.append([out, *torch.autograd.grad(out.sum(), (given, w1, w2))])
    assert results[0][1].dtype == torch.float64
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("needs_x", [False, True])
def test_an_input_without_gradient_pays_for_none(needs_x, monkeypatch):
    """The first layer, a frozen trunk: x reaches the experts past the router, whose weight needs a gradient."""
    moe, products = sm.MoE(E, K, H, I, "swiglu", False, 0.5), []
    x, product = torch.randn(T, H, requires_grad=needs_x), reference.grouped_mm
    out, aux = moe(x)
    monkeypatch.setattr(reference, "grouped_mm", lambda *a: products.append("dX") or product(*a))  # dA has its own
    (out.square().sum() + aux).backward()
    assert products == ["dX"] * needs_x
    assert moe.router.weight.grad.abs().sum() > 0 and moe.c_fc.weight.grad.abs().sum() > 0
