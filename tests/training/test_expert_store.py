"""``ExpertStore`` as another adapter would use it: parameters one by one, a public function on the stacked copies. The
life of a step in all its forms is tested through ``SonicMoEMlpNode`` (``tests/integrations``).
"""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn

from supersonic_moe import routed_experts, topk_experts
from supersonic_moe.config.activation import Activation, ActivationType
from supersonic_moe.config.recipe import Bf16Recipe
from supersonic_moe.training.expert_store import ExpertStore, ExpertWeights

E, H, I, T = 3, 16, 8, 5  # noqa: E741
SWIGLU = Activation(ActivationType.SWIGLU)


def parameters(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    shapes = {"w1": (2 * I, H), "w2": (H, I)}
    made = {
        which: [nn.Parameter(torch.randn(shape).to(dtype) / 4) for _ in range(E)] for which, shape in shapes.items()
    }
    for p in made["w1"] + made["w2"]:
        p.main_grad = torch.randn(p.shape)
    return made


def forward(w1: torch.Tensor, w2: torch.Tensor, **options: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x, scores = torch.randn(T, H, generator=g), torch.rand(T, generator=g)
    tokens, ids = torch.arange(T), torch.tensor([0, 2, 2, 0, 2])  # expert 1 gets nothing
    return routed_experts(x, tokens, ids, scores, w1, w2, activation=SWIGLU, layout="gate_up", **options)


def test_gradients_of_two_passes_reach_every_main_grad():
    weights = parameters()
    before = {which: [p.main_grad.clone() for p in ps] for which, ps in weights.items()}
    leaves = {which: torch.stack([p.detach() for p in ps]).requires_grad_() for which, ps in weights.items()}
    expected = torch.autograd.grad(2 * forward(leaves["w1"], leaves["w2"]).square().sum(), list(leaves.values()))

    store = ExpertStore("Trainer", H, I, SWIGLU, transposed=False)
    for _ in range(2):
        copies = store.copies(lambda: weights, torch.device("cpu"), Bf16Recipe())
        assert torch.equal(copies.w1, leaves["w1"]) and torch.equal(copies.w2, leaves["w2"])
        out = forward(copies.w1, copies.w2, accumulate_into_main_grad=True)
        store.after_forward(copies, out)
        out.square().sum().backward()
    assert all(torch.equal(p.main_grad, b) for w in weights for p, b in zip(weights[w], before[w], strict=True))
    store.step(lambda: weights)
    for which, gradient in zip(weights, expected, strict=True):
        added = torch.stack([p.main_grad - b for p, b in zip(weights[which], before[which], strict=True)])
        assert oracle.rel_fro(added, gradient) < 1e-5 and not added[1].any() and added[0].any()


@pytest.mark.parametrize("alone", [False, True], ids=["backward", "dx alone"])
@pytest.mark.parametrize("convention", ["overwrite_main_grad", "get_main_grad", "bf16"])
def test_main_grads_as_megatron_has_them(convention, alone):
    """Any pass adds, also one for dx alone: nobody but the store could ask for the gradients of its copies."""
    dtype = torch.bfloat16 if convention == "bf16" else torch.float32

    def step(weights):
        store = ExpertStore("Trainer", H, I, SWIGLU, transposed=False)
        copies = store.copies(lambda: weights, torch.device("cpu"), Bf16Recipe())
        x = torch.linspace(-1, 1, T * H).view(T, H).to(dtype).requires_grad_()
        ids, scores = torch.tensor([[0], [2], [2], [0], [2]]), torch.ones(T, 1)
        out = topk_experts(x, ids, scores, copies.w1, copies.w2, layout="gate_up", accumulate_into_main_grad=True)
        store.after_forward(copies, out)
        torch.autograd.grad(out.float().sum(), x) if alone else out.float().sum().backward()
        store.step(lambda: weights)

    weights, buffers, want = parameters(dtype), [], []
    for p in (every := weights["w1"] + weights["w2"]):
        p.main_grad.zero_()
    step(weights)
    for p in every:
        start = torch.randn(p.shape).to(dtype)
        want.append(p.main_grad + (0 if convention == "overwrite_main_grad" else start))
        buffers.append(start)
        p.main_grad, p.overwrite_main_grad = start, convention == "overwrite_main_grad"
        if convention == "get_main_grad":
            p.main_grad, p.get_main_grad = None, lambda start=start: start
    step(weights)
    assert all(torch.equal(got, w.to(dtype)) for got, w in zip(buffers, want, strict=True))
    assert buffers[0].any() and buffers[3].any()


def test_errors_name_the_owner():
    weights = parameters()
    store = ExpertStore("Trainer", H, I, SWIGLU, transposed=False)
    copies = store.copies(lambda: weights, torch.device("cpu"), Bf16Recipe())
    out = forward(copies.w1, copies.w2, accumulate_into_main_grad=True)
    store.after_forward(copies, out)
    optimizer = torch.optim.SGD(weights["w1"], lr=0.1)
    with pytest.raises(RuntimeError, match=r"step\(\) of the Trainer must come before SGD\.step\(\)"):
        optimizer.step()
    store.discard()
    optimizer.step()
