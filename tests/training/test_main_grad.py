"""Weight gradients that go to ``main_grad``: sums over micro-batches, who else hears of them, what is refused.

The rest of the layer must not change: where a layer with ``accumulate_into_main_grad`` is compared to its plain twin,
every other gradient is compared too, bit for bit.
"""

from __future__ import annotations

import contextlib

import oracle
import pytest
import torch
from host_waits import no_host_waits
from main_grad_layers import SIZES, E, H, I, K, MegatronHooks, T, give_main_grads, others, step, twins, weights_of
from poison import poisoned_allocations  # noqa: F401
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import supersonic_moe as sm
from supersonic_moe.kernels import reference, registry

# ---- sums ------------------------------------------------------------------------------------------------------------


def test_micro_batches_add_up():
    plain, fused = twins()
    start = give_main_grads(fused)
    for tokens in SIZES:
        x = torch.randn(tokens, H, dtype=torch.float64)
        assert torch.equal(step(fused, x), step(plain, x))
    for before, w, want in zip(start, weights_of(fused), weights_of(plain), strict=True):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad - before, want.grad, rtol=1e-12, atol=1e-12)
    for name, p in others(fused).items():
        assert torch.equal(p.grad, plain.get_parameter(name).grad), name


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bf16_products_are_added_in_fp32(backend, device):
    """The reference adds the product before it is rounded to bf16, so rounding main_grad gives the plain gradient. The
    triton backend adds torch's product, which is rounded.
    """
    kernels = {"reference": sm.KernelBackendMoE.torch, "triton": sm.KernelBackendMoE.triton}[backend]
    if backend == "triton" and not registry.HAS_TRITON:
        pytest.skip("needs triton")
    device = device if backend == "triton" else torch.device("cpu")
    plain, fused = twins(torch.bfloat16, device)
    give_main_grads(fused, zero=True)
    x = torch.randn(T, H, dtype=torch.bfloat16, device=device)
    assert torch.equal(step(fused, x, kernels), step(plain, x, kernels))
    for w, want in zip(weights_of(fused), weights_of(plain), strict=True):
        assert torch.equal(w.main_grad.bfloat16(), want.grad)
        assert torch.equal(w.main_grad, want.grad.float()) == (backend == "triton")
        first = w.main_grad.clone()
        with torch.no_grad():
            w.main_grad.mul_(2**12)  # a bf16 sum would lose the next addend
    step(fused, x, kernels)
    torch.testing.assert_close(w.main_grad.double() - 2**12 * first.double(), first.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_experts_without_rows_are_left_alone(backend, device):
    device = device if backend == "triton" else torch.device("cpu")
    w1, b1, w2, b2 = oracle.weights(E, H, I, 2, dtype=torch.bfloat16, device=device)
    for w in (w1, w2):
        w.main_grad = torch.randn(w.shape, device=device)
    before = [w.main_grad.clone() for w in (w1, w2)]
    x, ids = torch.randn(T, H, dtype=torch.bfloat16, device=device), torch.randint(1, 3, (T, 1), device=device)
    kwargs = dict(b1=b1, b2=b2, accumulate_into_main_grad=True, backend=backend)
    for tokens in (T, 0):
        out = sm.topk_experts(x[:tokens], ids[:tokens], torch.rand(tokens, 1, device=device), w1, w2, **kwargs)
        out.sum().backward()
        for old, w in zip(before, (w1, w2), strict=True):
            changed = (w.main_grad != old).flatten(1).any(1)
            assert changed.tolist() == [False, True, True, False, False]


def entry_points(w1, w2, **kwargs):
    x = torch.randn(T, H, dtype=torch.float64)
    ids, scores = torch.randint(E, (T, K)), torch.rand(T, K, dtype=torch.float64)
    tokens = torch.arange(T).repeat_interleave(K)
    ends = torch.tensor([2, 2, 7, 9, T])
    plan = sm.plan_from_topk(ids, E, tile=4)
    return {
        "layer": lambda: sm.moe_layer(x, torch.eye(E, H, dtype=x.dtype), w1, w2, K, **kwargs).output,
        "topk": lambda: sm.topk_experts(x, ids, scores, w1, w2, **kwargs),
        "triples": lambda: sm.routed_experts(x, tokens, ids.flatten(), scores.flatten(), w1, w2, **kwargs),
        "dispatched": lambda: sm.dispatched_experts(x, ends, w1, w2, **kwargs),
        "plan": lambda: sm.experts_from_plan(x, scores.flatten(), plan, w1, w2, **kwargs),
    }


@pytest.mark.parametrize("frozen", [None, "w1", "w2"])
@pytest.mark.parametrize("name", ["layer", "topk", "triples", "dispatched", "plan"])
def test_every_entry_point(name, frozen):
    """Also with one of the weights frozen: it needs no main_grad."""
    w1, _, w2, _ = oracle.weights(E, H, I, 2, bias=(False, False))
    trained = {"w1": w1, "w2": w2}
    if frozen:
        trained.pop(frozen).requires_grad_(False)
    torch.manual_seed(1)
    want = torch.autograd.grad(entry_points(w1, w2)[name]().square().sum(), list(trained.values()))
    torch.manual_seed(1)
    out = entry_points(w1, w2, accumulate_into_main_grad=True)[name]()
    for w in trained.values():  # after forward: looked up when backward runs
        w.main_grad = torch.zeros_like(w)
    out.square().sum().backward()
    for w, g in zip(trained.values(), want, strict=True):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad, g, rtol=1e-12, atol=1e-12)


def test_layers_in_a_row_and_one_layer_twice():
    (plain_a, a), (plain_b, b) = twins(), twins()
    give_main_grads(a, zero=True)
    give_main_grads(b, zero=True)
    for f, g in ((plain_a, plain_b), (a, b)):
        torch.manual_seed(2)
        x = torch.randn(T, H, dtype=torch.float64)
        f(g(f(x)[0])[0])[0].square().sum().backward()
    for fused, plain in ((a, plain_a), (b, plain_b)):
        for w, want in zip(weights_of(fused), weights_of(plain), strict=True):
            assert w.grad is None
            assert oracle.rel_fro(w.main_grad, want.grad) < 1e-12


# ---- ways to run forward and backward --------------------------------------------------------------------------------


def on_cpu(moe, x):
    with save_on_cpu():
        return moe(x)


WRAPS = {
    "checkpoint": lambda moe, x: checkpoint(moe, x, use_reentrant=False),
    "reentrant checkpoint": lambda moe, x: checkpoint(moe, x, use_reentrant=True),
    "offloaded saved tensors": on_cpu,
    "compile": lambda moe, x: torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")(x),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_each_micro_batch_is_added_once(wrap):
    """Weights that were saved and restored, or recomputed, carry no attributes; recomputing must not add twice."""
    plain, fused = twins()
    give_main_grads(fused, zero=True)
    for tokens in (13, 40):
        x = torch.randn(tokens, H, dtype=torch.float64)
        assert torch.allclose(step(fused, x, wrap=wrap), step(plain, x), rtol=1e-12)
    for w, want in zip(weights_of(fused), weights_of(plain), strict=True):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad, want.grad, rtol=1e-12, atol=1e-12)


def test_autocast_adds_to_the_buffer_of_the_parameter_and_not_of_its_copy():
    plain, fused = twins(torch.float32)
    give_main_grads(fused, zero=True)
    x = torch.randn(T, H)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step(fused, x), step(plain, x))
    for w, want in zip(weights_of(fused), weights_of(plain), strict=True):
        assert w.grad is None
        assert torch.equal(w.main_grad.bfloat16(), want.grad.bfloat16())
        assert not torch.equal(w.main_grad, want.grad), "the plain gradient was rounded to bf16"


def test_inference_needs_no_buffer():
    _, fused = twins()
    fused(torch.randn(T, H, dtype=torch.float64), is_inference_mode=True)
    with torch.no_grad():
        fused(torch.randn(T, H, dtype=torch.float64))


# ---- Megatron --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_megatron_hooks_fire_once_and_add_nothing_twice(zero_out_wgrad, autocast):
    """Fresh memory is NaN here, so a stand-in that is added by mistake shows."""
    plain, fused = twins(torch.float32)
    hooks = MegatronHooks(fused, zero_out_wgrad)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        for tokens in SIZES:
            x = torch.randn(tokens, H)
            step(fused, x)
            step(plain, x)
            assert sorted(hooks.ready) == sorted(name for name, _ in fused.named_parameters())
            hooks.ready.clear()
    for name, p in fused.named_parameters():
        assert p.grad is None
        assert p.grad_added_to_main_grad == any(p is w for w in weights_of(fused)), name
        assert oracle.rel_fro(p.main_grad, plain.get_parameter(name).grad) < (5e-3 if autocast else 1e-6), name


def test_anomaly_detection_finds_no_nan_in_a_stand_in():
    """Fresh memory is NaN here."""
    _, fused = twins(torch.float32)
    for w in fused.parameters():
        w.main_grad, w.grad_added_to_main_grad = torch.zeros_like(w), False
    with torch.autograd.detect_anomaly(check_nan=True):
        step(fused, torch.randn(T, H))
    assert fused.c_fc.weight.main_grad.any() and not fused.c_fc.weight.grad.any()


# ---- what is refused -------------------------------------------------------------------------------------------------


class NoKernel(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "supersonic_moe" not in str(func), f"{func} was reached"
        return func(*args, **(kwargs or {}))


BAD = {
    "missing": (None, "got NoneType"),
    "not a tensor": (lambda shape: 0.0, "got float"),
    "bf16": (lambda shape: torch.zeros(shape, dtype=torch.bfloat16), "got bfloat16"),
    "fp64": (lambda shape: torch.zeros(shape, dtype=torch.float64), "got float64"),
    "shape": (lambda shape: torch.zeros(shape[0], shape[2], shape[1]), r"got float32 of shape \(5, 8, 16\)"),
    "flat": (lambda shape: torch.zeros(shape.numel()), r"got float32 of shape \(640,\)"),
    "device": (lambda shape: torch.zeros(shape, device="meta"), "on meta"),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_bad_main_grad_raises_before_any_kernel(make, words, recompute):
    _, moe = twins(torch.float32)
    before = give_main_grads(moe)
    if make is None:
        del moe.c_proj.weight.main_grad
    else:
        moe.c_proj.weight.main_grad = make(moe.c_proj.weight.shape)
    out, _ = WRAPS["checkpoint"](moe, torch.randn(T, H)) if recompute else moe(torch.randn(T, H))
    with NoKernel(), pytest.raises(ValueError, match=words) as caught:
        out.sum().backward()
    message = str(caught.value)
    assert "needs w2.main_grad to be a float32 tensor of shape (5, 16, 8) on cpu" in message
    assert "Set it before backward, on the parameter itself" in message
    assert torch.equal(moe.c_fc.weight.main_grad, before[0])


def test_a_view_of_the_parameter_has_no_main_grad():
    w1, _, w2, _ = oracle.weights(E, H, I, 2, bias=(False, False), dtype=torch.float32)
    w1.main_grad, w2.main_grad = torch.zeros_like(w1), torch.zeros_like(w2)
    ids, view = torch.randint(E, (T, K)), w2.view_as(w2)
    out = sm.topk_experts(torch.randn(T, H), ids, torch.rand(T, K), w1, view, accumulate_into_main_grad=True)
    with pytest.raises(ValueError, match=r"needs w2\.main_grad.*not on a view"):
        out.sum().backward()


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "bound"), [("sm90", 1e-4), ("triton", 3e-3)])
def test_gpu_sums_are_close_to_fp64_and_repeat_to_the_bit(backend, bound, monkeypatch):
    """Each product against fp64 of its own operands; then 20 repeats and a CUDA graph, without a host sync."""
    hidden, inner, experts = 520, 264, 8
    w1, _, w2, _ = oracle.weights(experts, hidden, inner, 2, dtype=torch.bfloat16, device="cuda", scale=0.1)
    weights = (w1, w2)
    start = [torch.randn(w.shape, device="cuda") for w in weights]
    batches = []
    for n in (333, 1, 0, 1000):
        x = torch.randn(n, hidden, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(n, experts - 2, device="cuda").topk(K, dim=1).indices.int()  # two experts get nothing
        batches.append((x, ids, torch.rand(n, K, device="cuda")))

    def accumulate():
        for w, s in zip(weights, start, strict=True):
            w.main_grad = s.clone()
        for x, ids, scores in batches:
            out = sm.topk_experts(x, ids, scores, w1, w2, accumulate_into_main_grad=True, backend=backend)
            out.backward(torch.ones_like(out))
        return [w.main_grad for w in weights]

    k, exact = registry.kernels(backend).experts, [s.double() for s in start]
    kernel = k.grouped_mm_wgrad

    def in_fp64_too(a, b, offsets, into):
        exact_a, exact_out = a._replace(x=a.x.double()), exact[0] if into.transposed else exact[1]
        reference.grouped_mm_wgrad(exact_a, b.double(), offsets, into._replace(out=exact_out))
        return kernel(a, b, offsets, into)

    with monkeypatch.context() as patch:
        patch.setattr(k, "grouped_mm_wgrad", in_fp64_too)
        first = accumulate()
    for got, want, s, w in zip(first, exact, start, weights, strict=True):
        assert w.grad is None
        assert oracle.rel_fro(got.double() - s.double(), want - s.double()) < bound
        assert torch.equal(got[-2:], s[-2:])

    with no_host_waits():
        repeats = [accumulate() for _ in range(20)]
    assert all(torch.equal(a, b) for again in repeats for a, b in zip(again, first, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = accumulate()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
