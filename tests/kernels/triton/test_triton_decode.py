"""The kernels of decode against fp64 loops over slots. Weights of experts that are not hit hold NaN; so do fresh
outputs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from oracle import rel_fro
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.activation import Activation, GateUpLayout, as_activation
from supersonic_moe.functional import topk_experts
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.kernels.reference.activation import activation_forward
from supersonic_moe.kernels.triton.decode import decode

GATE_UP, UP_GATE, INTERLEAVED = GateUpLayout.GATE_UP, GateUpLayout.UP_GATE, GateUpLayout.INTERLEAVED
SWIGLU, RELU = as_activation("swiglu"), as_activation("relu")


class Case(NamedTuple):
    ids: list[list[int]]
    experts: int
    gate: Gate
    dtype: torch.dtype = torch.bfloat16
    turned: bool = False
    biased: bool = False


HOT = [[1, t % 3 - 1] for t in range(19)]
"""Expert 1 has more rows than are multiplied at a time; 2 has none, and a third of the second choices nobody."""
CASES = {
    "one token": Case([[5, 0, 6, 3]], 8, Gate(SWIGLU, GATE_UP)),
    "fewer slots than experts": Case([[5, 0], [7, 5], [2**40, 5], [-1, 0]], 16, Gate(SWIGLU, UP_GATE), biased=True),
    "more slots than experts": Case(HOT, 3, Gate(as_activation("geglu_tanh"), INTERLEAVED), torch.float16, biased=True),
    "a token that names an expert twice": Case([[4, 4, 2], [4, 2, 4]], 9, Gate(as_activation("reglu"), GATE_UP)),
    "gpt-oss": Case(HOT[:6], 32, Gate(Activation.gpt_oss(limit=0.8), INTERLEAVED), turned=True, biased=True),
    "relu^2, turned": Case([[3, 1], [1, 0]], 5, Gate(as_activation("relu_sq"), GATE_UP), torch.float16, turned=True),
    "more slots than are looked at at a time": Case([[1, -1], *[[-1, 5]] * 140, [1, 2]], 3, Gate(SWIGLU, GATE_UP)),
}


def operands(case: Case, device: torch.device, hidden: int = 200, width: int = 72) -> tuple[Tensor, ...]:
    """x, ids, scores, w1, b1, w2, b2"""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device) / shape[-1] ** 0.5

    ids = torch.tensor(case.ids, device=device)
    num_experts, fan = case.experts, case.gate.activation.fan
    w1, w2 = normal(num_experts, fan * width, hidden), normal(num_experts, hidden, width)
    cold = [e for e in range(num_experts) if e not in ids]
    w1[cold], w2[cold] = torch.nan, torch.nan
    if case.turned:
        w1, w2 = w1.mT.contiguous().mT, w2.mT.contiguous().mT
    x, scores = torch.randn(len(ids), hidden, device=device), torch.randn(ids.shape, device=device)
    b1, b2 = normal(num_experts, fan * width), normal(num_experts, hidden)
    x, w1, b1, w2, b2 = (t.to(case.dtype) for t in (x, w1, b1, w2, b2))
    return x, ids, scores.to(case.dtype), w1, b1 if case.biased else None, w2, b2 if case.biased else None


def test_rows_of_weights_may_lie_2_to_31_elements_apart(device: torch.device) -> None:
    """4 GB of addresses, of which a CPU touches the rows only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        w = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device).as_strided((1, 257, 8), (0, 2**23, 1))
    w.copy_(torch.randn(w.shape, device=device))
    x, ids, gate = (
        torch.randn(2, 8, device=device).bfloat16(),
        torch.tensor([[0], [-1]], device=device),
        Gate(RELU, GATE_UP),
    )
    scores = torch.ones(2, 1, device=device)
    got = decode(x, ids, scores, w, None, w.mT, None, gate)
    near = w.contiguous()
    assert torch.equal(got, decode(x, ids, scores, near, None, near.clone().mT, None, gate))


def exact(x: Tensor, ids: Tensor, scores: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gate: Gate) -> Tensor:
    """In fp64, slot by slot."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            if 0 <= e < w1.shape[0]:
                z = w1[e].double() @ x[t].double() + (0 if b1 is None else b1[e].double())
                a = activation_forward(z[None], None, z.new_zeros(1, dtype=torch.int32), gate)[0]
                y = w2[e].double() @ a + (0 if b2 is None else b2[e].double())
                out[t] += scores[t, j].double() * y
    return out


@pytest.mark.parametrize("name", CASES)
def test_decode(name: str, device: torch.device) -> None:
    case = CASES[name]
    given = operands(case, device)
    got = decode(*given, case.gate)
    assert got.dtype is case.dtype
    bound = 8e-3 if case.dtype is torch.bfloat16 else 8e-4  # two roundings; the interpreter truncates to bf16
    assert rel_fro(got.cpu(), exact(*given, case.gate).cpu()) < bound


def test_a_token_does_not_depend_on_the_others(device: torch.device) -> None:
    case = CASES["gpt-oss"]
    x, ids, scores, *weights = operands(case, device)
    together = decode(x, ids, scores, *weights, case.gate)
    alone = [decode(x[t : t + 1], ids[t : t + 1], scores[t : t + 1], *weights, case.gate) for t in range(len(x))]
    assert torch.equal(torch.cat(alone), together)


def test_no_tokens(device: torch.device) -> None:
    case = CASES["one token"]
    x, ids, scores, *weights = operands(case, device)
    assert decode(x[:0], ids[:0], scores[:0], *weights, case.gate).shape == (0, x.shape[1])
    assert not decode(x, ids[:, :0], scores[:, :0], *weights, case.gate).any()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("name", ["one token", "gpt-oss"])
def test_decode_in_real_sizes(name: str, tokens: int) -> None:
    """Qwen3-30B-A3B and gpt-oss-20b, beside the layer's own kernels."""
    (hidden, width, num_experts, k) = {"one token": (2048, 768, 128, 8), "gpt-oss": (2880, 2880, 32, 4)}[name]
    ids = torch.rand(tokens, num_experts).topk(k).indices.tolist()
    case = CASES[name]._replace(ids=ids, experts=num_experts)
    x, ids_TK, scores, w1, b1, w2, b2 = operands(case, torch.device("cuda"), hidden, width)
    got = decode(x, ids_TK, scores, w1, b1, w2, b2, case.gate)
    activation, layout = case.gate
    layer = topk_experts(x, ids_TK, scores, w1, w2, b1=b1, b2=b2, activation=activation, layout=layout, inference=True)
    assert rel_fro(got, layer) < 5e-3
