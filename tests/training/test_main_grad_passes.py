"""Which buffer a weight gradient goes to, what becomes of its content, and which backward passes add to it."""

from __future__ import annotations

import contextlib

import oracle
import pytest
import torch
from main_grad_layers import H, MegatronHooks, T, give_main_grads, step, twins, weights_of

import supersonic_moe as sm
from supersonic_moe.kernels import reference

# ---- which buffer, and what becomes of its content -------------------------------------------------------------------

BUFFERS = {
    "bf16": lambda w: torch.randn(w.shape, device=w.device).bfloat16(),
    "strides": lambda w: torch.randn(w.mT.shape, device=w.device).mT,
    "every other row": lambda w: torch.randn(w.shape[0], 2 * w.shape[1], w.shape[2], device=w.device)[:, ::2],
    "misaligned": lambda w: torch.randn(w.numel() + 1, device=w.device)[1:].view(w.shape),
}


def fp32_buffer(w):
    return torch.randn(w.shape, device=w.device)


def assert_summed_with_one_rounding(make, overwrite, device, **kwargs):
    torch.manual_seed(3)
    exact, fused = twins(torch.bfloat16, device, **kwargs)
    give_main_grads(exact)
    exact.accumulate_into_main_grad = True
    for w, e in zip(weights_of(fused), weights_of(exact), strict=True):
        w.main_grad, w.overwrite_main_grad = make(w), overwrite
        e.main_grad.copy_(0 * w.main_grad if overwrite else w.main_grad)
    x = torch.randn(T, H, device=device).bfloat16()
    step(fused, x)
    step(exact, x)
    for w, e in zip(weights_of(fused), weights_of(exact), strict=True):
        torch.testing.assert_close(w.main_grad, e.main_grad.to(w.main_grad.dtype), rtol=1e-6, atol=1e-6)
        assert e.main_grad.any() and w.grad is None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS)
def test_buffers_that_kernels_cannot_write_get_the_sum_with_one_rounding(make, overwrite):
    """Megatron's --grad-reduce-in-bf16, and views into larger buffers."""
    assert_summed_with_one_rounding(make, overwrite, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, sm.Fp8Recipe()], ids=["bf16", "fp8"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [fp32_buffer, *BUFFERS.values()], ids=["fp32", *BUFFERS])
def test_gpu_buffers_of_every_kind(make, overwrite, recipe):
    assert_summed_with_one_rounding(make, overwrite, "cuda", recipe=recipe)


def test_overwritten_buffers_forget_what_was_there():
    """Megatron-FSDP hands out fresh memory; experts without rows must be written too."""
    plain, fused = twins()
    for w in weights_of(fused):
        w.main_grad, w.overwrite_main_grad = torch.full_like(w, torch.nan), True
    for tokens in (40, 1, 0):
        x = torch.randn(tokens, H, dtype=torch.float64)
        plain.zero_grad()
        step(fused, x)
        step(plain, x)
        for w, want in zip(weights_of(fused), weights_of(plain), strict=True):
            torch.testing.assert_close(w.main_grad, want.grad, rtol=1e-12, atol=1e-12)


def test_overwriting_in_fp8_goes_to_the_kernels():
    x, results = torch.randn(T, H, dtype=torch.bfloat16), []
    _, fused = twins(torch.bfloat16, recipe=sm.Fp8Recipe())
    for content, overwrite in ((0.0, False), (torch.nan, True)):
        for w in weights_of(fused):
            w.main_grad, w.overwrite_main_grad = torch.full(w.shape, content), overwrite
        step(fused, x)
        results.append([w.main_grad for w in weights_of(fused)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*results, strict=True))


def test_get_main_grad_is_called():
    plain, fused = twins()
    buffers = {}
    for w in weights_of(fused):
        w.get_main_grad = lambda w=w: buffers.setdefault(w, torch.zeros_like(w))
    x = torch.randn(T, H, dtype=torch.float64)
    step(fused, x)
    step(plain, x)
    for w, want in zip(weights_of(fused), weights_of(plain), strict=True):
        torch.testing.assert_close(buffers[w], want.grad, rtol=1e-12, atol=1e-12)


# ---- backward in two passes ------------------------------------------------------------------------------------------


def in_two_passes(loss, x, leaves):
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(inputs=leaves)
    return dx


def in_two_backwards(loss, x, leaves):
    loss.backward(inputs=[x], retain_graph=True)
    loss.backward(inputs=leaves)
    return x.grad


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("split", [in_two_passes, in_two_backwards])
def test_a_backward_in_two_passes_adds_each_gradient_once(split, autocast, megatron):
    """Zero-bubble schedules: dx first, weights later. The first pass must not touch a buffer."""
    plain, fused = twins(torch.float32)
    hooks = MegatronHooks(fused, zero_out_wgrad=False) if megatron else None
    if not megatron:
        give_main_grads(fused, zero=True)
    x = torch.randn(T, H)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        want_dx = step(plain, x)
        x.requires_grad_()
        out, aux = fused(x)
    loss = out.double().square().sum() + aux
    assert torch.equal(split(loss, x, list(fused.parameters())), want_dx)
    for name, p in fused.named_parameters():
        want = plain.get_parameter(name).grad
        got = p.main_grad if megatron or any(p is w for w in weights_of(fused)) else p.grad
        assert oracle.rel_fro(got, want) < (5e-3 if autocast else 1e-6), name
    assert hooks is None or sorted(hooks.ready) == sorted(name for name, _ in fused.named_parameters())


def test_the_first_pass_computes_no_weight_gradient(monkeypatch):
    _, fused = twins()
    give_main_grads(fused, zero=True)
    x, calls = torch.randn(T, H, dtype=torch.float64, requires_grad=True), []
    kernel = reference.grouped_mm_wgrad
    monkeypatch.setattr(reference, "grouped_mm_wgrad", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    loss = fused(x)[0].square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    assert not calls
    loss.backward(inputs=[fused.c_fc.weight])
    assert len(calls) == 1 and fused.c_fc.weight.main_grad.any() and not fused.c_proj.weight.main_grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_autograd_grad_returns_gradients_and_adds_none(autocast):
    """As for plain weights, whose ``.grad`` it leaves alone."""
    plain, fused = twins(torch.float32)
    before = give_main_grads(fused)
    x, grads = torch.randn(T, H), []
    for moe in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = moe(x)[0].square().sum()
        grads.append(torch.autograd.grad(loss, weights_of(moe)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.equal(w.main_grad, b) for w, b in zip(weights_of(fused), before, strict=True))
