"""SonicMoE's entry points against the definition, with its layouts, at the shapes of its own test table."""

from __future__ import annotations

from enum import Enum

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import supersonic_moe as sm
from supersonic_moe.integrations import sonicmoe

# T, H, I, E, K of SonicMoE's tests/moe_test.py
PUBLISHED = [
    (8192, 768, 256, 128, 8),
    (8192, 768, 512, 64, 4),
    (8192, 768, 1024, 32, 2),
    (8192, 1536, 256, 128, 8),
    (8192, 1536, 512, 64, 4),
    (8192, 1536, 1024, 32, 2),
    (8192, 4096, 256, 256, 16),
    (8192, 4096, 512, 128, 8),
    (8192, 4096, 1024, 64, 4),
    (8192, 4096, 512, 256, 16),
    (8192, 4096, 1024, 128, 8),
    (8192, 4096, 2048, 64, 4),
]


def weights(h: int, i: int, e: int, dtype: torch.dtype, device: str, fan: int = 2) -> list[Tensor]:
    """(x-sized router, w1, b1, w2, b2) as SonicMoE stores them, E first in memory."""
    torch.manual_seed(0)
    shapes = (e, h), (e, fan * i, h), (e, fan * i), (e, h, i), (e, h)
    return [(0.02 * torch.randn(s, dtype=dtype, device=device)).requires_grad_() for s in shapes]


def definition(
    x: Tensor, scores_TE: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, concat: bool
) -> Tensor:
    """Expert by expert; ``scores`` is 0 where a token does not have the expert. Weights are taken apart once: the
    gradient of ``w1[e]`` would be as large as w1, for each expert."""
    out = torch.zeros_like(x)
    nothing = [None] * w1.shape[0]
    biases = (nothing if b is None else b.unbind() for b in (b1, b2))
    for scores_T, w1_e, w2_e, b1_e, b2_e in zip(scores_TE.unbind(1), w1.unbind(), w2.unbind(), *biases, strict=True):
        rows = scores_T.nonzero().flatten()
        z = F.linear(x.index_select(0, rows), w1_e, b1_e)
        gate, up = z.chunk(2, -1) if concat else (z[:, 0::2], z[:, 1::2])
        y = F.linear(F.silu(gate) * up, w2_e, b2_e)
        out = out.index_add(0, rows, scores_T[rows, None] * y)
    return out


def scores_of(logits: Tensor, k: int, over_topk: bool, norm: bool) -> Tensor:
    """(T, E)"""
    values, ids = logits.topk(k, -1) if over_topk else logits.softmax(-1).topk(k, -1)
    values = values.softmax(-1) if over_topk else values / values.sum(-1, keepdim=True) if norm else values
    return torch.zeros_like(logits).scatter(1, ids, values)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """SonicMoE's own bounds say nothing at this scale; these are relative."""
    return oracle.rel_fro(got.detach(), want.detach()) < (1e-12 if dtype is torch.float64 else 1.2e-2)


@pytest.mark.parametrize("shape", PUBLISHED, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_published_shapes_an_eighth_as_wide(shape: tuple[int, ...], biased: bool) -> None:
    _, h, i, e, k = shape
    check(40, h // 8, i // 8, e // 8, max(1, k // 8), biased, torch.float64, "cpu")


@pytest.mark.gpu
@pytest.mark.xdist_group("large on a GPU")
@pytest.mark.parametrize("shape", PUBLISHED, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_published_shapes(shape: tuple[int, ...], biased: bool) -> None:
    check(*shape, biased, torch.bfloat16, "cuda")


def check(t: int, h: int, i: int, e: int, k: int, biased: bool, dtype: torch.dtype, device: str) -> None:
    router, w1, b1, w2, b2 = weights(h, i, e, dtype, device)
    x = torch.randn(t, h, dtype=dtype, device=device, requires_grad=True)
    given = (b1, b2) if biased else (None, None)
    leaves = [x, router, w1, w2, *(b for b in given if b is not None)]
    out, logits, frequency = sonicmoe.moe_TC_softmax_topk_layer(
        x, router, w1.permute(1, 2, 0), given[0], w2.permute(1, 2, 0), given[1], k, 0
    )
    assert close(logits, F.linear(x.double(), router.double()), dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_logits = F.linear(exact[0], exact[1])
    ids = logits.detach().sort(descending=True, stable=True).indices[:, :k]  # of equal ones the lower expert
    chosen = exact_logits.gather(1, ids)
    given_logits = logits.detach().double().gather(1, ids)
    values = (chosen + (given_logits - chosen).detach()).softmax(-1)  # those given, with the gradient of the exact ones
    scores = torch.zeros_like(exact_logits).scatter(1, ids, values)
    biases = (exact[4], exact[5]) if biased else (None, None)
    want = definition(exact[0], scores, exact[2], biases[0], exact[3], biases[1], concat=False)
    assert close(out, want, dtype)
    assert torch.equal(frequency, (scores > 0).sum(0).to(torch.int32))
    dout = torch.randn_like(x)
    got_grads = torch.autograd.grad(out, leaves, dout)
    want_grads = torch.autograd.grad(want, exact, dout.double())
    assert all(close(got, wanted, dtype) for got, wanted in zip(got_grads, want_grads, strict=True))


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize(("over_topk", "norm"), [(True, False), (True, True), (False, False), (False, True)])
def test_softmax_before_and_after_topk_and_layouts(over_topk: bool, norm: bool, concat: bool) -> None:
    router, w1, b1, w2, b2 = weights(16, 8, 6, torch.float64, "cpu")
    x = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    out, _, _ = sonicmoe.moe_TC_softmax_topk_layer(
        x, 20 * router, w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2, 3, 0, "swiglu", False, over_topk, norm, concat
    )
    want = definition(x, scores_of(F.linear(x, 20 * router), 3, over_topk, norm), w1, b1, w2, b2, concat)
    leaves = [x, router, w1, b1, w2, b2]
    torch.testing.assert_close(out, want)
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want, leaves, dout))


class TheirActivationType(Enum):
    """An enum of another package with the same values."""

    SWIGLU = "swiglu"
    RELU_SQ = "relu_sq"


@pytest.mark.parametrize("concat", [True, False])
def test_general_routing(concat: bool) -> None:
    """Any number of experts a token, as token rounding and Transformers' backend give them; sentinels."""
    _, w1, b1, w2, b2 = weights(16, 8, 5, torch.float64, "cpu")
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 0, 0, 1, 3, 3, 4, 5, 5], dtype=torch.int32)
    experts = torch.tensor([4, 0, 1, 2, 2, 5, 5, 1, 0], dtype=torch.int32)
    scores = torch.rand(9, dtype=torch.float64, requires_grad=True)
    out, frequency = sonicmoe.moe_general_routing_inputs(
        x, scores, tokens, experts, w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2, 5, None,
        TheirActivationType.SWIGLU, False, concat,
    )  # fmt: skip
    kept = experts < 5
    dense = torch.zeros(6, 5, dtype=torch.float64)
    dense = dense.index_put((tokens[kept].long(), experts[kept].long()), scores[kept])
    want = definition(x, dense, w1, b1, w2, b2, concat)
    torch.testing.assert_close(out, want)
    leaves, dout = [x, scores, w1, b1, w2, b2], torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want, leaves, dout))
    assert frequency.tolist() == [2, 2, 2, 0, 1] and frequency.dtype is torch.int32


def test_the_call_of_transformers_own_integration() -> None:
    """By keyword, with the enum that it finds in ``kernel.enums``, in inference mode."""
    _, w1, _, w2, _ = weights(16, 8, 5, torch.float64, "cpu")
    x = torch.randn(6, 16, dtype=torch.float64)
    tokens = torch.arange(6, dtype=torch.int32).repeat_interleave(2)
    experts = torch.randint(5, (12,), dtype=torch.int32)
    scores = torch.rand(12, dtype=torch.float64)
    out, _ = sonicmoe.moe_general_routing_inputs(
        x, scores, tokens, experts, w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, E=5,
        activation_type=sonicmoe.enums.ActivationType.SWIGLU, is_inference_mode_enabled=True, concat_layout=True,
        stream_id=None,
    )  # fmt: skip
    assert not out.requires_grad
    want = sm.topk_experts(x, experts.view(6, 2), scores.view(6, 2), w1, w2, layout="gate_up")
    torch.testing.assert_close(out, want.detach())


def test_ungated_and_names() -> None:
    _, w1, _, w2, _ = weights(16, 8, 5, torch.float64, "cpu", fan=1)
    x, scores = torch.randn(4, 16, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    index = torch.arange(4, dtype=torch.int32)
    out, _ = sonicmoe.moe_general_routing_inputs(
        x, scores, index, index, w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, 5, 0, TheirActivationType.RELU_SQ
    )
    want = [w2[t] @ F.relu(w1[t] @ x[t]).square() for t in range(4)]
    torch.testing.assert_close(out, torch.stack(want))
    assert sonicmoe.is_glu("geglu") and not sonicmoe.enums.is_glu(TheirActivationType.RELU_SQ)
    assert sonicmoe.MoE is sm.MoE and sonicmoe.ActivationType is sm.ActivationType
    assert sonicmoe.KernelBackendMoE.sonicmoe is sm.KernelBackendMoE.auto


X, W1, W2 = torch.zeros(4, 16), torch.zeros(16, 16, 5), torch.zeros(16, 8, 5)
BAD = {
    "expert first": ({"w1": W1.permute(2, 0, 1), "w2": W2.permute(2, 0, 1)}, ValueError, r"w\.permute\(1, 2, 0\)"),
    "one expert": ({"w1": W1[:, :, 0]}, ValueError, r"w1 must have 3 dimensions \(2I, H, E\)"),
    "no w2": ({"w2": None}, TypeError, r"w2 must be a torch\.Tensor of shape \(H, I, E\)"),
    "no x": ({"x": None}, TypeError, r"x must be a torch\.Tensor"),
    "no activation": ({"activation_type": None}, TypeError, "activation_type must be an ActivationType or its name"),
    "constants": ({"activation_type": sm.Activation.gpt_oss()}, TypeError, "goes to topk_experts"),
    "another name": ({"activation_type": "SWISH"}, ValueError, "unknown activation 'SWISH'; choose one of swiglu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_sentence(name: str) -> None:
    changes, error, message = BAD[name]
    given = {"x": X, "w1": W1, "b1": None, "w2": W2, "b2": None, **changes}
    index = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(error, match=message):
        sonicmoe.moe_TC_softmax_topk_layer(router_w=torch.zeros(5, 16), K=2, **given)
    with pytest.raises(error, match=message):
        sonicmoe.moe_general_routing_inputs(
            router_scores=torch.ones(4), token_indices=index, expert_indices=index, E=5, **given
        )
