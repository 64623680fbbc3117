"""Weight gradients that go to ``main_grad``: sums over micro-batches, who else hears of them, what is refused.

The rest of the layer must not change: where a layer with ``accumulate_into_main_grad`` is compared to its plain twin,
every other gradient is compared too, bit for bit.
"""

from __future__ import annotations

import contextlib

import oracle
import pytest
import torch
from poison import poisoned_allocations  # noqa: F401
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import supersonic_moe as sm
from supersonic_moe.kernels import reference, registry

T, H, I, E, K = 13, 16, 8, 5, 2  # noqa: E741
SIZES = (13, 0, 1, 40)  # tokens of the micro-batches


def weights_of(moe):
    return moe.c_fc.weight, moe.c_proj.weight


def give_main_grads(moe, *, zero=False):
    for w in weights_of(moe):
        make = torch.zeros if zero else torch.randn
        w.main_grad = make(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
    return [w.main_grad.clone() for w in weights_of(moe)]


def twins(dtype=torch.float64, device="cpu", **kwargs):
    """The same layer without and with the option."""
    plain, fused = (
        sm.MoE(E, K, H, I, "swiglu", True, 0.5, accumulate_into_main_grad=on, **kwargs).to(device, dtype)
        for on in (False, True)
    )
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def step(moe, x, backend=sm.KernelBackendMoE.auto, wrap=None):
    x = x.clone().requires_grad_()
    out, aux = moe(x, backend) if wrap is None else wrap(moe, x)
    (out.double().square().sum() + aux).backward()
    return x.grad


def others(moe):
    return {name: p for name, p in moe.named_parameters() if not any(p is w for w in weights_of(moe))}


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


class MegatronHooks:
    """What Megatron's DistributedDataParallel does with overlapped reduction: a hook on the node that accumulates
    ``.grad`` moves the gradient to main_grad, unless the layer has done so, and counts the parameter as ready.
    """

    def __init__(self, moe, zero_out_wgrad):
        self.ready, self.nodes = [], []
        for name, p in moe.named_parameters():
            p.main_grad, p.grad_added_to_main_grad = torch.zeros_like(p, dtype=torch.float32), False
            p.zero_out_wgrad = zero_out_wgrad
            node = p.expand_as(p).grad_fn.next_functions[0][0]
            node.register_hook(lambda *_, name=name, p=p: self.hook(name, p))
            self.nodes.append(node)

    def hook(self, name, p):
        assert p.grad is not None, "a parameter without gradient would stall the overlapped reduction"
        if not p.grad_added_to_main_grad or p.zero_out_wgrad:
            p.main_grad.add_(p.grad)
        p.grad = None
        self.ready.append(name)


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


# ---- which buffer, and what becomes of its content -------------------------------------------------------------------

BUFFERS = {
    "bf16": lambda w: torch.randn(w.shape).bfloat16(),
    "strides": lambda w: torch.randn(w.mT.shape).mT,
    "every other row": lambda w: torch.randn(w.shape[0], 2 * w.shape[1], w.shape[2])[:, ::2],
    "misaligned": lambda w: torch.randn(w.numel() + 1)[1:].view(w.shape),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS)
def test_buffers_that_kernels_cannot_write_get_the_sum_with_one_rounding(make, overwrite):
    """Megatron's --grad-reduce-in-bf16, and views into larger buffers."""
    torch.manual_seed(3)
    exact, fused = twins(torch.bfloat16)
    before = give_main_grads(exact)
    exact.accumulate_into_main_grad = True
    for w, e, start in zip(weights_of(fused), weights_of(exact), before, strict=True):
        w.main_grad, w.overwrite_main_grad = make(w), overwrite
        e.main_grad.copy_(0 * start if overwrite else w.main_grad)
    x = torch.randn(T, H).bfloat16()
    step(fused, x)
    step(exact, x)
    for w, e in zip(weights_of(fused), weights_of(exact), strict=True):
        torch.testing.assert_close(w.main_grad, e.main_grad.to(w.main_grad.dtype), rtol=1e-6, atol=1e-6)
        assert e.main_grad.any() and w.grad is None


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

    torch.cuda.set_sync_debug_mode("error")
    try:
        repeats = [accumulate() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for again in repeats for a, b in zip(again, first, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = accumulate()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
