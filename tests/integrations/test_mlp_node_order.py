"""What ``SonicMoEMlpNode`` refuses: passes in the wrong order, weights that change in between, bad input. Whatever it
refuses, no gradient is lost or added twice.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from trainer_experts import (
    E,
    Expert,
    H,
    I,
    add_in_place,
    batch32,
    looped,
    mains,
    make_experts,
    move_away_and_back,
    received,
    run,
    small,
    swap_data,
)

from supersonic_moe import GateUpLayout, SonicMoEMlpNode
from supersonic_moe.config.activation import as_activation
from supersonic_moe.training import expert_store

# ---- order -----------------------------------------------------------------------------------------------------------


def test_step_waits_for_every_backward():
    (node, weights), batches = small(), [batch32(seed=i) for i in range(3)]
    outs = [node(*b) for b in batches]
    outs[1].sum().backward()
    with pytest.raises(RuntimeError, match=r"2 forward passes still wait.*torch\.no_grad.*discard"):
        node.step()
    assert not weights[0].main_grad.any()
    outs[0].sum().backward()
    outs.pop()  # a forward that nobody needs any more
    node.step()
    assert weights[0].main_grad.any()
    node.step()  # nothing to do
    with torch.no_grad():
        node(*batches[0])
    node.step()


def test_backward_after_step_is_refused():
    (node, weights), batch = small(), batch32()
    out = node(*batch)
    out.sum().backward(retain_graph=True)
    node.step()
    first = mains(weights)
    with pytest.raises(RuntimeError, match=r"backward must come before step\(\).*Run forward again"):
        out.sum().backward()
    node.step()
    assert all(torch.equal(w.main_grad, g) for w, g in zip(weights, first, strict=True))


def test_discard_forgets_and_starts_again():
    (node, weights), batch = small(), batch32()
    run(node, batch)
    waiting = node(*batch)
    add_in_place(weights[0])
    node.discard()
    with pytest.raises(RuntimeError, match=r"step\(\) or discard\(\)"):
        waiting.sum().backward()
    node.step()
    assert not any(w.main_grad.any() for w in weights)
    run(node, batch)
    node.step()
    assert weights[0].main_grad.any()


def replace(w, node):
    node.experts[1].linear_fc1.weight = nn.Parameter(w.detach().clone())


CHANGES = {
    "in place": lambda w, node: add_in_place(w),
    "another storage": lambda w, node: swap_data(w),
    "another storage at the same address": lambda w, node: move_away_and_back(w),
    "frozen": lambda w, node: w.requires_grad_(False),
    "another parameter": replace,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("then", ["forward", "backward", "step"])
def test_weights_that_change_in_the_middle_of_a_step_are_noticed(then, change):
    (node, weights), batch = small(), batch32()
    out = node(*batch)
    if then != "backward":
        out.sum().backward()
    change(weights[1], node)
    calls = {"forward": lambda: node(*batch), "backward": lambda: out.sum().backward(), "step": node.step}
    if change is replace and then != "step":  # the pass is that of the old weight; step() refuses its gradient
        calls[then]()
        del out
        then = "step"
    with pytest.raises(RuntimeError, match=r"w1 of experts\[1\] has changed while gradients are under way.*discard"):
        calls[then]()
    assert not any(w.main_grad.any() for w in weights)


@pytest.mark.parametrize("waits", [False, True])
def test_an_optimizer_that_comes_too_early_is_stopped(waits):
    gc.collect()  # nodes of failed steps above
    (node, weights), batch = small(), batch32()
    optimizer = torch.optim.SGD(weights, lr=0.1)
    out = node(*batch)
    if not waits:
        out.sum().backward()
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.ones_like(w)
    with pytest.raises(RuntimeError, match=r"must come before SGD\.step\(\): main_grad lacks"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    if waits:
        out.sum().backward()
    node.step()
    optimizer.step()


def test_an_optimizer_of_other_parameters_warns_and_weights_are_copied_anew():
    """It may hold master copies of these weights."""
    gc.collect()  # nodes of failed steps above
    (node, weights), batch = small(), batch32()
    masters = [nn.Parameter(w.detach().clone()) for w in weights]
    run(node, batch)
    for m in masters:
        m.grad = torch.ones_like(m)
    with pytest.warns(UserWarning, match=r"SGD\.step\(\) runs while gradients wait.*main_grad lacks them"):
        torch.optim.SGD(masters, lr=0.1).step()
    for w, m in zip(weights, masters, strict=True):
        w.data.copy_(m.data)
    expected = looped(batch, weights, as_activation("swiglu"), GateUpLayout.GATE_UP)
    torch.testing.assert_close(node(*batch), expected, rtol=1e-4, atol=1e-5)


def test_a_step_stays_on_one_stream_and_in_one_capture(monkeypatch):
    place = [(7, False)]
    monkeypatch.setattr(expert_store, "_place", lambda device: place[0])
    (node, weights), batch = small(), batch32()
    outs = [node(*batch), node(*batch)]
    outs[0].sum().backward()
    place[0] = (7, True)
    with pytest.raises(RuntimeError, match=r"backward must run on.*\(7, True\) after \(7, False\).*Capture all"):
        outs[1].sum().backward()
    outs.clear()
    with pytest.raises(RuntimeError, match=r"step\(\) must run on the CUDA stream"):
        node.step()
    place[0] = (7, False)
    node.step()
    assert weights[0].main_grad.any()


# ---- input -----------------------------------------------------------------------------------------------------------

BAD_MAIN_GRADS = {
    "missing": (None, "got NoneType"),
    "bf16": (lambda w: torch.zeros_like(w, dtype=torch.bfloat16), "got bfloat16"),
    "shape": (lambda w: torch.zeros_like(w.T), r"got float32 of shape \(8, 16\)"),
    "device": (lambda w: torch.zeros_like(w, device="meta"), "on meta"),
}


@pytest.mark.parametrize(("make", "words"), BAD_MAIN_GRADS.values(), ids=BAD_MAIN_GRADS)
def test_a_bad_main_grad_is_refused_and_loses_nothing(make, words):
    (node, weights), batch = small(), batch32()
    run(node, batch)
    good = weights[-1].main_grad
    del weights[-1].main_grad
    if make is not None:
        weights[-1].main_grad = make(weights[-1].detach())
    needs = r"main_grad of w2 of experts\[4\] to be a float32 tensor of shape \(16, 8\) on cpu"
    with pytest.raises(ValueError, match=rf"{needs}.*{words}.*call step\(\) again"):
        node.step()
    assert not any(w.main_grad.any() for w in weights[:-1])
    weights[-1].main_grad = good
    node.step()
    assert all(w.main_grad.any() for i, w in enumerate(weights) if i % E != 2)


def with_experts(change):
    experts = list(make_experts()[0])
    change(experts)
    return lambda: SonicMoEMlpNode(experts, E, H, I)


def bad_call(**changes):
    def call():
        batch = dict(zip(("x", "counts", "ids", "probs"), received(), strict=True))
        SonicMoEMlpNode(make_experts()[0], E, H, I, validate="validate" in changes)(
            *(changes.get(name, lambda t: t)(value) for name, value in batch.items())
        )

    return call


def put(expert):
    return lambda experts: experts.__setitem__(3, expert)


def linears(*sizes, **kwargs):
    return Expert(("w1", "w2"), *sizes, **kwargs)


BAD = {
    "no experts": (
        lambda: SonicMoEMlpNode(None, 5, H, I),
        TypeError,
        "experts must be a sequence of modules",
    ),
    "flag": (
        lambda: SonicMoEMlpNode(make_experts()[0], 5, H, I, transposed="no"),
        TypeError,
        "transposed must be True",
    ),
    "count": (lambda: SonicMoEMlpNode(make_experts()[0], 4, H, I), ValueError, r"experts must have length 4.*got 5"),
    "zero": (lambda: SonicMoEMlpNode([], 0, H, I), ValueError, "n_experts must be at least 1"),
    "names": (with_experts(put(nn.Linear(2, 2))), TypeError, r"experts\[3\].*linear_fc1 and linear_fc2.*got Linear"),
    "no weight": (with_experts(put((nn.ReLU(), nn.ReLU()))), TypeError, r"w1 of experts\[3\] must be a tensor, or"),
    "bias": (with_experts(put(linears(16, H, I, bias=True))), ValueError, r"w1 of experts\[3\] must have no bias"),
    "inner": (with_experts(put(linears(8, H, I).double())), ValueError, r"w1.*must have shape \(16, 16\).*\(8, 16\)"),
    "transposed": (
        with_experts(put(linears(16, H, I, transposed=True).double())),
        ValueError,
        r"w2 of experts\[3\] must have shape \(16, 8\).*got float64 of shape \(8, 16\).*need transposed=True",
    ),
    "dtype": (with_experts(put(linears(16, H, I))), TypeError, r"w1 of experts\[3\] and w1 of experts\[0\] must have"),
    "hidden": (bad_call(x=lambda x: x[:, :8]), ValueError, "x must have hidden size.* 16.*got 8"),
    "x dtype": (bad_call(x=lambda x: x.float()), TypeError, "w1 and x must have one dtype"),
    "rows": (bad_call(x=lambda x: x[:5]), ValueError, "one row for each row of x, 5.*got 13"),
    "probs": (bad_call(probs=lambda p: p[:, :2]), ValueError, "dispatched_probs must have the shape of"),
    "no counts": (bad_call(counts=lambda c: None), TypeError, "tokens_per_expert must be a sequence or a tensor"),
    "one count": (bad_call(counts=lambda c: torch.tensor(5)), TypeError, "tokens_per_expert must hold integers in one"),
    "experts": (bad_call(counts=lambda c: c[:-1]), ValueError, "tokens_per_expert must have length 5.*got 4"),
    "negative": (bad_call(counts=lambda c: [-1, *c[1:]]), ValueError, "negative counts; expert 0 has -1"),
    "other counts": (
        bad_call(counts=lambda c: [c[0] - 1, *c[1:]], validate=True),
        ValueError,
        "tokens_per_expert must not be less than the number of ids of each expert",
    ),
    "nan": (bad_call(probs=lambda p: p * float("nan"), validate=True), ValueError, "dispatched_probs must be finite"),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
