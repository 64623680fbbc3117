"""Every kind of bad input raises before any kernel, with the constraint, the value and the fix; one row each.

A row is (name, call, exception, words that the message must hold). ``ARGS`` are arguments that work; a row changes one
of them.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import supersonic_moe as sm
from supersonic_moe.kernels.interface import Into, Rows
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad

T, H, I, E, K = 6, 8, 4, 4, 2  # noqa: E741
X = torch.randn(T, H)
W1, W2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
ROUTER = torch.randn(E, H)
IDS, SCORES = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2], [3, 1]]), torch.rand(T, K)
TOKENS, EXPERTS, FLAT = torch.arange(T), torch.randint(E, (T,)), torch.rand(T)
OFFS = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
META = torch.device("meta")


def layer(**change):
    args = dict(x_TH=X, router_weight_EH=ROUTER, w1=W1, w2=W2, num_experts_per_tok=K) | change
    return sm.moe_layer(**args)


def topk(**change):
    args = dict(x_TH=X, topk_ids_TK=IDS, topk_scores_TK=SCORES, w1=W1, w2=W2) | change
    return sm.topk_experts(**args)


def triples(**change):
    args = dict(x_TH=X, token_indices_S=TOKENS, expert_indices_S=EXPERTS, scores_S=FLAT, w1=W1, w2=W2) | change
    return sm.routed_experts(**args)


def rows(**change):
    args = dict(x_RH=X, offs_E=OFFS, w1=W1, w2=W2) | change
    return sm.dispatched_experts(**args)


def moe(**change):
    args = dict(
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        intermediate_size=I,
        activation_function="swiglu",
        add_bias=False,
        std=0.02,
    )
    return sm.MoE(**(args | change))


def from_plan(**change):
    args = dict(x_TH=X, scores_S=SCORES.flatten(), plan=sm.plan_from_topk(IDS, E), w1=W1, w2=W2) | change
    return sm.experts_from_plan(**args)


def wgrad(out, **kwargs):
    offsets = torch.tensor([0, 1, 3, 3, 6], dtype=torch.int32)
    return grouped_mm_wgrad(Rows(X.bfloat16()), X.bfloat16(), offsets, Into(out, **kwargs))


def nan_logits():
    router = ROUTER.clone()
    router[0, 0] = float("nan")
    return layer(router_weight_EH=router, validate=True)


class NoExpertKernel(TorchDispatchMode):
    """Fails if an expert kernel is reached."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "experts_forward" not in str(func), "a kernel was reached"
        return func(*args, **(kwargs or {}))


BAD = [
    # x
    ("x not a tensor", lambda: layer(x_TH=[1.0]), TypeError, "x must be a torch.Tensor"),
    ("x rank", lambda: layer(x_TH=X[None]), ValueError, "x must have 2 dimensions"),
    ("x integer", lambda: layer(x_TH=X.int()), TypeError, "x must be bfloat16"),
    ("x fp8", lambda: layer(x_TH=X.to(torch.float8_e4m3fn)), TypeError, "x must be bfloat16"),
    ("x sparse", lambda: layer(x_TH=X.to_sparse()), TypeError, "x must be a dense tensor; got a sparse_coo tensor"),
    ("rows sparse", lambda: sm.grouped_linear(X.to_sparse(), W1, OFFS), TypeError, "x must be a dense tensor"),
    ("x sparse in the module", lambda: moe()(X.to_sparse()), TypeError, "hidden_states must be a dense tensor"),
    ("x jagged in the module", lambda: moe()(torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)), TypeError, r"got a nested tensor.*x\.values\(\)"),
    ("x nested", lambda: topk(x_TH=torch.nested.nested_tensor([X, X])), TypeError, r"x must be a dense tensor; got a nested tensor"),
    ("w1 sparse", lambda: topk(w1=W1.to_sparse()), TypeError, "w1 must be a dense tensor; got a sparse_coo tensor"),
    ("b1 sparse", lambda: topk(b1=torch.zeros(E, 2 * I).to_sparse()), TypeError, "b1 must be a dense tensor"),
    ("router weight sparse", lambda: layer(router_weight_EH=ROUTER.to_sparse_csr()), TypeError, "router_weight must be a dense tensor; got a sparse_csr tensor"),
    ("ids sparse", lambda: topk(topk_ids_TK=IDS.to_sparse()), TypeError, "topk_ids must be a dense tensor"),
    ("scores sparse", lambda: topk(topk_scores_TK=SCORES.to_sparse()), TypeError, "topk_scores must be a dense tensor"),
    ("token mask sparse", lambda: layer(token_mask_T=(X[:, 0] > 0).to_sparse()), TypeError, "token_mask must be a dense tensor"),
    ("offsets sparse", lambda: rows(offs_E=OFFS.to_sparse()), TypeError, "offs must be a dense tensor"),
    ("triples sparse", lambda: triples(expert_indices_S=EXPERTS.to_sparse()), TypeError, "expert_indices must be a dense tensor"),
    ("logits sparse", lambda: sm.router_z_loss(ROUTER.to_sparse()), TypeError, "router_logits must be a dense tensor"),
    ("x hidden size", lambda: layer(x_TH=X[:, :-1].contiguous()), ValueError, "last dimension of x"),
    # weights
    ("w1 rank", lambda: layer(w1=W1[0]), ValueError, "w1 must have 3 dimensions"),
    ("w1 dtype", lambda: layer(w1=W1.bfloat16()), TypeError, "w1 and x must have one dtype"),
    ("w2 dtype", lambda: topk(w2=W2.double()), TypeError, r"w2 and x must have one dtype.* Convert one with \.to\(dtype\)\.$"),
    ("w1 device", lambda: layer(w1=W1.to(META)), ValueError, "w1 and x must be on one device"),
    ("w2 device", lambda: rows(w2=W2.to(META)), ValueError, "w2 and x must be on one device"),
    ("w1 strides", lambda: layer(w1=torch.randn(2 * I, H, E).permute(2, 0, 1)), ValueError, "w1 must be contiguous"),
    ("w1 expanded", lambda: layer(w1=W1[:1].expand(E, -1, -1)), ValueError, "expanded view"),
    ("w1 transposed without the view", lambda: layer(w1=torch.randn(E, H, 2 * I + 2)), ValueError, "w1 must have hidden size"),
    ("w1 not twice I", lambda: layer(w1=torch.randn(E, I, H)), ValueError, r"N1 \(second dimension\) 8 \(2 I for swiglu"),
    ("w1 gated size for an ungated activation", lambda: layer(activation="gelu"), ValueError, r"\(1 I for gelu"),
    ("w2 experts", lambda: layer(w2=W2[:-1]), ValueError, "w2 must have expert count 4"),
    ("w2 hidden size", lambda: layer(w2=W2[:, :-1]), ValueError, "w2 must have hidden size"),
    ("no experts", lambda: layer(w1=W1[:0], w2=W2[:0]), ValueError, "number of experts must be at least 1"),
    ("I is zero", lambda: layer(w1=W1[:, :0], w2=W2[:, :, :0]), ValueError, "I must be at least 1"),
    # biases
    ("b1 rank", lambda: layer(b1=torch.randn(2 * I)), ValueError, "b1 must have 2 dimensions"),
    ("b1 shape", lambda: layer(b1=torch.randn(E, I)), ValueError, r"b1 must have shape \(4, 8\)"),
    ("b2 shape", lambda: layer(b2=torch.randn(E, H + 1)), ValueError, r"b2 must have shape \(4, 8\)"),
    ("b2 dtype", lambda: layer(b2=torch.randn(E, H).half()), TypeError, "b2 and x must have one dtype"),
    # router
    ("router weight rank", lambda: layer(router_weight_EH=ROUTER[0]), ValueError, "router_weight must have 2 dimensions"),
    ("router weight experts", lambda: layer(router_weight_EH=ROUTER[:-1]), ValueError, "router_weight must have expert count 4"),
    ("router weight hidden size", lambda: layer(router_weight_EH=ROUTER[:, :-1]), ValueError, "router_weight must have hidden size 8"),
    ("router weight dtype", lambda: layer(router_weight_EH=ROUTER.double()), TypeError, "router_weight and x must have one dtype"),
    ("router weight dtype, the fix", lambda: layer(router_weight_EH=ROUTER.double()), TypeError, "router_dtype=torch.float32"),
    ("router dtype", lambda: layer(router_dtype=torch.int32), TypeError, "router_dtype must be a float dtype"),
    ("std", lambda: moe(std=-1), ValueError, "std must be finite and at least 0; got -1"),
    ("std of another type", lambda: moe(std="0.02"), TypeError, "std must be a number"),
    ("layers in a list", lambda: sm.update_correction_bias([moe()], 1e-3), TypeError, r"needs a torch.nn.Module; got list"),
    ("training of no model", lambda: sm.fp8_training(None).__enter__(), TypeError, r"needs a torch.nn.Module; got NoneType"),
    ("module dtype", lambda: moe(dtype=torch.float8_e4m3fn), TypeError, "dtype must be a float dtype; got torch.float8_e4m3fn"),
    ("group of counts", lambda: sm.update_correction_bias(moe(router="sigmoid_grouped_topk"), 1e-3, group="ep"), TypeError, r"group must be a process group.* got str \('ep'\)"),
    ("module router dtype", lambda: moe(router_dtype="fp32"), TypeError, "router_dtype must be a float dtype"),
    ("token mask", lambda: layer(token_mask_T=X[:, 0]), TypeError, "token_mask must be a bool tensor"),
    ("router weight device", lambda: layer(router_weight_EH=ROUTER.to(META)), ValueError, "one device"),
    ("unknown router", lambda: layer(router="softmax"), ValueError, "unknown router 'softmax'; choose one of softmax_after_topk"),
    ("router of another type", lambda: layer(router=3), TypeError, "unknown router 3"),
    ("K more than E", lambda: layer(num_experts_per_tok=E + 1), ValueError, "K = 5 with E = 4|E = 4.*5|5.*4"),
    ("K zero", lambda: layer(num_experts_per_tok=0), ValueError, "at least 1"),
    ("correction bias shape", lambda: layer(router="sigmoid_grouped_topk", correction_bias=torch.zeros(E + 1)), ValueError, "correction_bias"),
    ("correction bias without sigmoid", lambda: layer(correction_bias=torch.zeros(E)), ValueError, "correction_bias"),
    ("groups that do not divide E", lambda: layer(router=sm.SigmoidGroupedTopK(num_groups=3)), ValueError, "num_groups"),
    ("more groups kept than there are", lambda: sm.SigmoidGroupedTopK(num_groups=2, topk_groups=3), ValueError, "topk_groups must not exceed"),
    ("unknown rounding mode", lambda: sm.TokenRounding(mode="nearest"), ValueError, "unknown token rounding mode 'nearest'; choose one of NR-f"),
    ("rounding step past int64", lambda: layer(router=sm.TokenRounding(mode="SR-f", tile=2), rounding_step=2**63), ValueError, r"step must be below 2\*\*63"),
    ("rounding tile", lambda: sm.TokenRounding(tile=0), ValueError, "tile must be at least 1"),
    # activation, layout, backend, recipe
    ("unknown activation", lambda: layer(activation="swish"), ValueError, "unknown activation 'swish'; choose one of swiglu"),
    ("constants on the wrong activation", lambda: sm.Activation(sm.ActivationType.GELU, alpha=2.0), ValueError, "belong to swiglu"),
    ("clamp limit", lambda: sm.Activation.swiglu_clamped(-1.0), ValueError, "limit must be a positive finite number"),
    ("unknown layout", lambda: layer(layout="concat"), ValueError, "unknown gate/up layout 'concat'; choose one of interleaved"),
    ("unknown backend", lambda: layer(backend="cutlass"), ValueError, "unknown backend 'cutlass'; choose one of auto"),
    ("backend that cannot run", lambda: layer(backend="triton"), ValueError, "backend 'triton' cannot run this call"),
    ("unknown recipe", lambda: moe(recipe="fp8"), TypeError, "recipe must be None, a Bf16Recipe or an Fp8Recipe; got str"),
    ("FP8 of fp32", lambda: layer(recipe=sm.Fp8Recipe()), TypeError, "Fp8Recipe needs bfloat16 inputs and weights; got x as float32"),
    ("FP8 without its kernels", lambda: moe(recipe=sm.Fp8Recipe()).bfloat16()(X.bfloat16(), kernel_backend_moe=sm.KernelBackendMoE.triton), ValueError, "backend 'triton' cannot run an Fp8Recipe"),
    ("FP8 for a model without MoE", lambda: sm.fp8_training(torch.nn.Linear(2, 2)).__enter__(), ValueError, "fp8_training needs a model with at least one MoE layer; Linear has none"),
    ("FP8 training in BF16", lambda: sm.fp8_training(moe(), sm.Bf16Recipe()).__enter__(), TypeError, "fp8_training needs an Fp8Recipe; got Bf16Recipe"),
    # top-k tables
    ("ids rank", lambda: topk(topk_ids_TK=IDS[:, 0]), ValueError, "topk_ids must have 2 dimensions"),
    ("ids dtype", lambda: topk(topk_ids_TK=IDS.float()), TypeError, "topk_ids must be int32 or int64"),
    ("ids without choices", lambda: topk(topk_ids_TK=IDS[:, :0], topk_scores_TK=SCORES[:, :0]), ValueError, "at least one choice"),
    ("ids of other tokens", lambda: topk(topk_ids_TK=IDS[1:], topk_scores_TK=SCORES[1:]), ValueError, "one row per token"),
    ("ids device", lambda: topk(topk_ids_TK=IDS.to(META)), ValueError, "one device"),
    ("scores shape", lambda: topk(topk_scores_TK=SCORES[:, :1]), ValueError, "topk_scores must have the shape of topk_ids"),
    ("scores dtype", lambda: topk(topk_scores_TK=SCORES.int()), TypeError, "topk_scores must be bfloat16"),
    ("scores missing", lambda: topk(topk_scores_TK=None), TypeError, "topk_scores must be a torch.Tensor"),
    # triples
    ("triples of unequal length", lambda: triples(expert_indices_S=EXPERTS[:-1]), ValueError, "must have one length; got 6 and 5"),
    ("triple scores shape", lambda: triples(scores_S=FLAT[:-1]), ValueError, "scores must have the shape of token_indices"),
    ("triple indices dtype", lambda: triples(expert_indices_S=EXPERTS.short()), TypeError, "expert_indices must be int32 or int64"),
    # dispatched rows and plans
    ("offsets length", lambda: rows(offs_E=OFFS[:-1]), ValueError, "offs must have length 4"),
    ("offsets dtype", lambda: rows(offs_E=OFFS.float()), TypeError, "offs must be int32 or int64"),
    ("row scores length", lambda: rows(scores_R=FLAT[:-1]), ValueError, "scores must have length 6"),
    ("row scores rank", lambda: rows(scores_R=FLAT[:, None]), ValueError, "scores must have 1 dimensions"),
    ("no plan", lambda: from_plan(plan=None), TypeError, "plan must be a RoutingPlan; got NoneType"),
    ("plan of other experts", lambda: from_plan(plan=sm.plan_from_topk(IDS, E + 1)), ValueError, "plan must have num_experts 4"),
    ("plan of other tokens", lambda: from_plan(plan=sm.plan_from_topk(IDS[1:], E)), ValueError, "plan must have num_tokens 6"),
    ("plan scores", lambda: from_plan(scores_S=FLAT), ValueError, "scores must have length 12"),
    ("plan tile", lambda: sm.plan_from_topk(IDS, E, tile=0), ValueError, "tile must be at least 1"),
    ("plan experts not an integer", lambda: sm.plan_from_topk(IDS, 4.0), TypeError, "num_experts must be a positive integer"),
    ("plan capacity below zero", lambda: sm.plan_from_topk(IDS, E, capacity=-1), ValueError, "capacity must not be negative; got -1"),
    ("plan capacity with a fraction", lambda: sm.plan_from_topk(IDS, E, capacity=1.5), TypeError, "capacity must be a non-negative integer"),
    ("plan capacity past int32", lambda: sm.plan_from_topk(IDS.to(META), E, capacity=2**31), ValueError, r"capacity must stay below 2\*\*31"),
    ("plan tokens past int32", lambda: sm.plan_from_triples(TOKENS.to(META), EXPERTS.to(META), 2**31, E), ValueError, r"tokens must stay below 2\*\*31"),
    ("DeepEP probs shape", lambda: sm.plan_from_deepep(IDS, SCORES[1:], [3] * E), ValueError, "dispatched_probs must have the shape"),
    ("DeepEP negative count", lambda: sm.plan_from_deepep(IDS, SCORES, [-1, 1, 1, 1]), ValueError, "expert 0 has -1"),
    ("DeepEP counts with a fraction", lambda: sm.plan_from_deepep(IDS, SCORES, [2.5, 1, 0, 0]), TypeError, r"must hold integers; expert 0 has float \(2.5\)"),
    ("DeepEP float counts", lambda: sm.plan_from_deepep(IDS, SCORES, torch.ones(E)), TypeError, "tokens_per_expert must hold integers in one dimension"),
    ("DeepEP one count", lambda: sm.plan_from_deepep(IDS, SCORES, 3), TypeError, r"tokens_per_expert must be a sequence or a tensor of integers \(E,\); got int \(3\)"),
    ("DeepEP no counts", lambda: sm.plan_from_deepep(IDS, SCORES, None), TypeError, "tokens_per_expert must be a sequence"),
    ("rows past int32", lambda: sm.plan_from_topk(torch.empty(2**28, 8, dtype=torch.int32, device=META), E), ValueError, r"2\*\*31"),
    ("tile padding past int32", lambda: sm.plan_from_topk(torch.empty(2**27, 8, dtype=torch.int32, device=META), 2**20, tile=2048), ValueError, r"2\*\*31"),
    ("weight gradient added to bf16", lambda: wgrad(W1.bfloat16(), accumulate=True), TypeError, "accumulate adds to an fp32 out"),
    ("weight gradient added to nothing", lambda: wgrad(None, accumulate=True), TypeError, "accumulate adds to an fp32 out"),
    ("weight gradient of another shape", lambda: wgrad(W1[:, :1]), ValueError, r"out must be bfloat16 or float32 of shape \(4, 8, 8\)"),
    # the module
    ("module K more than E", lambda: moe(num_experts_per_tok=9), ValueError, "K = 9 with E = 4"),
    ("module size zero", lambda: moe(hidden_size=0), ValueError, "hidden_size must be at least 1"),
    ("module size not an integer", lambda: moe(intermediate_size=4.0), TypeError, "intermediate_size must be a positive integer"),
    ("module input width", lambda: moe()(X[:, :-1]), ValueError, "hidden_states must have last dimension 8"),
    ("module inference flag", lambda: moe()(X, is_inference_mode="no"), TypeError, r"is_inference_mode must be True or False; got str \('no'\)"),
    ("router size", lambda: sm.Router(0, E, 0.1), ValueError, "hidden_size must be at least 1"),
    ("router logits dtype", lambda: sm.Router(H, E, 0.1, logits_dtype="fp32"), TypeError, "logits_dtype must be a float dtype"),
    ("experts bias", lambda: sm.Experts(E, H, I, None, 0.1), TypeError, "add_bias must be True or False"),
    ("module flags", lambda: moe(accumulate_into_main_grad="no"), TypeError, "accumulate_into_main_grad must be True or False"),
    ("module validate", lambda: moe(validate=None), TypeError, "validate must be True or False; got NoneType"),
    ("module flag set later", lambda: [m := moe(), setattr(m, "accumulate_into_main_grad", 1), m(X)], TypeError, "accumulate_into_main_grad must be True or False"),
    ("module input not a tensor", lambda: moe()(None), TypeError, "hidden_states must be a tensor"),
    ("module backend", lambda: moe()(X, kernel_backend_moe="scattermoe"), ValueError, "unknown kernel_backend_moe 'scattermoe'; choose one of KernelBackendMoE.auto"),
    # what only device data can show
    ("validate: NaN logits", nan_logits, ValueError, r"router logits must not be NaN; got nan at index \(0, 0\)"),
    ("validate: repeated id", lambda: topk(topk_ids_TK=IDS * 0 + 1, validate=True), ValueError, "must not name an expert twice; got 1"),
    ("validate: id out of range", lambda: topk(topk_ids_TK=IDS * 0 + 9, validate=True), ValueError, r"must lie in \[-1, 4\]"),
    ("validate: infinite score", lambda: topk(topk_scores_TK=SCORES / 0, validate=True), ValueError, "topk_scores must be finite"),
    ("validate: token out of range", lambda: triples(token_indices_S=TOKENS + 1, validate=True), ValueError, r"must lie in \[0, 6\); got 6 at index 5"),
    ("validate: repeated pair", lambda: triples(token_indices_S=TOKENS * 0, expert_indices_S=EXPERTS * 0, validate=True), ValueError, "come twice"),
    ("validate: offsets past the rows", lambda: rows(offs_E=OFFS * 2, validate=True), ValueError, r"offs must lie in \[0, 6\]"),
    ("validate: offsets that decrease", lambda: rows(offs_E=OFFS.flip(0), validate=True), ValueError, "offs must not decrease"),
    ("validate: DeepEP counts", lambda: sm.plan_from_deepep(IDS * 0, SCORES, [1, 0, 0, 0], validate=True), ValueError, "twice|must not be less than the number of ids"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_raises_with_a_full_sentence(call, error, words):
    with NoExpertKernel(), pytest.raises(error, match=words) as caught:
        call()
    message = str(caught.value)
    assert len(message) > 25
    assert message.endswith(".")


def test_good_arguments_are_good():
    """The table starts from calls that work; a check that rejects everything would pass it otherwise."""
    for call in (layer, topk, triples, rows, from_plan):
        call(validate=True) if call is not from_plan else call()
    moe()(X)


def test_without_validate_bad_ids_are_skipped_and_nan_stays_in_its_token():
    ids = IDS.clone()
    ids[0] = torch.tensor([-3, E + 100])
    out = topk(topk_ids_TK=ids)
    assert (out[0] == 0).all()
    x = X.clone()
    x[2] = float("nan")
    out = layer(x_TH=x).output
    assert out[2].isnan().all()
    good = layer().output
    others = [t for t in range(T) if t != 2]
    torch.testing.assert_close(out[others], good[others])
