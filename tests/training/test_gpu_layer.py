"""The layer on a GPU, through the backend that ``auto`` picks: accuracy, no host sync, CUDA graphs, streams, equal
bits.
"""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from host_waits import no_host_waits
from poison import poisoned_allocations  # noqa: F401

import supersonic_moe as sm
from supersonic_moe import Activation, ActivationType, GateUpLayout

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
T, H, I, E, K = 333, 256, 128, 8, 4  # noqa: E741
ACTIVATIONS = [*(Activation(a) for a in ActivationType), Activation.gpt_oss(limit=0.9), Activation.swiglu_clamped(0.7)]
CASES = [(a, lo) for a in ACTIVATIONS for lo in (GateUpLayout if a.gated else [GateUpLayout.INTERLEAVED])]


def inputs(activation, *, bias=True, positive=False, empty_experts=True, tokens=T):
    weights = oracle.weights(E, H, I, activation.fan, bias=(bias, bias), dtype=torch.bfloat16, device=CUDA, scale=0.1)
    x = torch.randn(tokens, H, device=CUDA, dtype=torch.bfloat16)
    if positive:
        x = x.abs()
        weights = tuple(None if w is None else w.detach().abs().requires_grad_() for w in weights)
    high = E - 2 if empty_experts else E  # the last two experts get nothing
    ids = torch.rand(tokens, high, device=CUDA).topk(K, dim=1).indices.int()
    ids[::7, 0] = -1
    scores = torch.rand(tokens, K, device=CUDA)
    return x.requires_grad_(), ids, scores.requires_grad_(), weights


def run(x, ids, scores, weights, activation, layout, backend="auto", dout=None):
    w1, b1, w2, b2 = weights
    out = sm.topk_experts(x, ids, scores, w1, w2, b1=b1, b2=b2, activation=activation, layout=layout, backend=backend)
    leaves = [t for t in (x, scores, *weights) if t is not None]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out) if dout is None else dout)]


def in_fp64(t):
    return None if t is None else t.detach().double().requires_grad_(t.requires_grad)


@pytest.mark.parametrize("backend", ["triton", "sm90"])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "layout"), CASES, ids=lambda v: getattr(v, "value", None) or f"{v.type.value}{v.limit or ''}"
)
def test_close_to_fp64(activation, layout, bias, positive, backend):
    """Against fp64, and against the reference in bf16, which rounds at the same places.

    The pre-activation is stored in bf16, which moves some elements over a kink (ReLU at 0, the clamps): there the slope
    jumps and the distance to fp64 is that of the rounding, not of the kernel. The bf16 reference has the same kinks.
    """
    x, ids, scores, weights = inputs(activation, bias=bias, positive=positive)
    dout = torch.randn_like(x)
    got = run(x, ids, scores, weights, activation, layout, backend, dout)
    rounded = run(x, ids, scores, weights, activation, layout, "reference", dout)
    exact_operands = in_fp64(x), ids, in_fp64(scores), tuple(map(in_fp64, weights))
    exact = run(*exact_operands, activation, layout, "reference", dout.double())
    kinked = activation.limit is not None or "relu" in activation.type.value or activation.type.value == "reglu"
    names = ["out", "dx", "dscores", "dw1", "db1", "dw2", "db2"] if bias else ["out", "dx", "dscores", "dw1", "dw2"]
    for name, g, r, e in zip(names, got, rounded, exact, strict=True):
        assert oracle.rel_fro(g, r) < 6e-3, f"{name} against the bf16 reference"
        assert oracle.rel_fro(g, e) < (6e-2 if kinked else 1e-2), f"{name} against fp64"
    for dw in got[names.index("dw1")], got[names.index("dw2")]:
        assert (dw[-2:] == 0).all()


def entry_points(tokens=T):
    """Every public way into the layer, as a function of x that returns an output."""
    act = Activation(ActivationType.SWIGLU)
    x, ids, scores, (w1, b1, w2, b2) = inputs(act, tokens=tokens)
    router_w = torch.randn(E, H, device=CUDA, dtype=torch.bfloat16)
    kw = dict(b1=b1, b2=b2)
    token_of = torch.arange(tokens, device=CUDA).repeat_interleave(K)[torch.randperm(tokens * K, device=CUDA)]
    counts = torch.bincount(ids[ids >= 0].long(), minlength=E)
    offs = torch.linspace(0, tokens, E + 1, device=CUDA)[1:].int()

    def deepep(x):
        plan, slot_scores = sm.plan_from_deepep(ids, scores, counts, tile=16)
        return sm.experts_from_plan(x, slot_scores, plan, w1, w2, **kw)

    routers = {
        "after": sm.SoftmaxAfterTopK(),
        "before": sm.SoftmaxBeforeTopK(renormalize=True),
        "sigmoid": sm.SigmoidGroupedTopK(num_groups=4, topk_groups=2),
        **{
            f"rounding_{mode}": sm.TokenRounding(mode=mode, tile=16)
            for mode in ("NR-f", "SR-f", "NR-s", "Balance-f", "UP", "DOWN")
        },
    }
    layers = {
        f"layer_{name}": lambda x, r=router: sm.moe_layer(x, router_w, w1, w2, 2, router=r, **kw).output
        for name, router in routers.items()
    }
    return x, {
        **layers,
        "topk": lambda x: sm.topk_experts(x, ids, scores, w1, w2, **kw),
        "triples": lambda x: sm.routed_experts(x, token_of, ids.flatten(), scores.flatten(), w1, w2, **kw),
        "dispatched": lambda x: sm.dispatched_experts(x, offs, w1, w2, **kw),
        "deepep": deepep,
    }


ENTRY_POINTS = [
    *(f"layer_{r}" for r in ("after", "before", "sigmoid")),
    *(f"layer_rounding_{m}" for m in ("NR-f", "SR-f", "NR-s", "Balance-f", "UP", "DOWN")),
    *("topk", "triples", "dispatched", "deepep"),
]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_no_host_sync_and_graph_capture_and_equal_bits(name):
    x, functions = entry_points()
    assert set(functions) == set(ENTRY_POINTS)
    f = functions[name]

    def step(x):
        out = f(x)
        return out, torch.autograd.grad(out, x, torch.ones_like(out))[0]

    first = [t.clone() for t in step(x)]
    torch.cuda.synchronize()
    differs = []
    with no_host_waits():
        for _ in range(20):
            differs += [(a != b).any() for a, b in zip(step(x), first, strict=True)]
    assert len(differs) == 40 and not torch.stack(differs).any()

    static = x.detach().clone().requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for _ in range(2):
        fresh = torch.randn_like(x)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        want = step(fresh.requires_grad_())
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.parametrize("base", [sm.SoftmaxAfterTopK(), sm.SigmoidGroupedTopK(scaling_factor=2.5)], ids=repr)
@pytest.mark.parametrize("mode", ["NR-f", "UP", "DOWN"])
def test_token_rounding_close_to_fp64(mode, base):
    """The whole layer, router gradient included, against autograd in fp64 on the same choice and the same logits."""
    x, _, _, (w1, b1, w2, b2) = inputs(Activation(ActivationType.SWIGLU), tokens=1000)
    router_w = (torch.randn(E, H, device=CUDA) * H**-0.5).bfloat16().requires_grad_()
    dout, policy = torch.randn_like(x), sm.TokenRounding(base=base, mode=mode, tile=128)
    out, logits, counts = sm.moe_layer(x, router_w, w1, w2, 2, router=policy, b1=b1, b2=b2)
    got = [out, *torch.autograd.grad(out, (x, router_w, w1, b1, w2, b2), dout)]
    assert (counts % 128 == 0).all() and counts.any()

    chosen = sm.token_rounding(logits.detach(), 2, policy)  # same bits, hence same choice
    assert torch.equal(counts, chosen.counts)
    used = int(counts.sum())
    pair = chosen.token_indices[:used].long(), chosen.expert_indices[:used].long()
    kept = torch.zeros(logits.shape, dtype=torch.bool, device=CUDA).index_put_(pair, torch.tensor(True, device=CUDA))
    leaves = [in_fp64(t) for t in (x, router_w, w1, b1, w2, b2)]
    exact_logits = leaves[0] @ leaves[1].T
    exact_logits = exact_logits + (logits.double() - exact_logits).detach()  # the values that were routed
    if isinstance(base, sm.SigmoidGroupedTopK):
        a = exact_logits.sigmoid() * kept
        weights = 2.5 * a / (a.sum(1, keepdim=True) + 1e-20)
    else:
        weights = exact_logits.masked_fill(~kept, -1e9).softmax(1)
    x64, _, w1, b1, w2, b2 = leaves
    exact = sm.routed_experts(x64, *pair, weights[pair], w1, w2, b1=b1, b2=b2, backend="reference")
    want = [exact, *torch.autograd.grad(exact, leaves, dout.double())]
    for name, g, e in zip(("out", "dx", "drouter", "dw1", "db1", "dw2", "db2"), got, want, strict=True):
        assert oracle.rel_fro(g, e) < 1e-2, name


def test_module_trains_in_a_graph():
    """Forward, loss and backward of the module in one CUDA graph, sampled token rounding included."""
    moe = sm.MoE(E, 2, H, I, "swiglu", True, 0.02, router=sm.TokenRounding(mode="SR-f", tile=16)).to(
        CUDA, torch.bfloat16
    )
    x = torch.randn(T, H, device=CUDA, dtype=torch.bfloat16)

    def step():
        out, aux = moe(x)
        (out.float().square().mean() + 0.01 * aux).backward()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    moe.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    counts = [moe.expert_counts.clone()]
    for _ in range(8):
        graph.replay()
        counts.append(moe.expert_counts.clone())
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in moe.parameters())
    assert any(not torch.equal(c, counts[0]) for c in counts[1:]), "each replay draws anew"


@pytest.mark.parametrize("recipe", [None, sm.Fp8Recipe()], ids=["bf16", "fp8"])
def test_graphed_callable_has_the_bits_of_the_layer(recipe):
    """``torch.cuda.make_graphed_callables``, the remedy where a step is so short that the host limits it."""
    moe = sm.MoE(E, 2, H, I, "swiglu", False, 0.02, recipe=recipe).to(CUDA, torch.bfloat16)
    eager = copy.deepcopy(moe)
    first, second = (torch.randn(T, H, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    graphed = torch.cuda.make_graphed_callables(moe, (first,))
    with torch.no_grad():
        for layer in (moe, eager):
            layer.c_fc.weight.mul_(1.5)  # FP8 copies of weights are made anew in every replay
    for x in (first, second, first):
        results = []
        for layer in (graphed, eager):
            out, aux = layer(x)
            leaves = [x, *layer.parameters()]
            grads = torch.autograd.grad([out, aux], leaves, [torch.ones_like(out), torch.ones_like(aux)])
            results.append([t.clone() for t in (out, aux, *grads)])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


def test_two_streams_at_once_and_odd_token_counts():
    """T changes from call to call on two streams; every result equals the one computed alone."""
    act, layout = Activation(ActivationType.SWIGLU), GateUpLayout.GATE_UP
    jobs = [(n, *inputs(act, tokens=n)) for n in (1, 2, 77, 333, 1000, 17, 129, 511)]
    alone = [run(x, ids, s, w, act, layout) for _, x, ids, s, w in jobs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    together = []
    for i, (_, x, ids, s, w) in enumerate(jobs):
        with torch.cuda.stream(streams[i % 2]):
            together.append(run(x, ids, s, w, act, layout))
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_no_tokens():
    act = Activation(ActivationType.SWIGLU)
    x, ids, scores, weights = inputs(act, tokens=0)
    for g in run(x, ids, scores, weights, act, GateUpLayout.INTERLEAVED)[1:]:
        assert (g == 0).all()


@pytest.mark.parametrize("tokens", [1, 5000])
def test_one_hot_expert(tokens):
    act = Activation(ActivationType.SWIGLU)
    x, ids, scores, weights = inputs(act, tokens=tokens)
    ids = torch.full_like(ids, -1)
    ids[:, 0] = 3
    dout = torch.randn_like(x)
    got = run(x, ids, scores, weights, act, GateUpLayout.INTERLEAVED, dout=dout)
    want = run(
        in_fp64(x),
        ids,
        in_fp64(scores),
        tuple(map(in_fp64, weights)),
        act,
        GateUpLayout.INTERLEAVED,
        "reference",
        dout.double(),
    )
    assert all(oracle.rel_fro(g, w) < 1e-2 for g, w in zip(got, want, strict=True))


def test_fp32_takes_the_slow_path_with_one_warning(caplog):
    from supersonic_moe.kernels import registry

    registry._warn_once.cache_clear()
    moe = sm.MoE(E, 2, 32, 16, "swiglu", False, 0.1).to(CUDA)
    for _ in range(2):
        moe(torch.randn(9, 32, device=CUDA))
    slow = [r for r in caplog.records if "slow path" in r.message]
    assert len(slow) == 1
    assert "float32" in slow[0].message


def test_compile_fullgraph():
    moe = sm.MoE(E, 2, H, I, "swiglu", True, 0.05).to(CUDA, torch.bfloat16)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True)
    for tokens in (64, 333):
        x, results = torch.randn(tokens, H, device=CUDA, dtype=torch.bfloat16), []
        for model in (compiled, moe):
            moe.zero_grad()
            out = model(x)[0]
            out.float().square().sum().backward()
            results.append([out.detach(), *(p.grad for p in moe.parameters())])
        (got, *grads), (want, *want_grads) = results
        assert oracle.rel_fro(got, want) < 1e-2
        errors = [oracle.rel_fro(g, w) for g, w in zip(grads, want_grads, strict=True)]
        assert max(errors) < 5e-2, errors  # a wrong one is off by all of itself


@pytest.mark.multigpu
@pytest.mark.parametrize("backend", ["triton", "sm90"])
def test_second_gpu_while_the_first_is_current(backend):
    """Kernels run where the tensors are, not on the current device: same bits on both GPUs."""
    act = Activation(ActivationType.SWIGLU)
    x, ids, scores, weights = inputs(act)

    def on(device):
        moved = [t.detach().to(device).requires_grad_() for t in (x, scores, *weights)]
        return run(moved[0], ids.to(device), moved[1], tuple(moved[2:]), act, GateUpLayout.GATE_UP, backend)

    assert torch.cuda.current_device() == 0
    first, second = on("cuda:0"), on("cuda:1")
    assert all(t.device.index == 1 for t in second)
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(first, second, strict=True))
    moe = sm.MoE(E, 2, H, I, "swiglu", True, 0.02, router=sm.TokenRounding(tile=16)).to("cuda:1", torch.bfloat16)
    out, aux = moe(x.detach().to("cuda:1"))
    (out.float().square().mean() + aux).backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters())
