"""``SonicMoEMlpNode``: its sums against a loop over the experts, schedules of pipeline-parallel trainers, which weights
a pass sees, and what is kept when. What it refuses: ``test_mlp_node_order.py``.
"""

from __future__ import annotations

import copy
import gc

import oracle
import pytest
import torch
from fp8_oracle import assert_contract
from host_waits import no_host_waits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainer_experts import (
    E,
    H,
    I,
    K,
    add_in_place,
    batch32,
    looped,
    mains,
    make_experts,
    received,
    run,
    small,
    swap_data,
)

import supersonic_moe as sm
from supersonic_moe import Fp8Recipe, GateUpLayout, SonicMoEMlpNode
from supersonic_moe.config.activation import as_activation
from supersonic_moe.integrations import mlp_node
from supersonic_moe.training import expert_store

# ---- sums ------------------------------------------------------------------------------------------------------------

CASES = [
    ("linear_fc1 linear_fc2", "swiglu", "interleaved", 1),
    ("linear_fc1 linear_fc2", "geglu", "gate_up", 128),
    ("up_gate_proj down_proj", "swiglu", "gate_up", 4),
    ("w1 w2", "relu_sq", "interleaved", 1),
    ("parameters", "swiglu", "up_gate", 1),
    ("pairs", "silu", "interleaved", 4),
]


@pytest.mark.parametrize(("form", "activation", "layout", "tile"), CASES)
def test_sums_over_micro_batches_are_those_of_a_loop(form, activation, layout, tile):
    """Also without rows. main_grad is added to, expert 2 left alone; ``.grad`` of the weights stays None."""
    act, transposed = as_activation(activation), form.startswith("up_gate")
    experts, weights = make_experts(form, act.fan)
    node = SonicMoEMlpNode(
        experts, E, H, I, activation=activation, layout=layout, transposed=transposed, tile=tile, validate=True
    )
    before, want = mains(weights), [torch.zeros_like(w) for w in weights]
    for seed, rows in enumerate((13, 0, 1, 30)):
        batch, twin = received(rows, seed=seed), received(rows, seed=seed)
        out, expected = node(*batch), looped(twin, weights, act, GateUpLayout(layout), transposed)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        dout = torch.randn_like(out)
        out.backward(dout)
        if rows:
            dx, dprobs, *grads = torch.autograd.grad(expected, [twin[0], twin[3], *weights], dout)
            torch.testing.assert_close(batch[0].grad, dx, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(batch[3].grad, dprobs, rtol=1e-11, atol=1e-12)
            assert batch[3].grad[batch[2] < 0].eq(0).all()
            for total, g in zip(want, grads, strict=True):
                total += g
        else:
            assert batch[0].grad.shape == (0, H) and batch[3].grad.shape == (0, K)
    assert all(torch.equal(w.main_grad, b) for w, b in zip(weights, before, strict=True)), "written before step()"
    node.step()
    for i, (w, b, g) in enumerate(zip(weights, before, want, strict=True)):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad - b, g, rtol=1e-11, atol=1e-11)
        assert torch.equal(w.main_grad, b) == (i % E == 2)


RECIPES = [Fp8Recipe(), Fp8Recipe(keep_transposed=False), Fp8Recipe(save_preactivation="recompute", wgrad="bf16")]


@pytest.mark.parametrize("recipe", RECIPES, ids=["default", "rebuild", "recompute"])
def test_fp8_is_within_its_contract_and_repeats_to_the_bit(recipe):
    hidden, inner = 256, 128
    experts, weights = make_experts(hidden=hidden, inner=inner, dtype=torch.bfloat16)
    node = SonicMoEMlpNode(experts, E, hidden, inner, layout="gate_up", recipe=recipe, tile=128)
    results = []
    for _ in range(2):
        for w in weights:
            w.main_grad.zero_()
        outs, dxs, dss, exact = [], [], [], {n: [] for n in ("out", "dx", "ds", "dw1", "dw2")}
        for seed in (1, 2):
            batch = received(150, hidden=hidden, dtype=torch.bfloat16, seed=seed)
            out = node(*batch)
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
            out.backward(dout)
            outs.append(out.detach())
            dxs.append(batch[0].grad)
            dss.append(batch[3].grad)
            x, counts, ids, probs = batch
            twin = (x.detach().float().requires_grad_(), counts, ids, probs.detach().clone().requires_grad_())
            leaves = [w.detach().float().requires_grad_() for w in weights]
            w1, w2 = torch.stack(leaves[:E]), torch.stack(leaves[E:])
            plan, scores = sm.plan_from_deepep(ids, twin[3], counts)
            expected = sm.experts_from_plan(twin[0], scores, plan, w1, w2, layout="gate_up")
            found = torch.autograd.grad(expected, [twin[0], twin[3], w1, w2], dout.float())
            for name, t in zip(exact, (expected.detach(), *found), strict=True):
                exact[name].append(t)
        node.step()
        got = {"out": torch.cat(outs), "dx": torch.cat(dxs), "ds": torch.cat(dss)}
        got |= {"dw1": torch.stack(mains(weights[:E])), "dw2": torch.stack(mains(weights[E:]))}
        want = {n: (sum(t) if n in ("dw1", "dw2") else torch.cat(t)) for n, t in exact.items()}
        assert_contract(got, want)
        results.append(got)
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


def test_autocast_computes_in_bf16_and_flushes_to_the_fp32_parameters():
    node, weights = small(recipe=Fp8Recipe())
    batch = batch32()
    with torch.autocast("cpu", torch.bfloat16):
        out = node(*batch)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    node.step()
    expected = looped(batch, weights, as_activation("swiglu"), GateUpLayout.GATE_UP)
    for w, g in zip(weights, torch.autograd.grad(expected.sum(), weights), strict=True):
        assert oracle.rel_fro(w.main_grad, g) < 0.15


def test_autocast_leaves_fp64_alone():
    experts, weights = make_experts()
    node, batch = SonicMoEMlpNode(experts, E, H, I), received(13)
    assert weights[0].dtype is torch.float64
    want = node(*batch).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(node(*batch), want)


def test_frozen_weights_get_no_gradient_and_need_no_main_grad():
    node, weights = small()
    for w in [*weights[:E], weights[E]]:
        w.requires_grad_(False)
        del w.main_grad
    batch = batch32()
    run(node, batch)
    node.step()
    trained = weights[E + 1 :]
    expected = looped(batch, weights, as_activation("swiglu"), GateUpLayout.GATE_UP)
    for w, g in zip(trained, torch.autograd.grad(expected.sum(), trained), strict=True):
        torch.testing.assert_close(w.main_grad, g, rtol=1e-4, atol=1e-5)


# ---- schedules -------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw):
    """(order of F and B, order of backward passes) of some micro-batches, each F before its B."""
    count = draw(st.integers(1, 4))
    backward = draw(st.permutations(range(count)))
    steps, begun, waiting = [], 0, list(backward)
    while waiting:
        ready = waiting[0] < begun
        if begun < count and (not ready or draw(st.booleans())):
            steps.append(("F", begun))
            begun += 1
        else:
            steps.append(("B", waiting.pop(0)))
    return steps, backward


def play(nodes, steps):
    """Run a schedule through layers in a row; the gradients of x, by micro-batch."""
    xs, outs = {}, {}
    for what, i in steps:
        if what == "F":
            x, *routing = batch32(4 + 3 * i, seed=i)
            xs[i], outs[i] = x, x
            for node in nodes:
                outs[i] = node(outs[i], *routing)
        else:
            outs.pop(i).square().sum().backward()
    for node in nodes:
        node.step()
    return {i: x.grad for i, x in xs.items()}


@settings(max_examples=15, deadline=None)
@given(schedules(), st.booleans())
def test_interleaved_schedules_give_the_bits_of_sequential_ones(schedule, fp8):
    """Two layers. The sums depend on the order of backward passes, and on nothing else."""
    torch.manual_seed(0)
    recipe = Fp8Recipe() if fp8 else None
    pairs = [small(recipe=recipe) for _ in range(2)]
    nodes, weights = [node for node, _ in pairs], [w for _, ws in pairs for w in ws]
    steps, order = schedule
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=fp8):
        for run_steps in (steps, [(what, i) for i in order for what in "FB"], [("F", 0), ("B", 0)]):
            for w in weights:
                w.main_grad.zero_()
            results.append((play(nodes, run_steps), mains(weights)))
    (dx, got), (same_dx, want), (_, one) = results
    assert all(torch.equal(dx[i], same_dx[i]) for i in dx)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if len(order) > 1:
        assert not torch.equal(got[0], one[0]), "only one micro-batch counts"


# ---- which weights a pass sees ---------------------------------------------------------------------------------------


def test_weights_are_copied_once_a_step_and_anew_after_it(monkeypatch):
    """With updates that show no sign: ``.data`` written in place, as Megatron does after its optimizer."""
    copies, stacked = [], expert_store._stacked
    monkeypatch.setattr(expert_store, "_stacked", lambda *args: copies.append(1) or stacked(*args))
    node, weights = small()
    reference = [w.detach().clone().requires_grad_() for w in weights]
    for step in range(3):
        for w in weights:
            w.main_grad.zero_()
        batches = [batch32(seed=10 * step + i) for i in range(3)]
        outs = [node(*b) for b in batches]
        for out in outs:
            out.square().sum().backward()
        node.step()
        assert len(copies) == 2 * (step + 1)
        losses = [looped(b, reference, as_activation("swiglu"), GateUpLayout.GATE_UP) for b in batches]
        grads = torch.autograd.grad(sum(y.square().sum() for y in losses), reference)
        for w, r, g in zip(weights, reference, grads, strict=True):
            assert oracle.rel_fro(w.main_grad, g) < 1e-5
            versions = w._version
            w.data.copy_(w.data - 0.01 * w.main_grad)
            assert w._version == versions
            with torch.no_grad():
                r -= 0.01 * g


@pytest.mark.parametrize("change", [add_in_place, swap_data])
def test_with_nothing_under_way_a_forward_sees_changed_weights(change):
    node, weights = small()
    batch = batch32()
    with torch.no_grad():
        first = node(*batch)
        change(weights[E])
        second = node(*batch)
        node.experts[1].linear_fc2.weight = nn.Parameter(torch.zeros(H, I))
        third = node(*batch)
    node(*batch)  # its graph dies at once: nothing waits
    change(weights[E])
    fourth = node(*batch).detach()
    assert len({tuple(t.flatten().tolist()) for t in (first, second, third, fourth)}) == 4


def test_an_evaluation_sees_its_weights_and_leaves_none_behind():
    """An average of the weights is swapped in for it and out again, without a sign (``.data`` written in place)."""
    node, weights = small()
    batch, trained, average = batch32(), [w.detach().clone() for w in weights], [0.5 * w.detach() for w in weights]

    def swap_in(values):
        for w, value in zip(weights, values, strict=True):
            w.data.copy_(value)

    with torch.no_grad():
        before = node(*batch)
        swap_in(average)
        assert not torch.equal(node(*batch), before)
    swap_in(trained)
    run(node, batch)
    node.step()
    exact = [w.detach().clone().requires_grad_() for w in weights]
    looped(batch, exact, as_activation("swiglu"), GateUpLayout.GATE_UP).sum().backward()
    assert max(oracle.rel_fro(w.main_grad, e.grad) for w, e in zip(weights, exact, strict=True)) < 1e-5


def test_an_optimizer_without_signs_makes_the_next_forward_copy_anew():
    node, weights = small()
    batch = batch32()
    with torch.no_grad():
        before = node(*batch)
    for w in weights:
        w.grad = torch.ones_like(w)
    torch.optim.SGD(weights, lr=1.0, fused=True).step()
    with torch.no_grad():
        assert not torch.equal(node(*batch), before)


def test_copies_serve_one_mode_one_stream_and_one_recipe(monkeypatch):
    """All in one step, in which a backward waits."""
    stacks, plans, place = [], [], [(7, False)]
    stacked, compute = expert_store._stacked, mlp_node.experts_from_plan
    monkeypatch.setattr(expert_store, "_place", lambda device: place[0])
    monkeypatch.setattr(expert_store, "_stacked", lambda *args: stacks.append(1) or stacked(*args))
    monkeypatch.setattr(
        mlp_node, "experts_from_plan", lambda x, s, plan, *a, **k: plans.append(plan) or compute(x, s, plan, *a, **k)
    )
    experts, _ = make_experts(dtype=torch.bfloat16)
    node, batch = SonicMoEMlpNode(experts, E, H, I, recipe=Fp8Recipe(), tile=4), received(dtype=torch.bfloat16)
    with torch.inference_mode():
        first = node(*batch)
    waiting = node(*batch)  # inference tensors could not be saved for it
    assert torch.equal(waiting, first) and len(stacks) == 4
    place[0] = (8, False)
    assert torch.equal(node(*batch), first) and len(stacks) == 6
    place[0], node.recipe = (7, False), sm.Bf16Recipe()
    assert torch.equal(node(*batch), SonicMoEMlpNode(experts, E, H, I)(*batch)) and len(stacks) == 10
    waiting.sum().backward()
    node.step()
    assert [plan.tile for plan in plans] == [4, 4, 4, 4, 1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_adds_once_and_leaves_nothing_waiting(reentrant):
    (node, weights), batch = small(), batch32()
    run(node, batch)
    node.step()
    want, dx = mains(weights), batch[0].grad.clone()
    for w in weights:
        w.main_grad.zero_()
    batch[0].grad = None
    out = checkpoint(lambda *args: node(*args) * 1, *batch, use_reentrant=reentrant)
    out.sum().backward()
    node.step()
    assert torch.equal(batch[0].grad, dx)
    assert all(torch.equal(w.main_grad, g) for w, g in zip(weights, want, strict=True))


def test_a_copy_is_a_node_of_its_own():
    node, weights = small()
    waiting = node(*batch32())
    model = nn.Module()
    model.experts, model.node = node.experts, node
    twin = copy.deepcopy(model)
    assert twin.node.experts is twin.experts
    twin.node.step()  # nothing waits there
    waiting.sum().backward()
    node.step()
    assert weights[0].main_grad.any() and not hasattr(twin.experts[0].linear_fc1.weight, "main_grad")


# ---- memory ----------------------------------------------------------------------------------------------------------


def stacks():
    """Every 3-d tensor that is alive, one a storage, and every ``main_grad`` of one."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    extra = [getattr(t, "main_grad", None) for t in tensors if t.dim() == 3]
    return {t.untyped_storage()._cdata: t for t in [*tensors, *extra] if t is not None and t.dim() == 3}


@pytest.fixture
def new_objects_only():
    """The collector looks past what is there already, half a million objects after many imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects_only")
@pytest.mark.parametrize("recipe", [None, Fp8Recipe(), Fp8Recipe(keep_transposed=False)])
def test_buffers_and_copies_exist_when_they_are_needed(recipe):
    """Even though the losses, and so their graphs, are kept."""
    experts, weights = make_experts(inner=16, dtype=torch.bfloat16)  # e4m3 rows are a multiple of 16 bytes
    node = SonicMoEMlpNode(experts, E, H, 16, recipe=recipe)
    count, batches = sum(w.numel() for w in weights), [received(dtype=torch.bfloat16, seed=i) for i in range(2)]
    kept = 0 if recipe is not None and recipe.keep_transposed else 2 * count
    others = stacks()  # kept alive, so that no new storage takes the place of one

    def held(dtype):
        """Bytes of the stacked weights, copies and buffers of this test."""
        mine = [t.untyped_storage() for place, t in stacks().items() if place not in others and t.dtype is dtype]
        return sum(storage.nbytes() for storage in mine)

    losses = [node(*b).float().sum() for b in batches]
    scales = held(torch.float32)  # of FP8 weights: no buffer yet
    assert scales < count and held(torch.bfloat16) == kept
    assert held(torch.float8_e4m3fn) == (0 if recipe is None else count if kept else 2 * count)
    for loss in losses:
        loss.backward()
        assert held(torch.float32) == 4 * count + scales
    node.step()
    assert all(held(dtype) == 0 for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn))
    with torch.no_grad():
        node(*batches[0])
    assert all(held(dtype) == 0 for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn))
    del losses


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, Fp8Recipe()], ids=["bf16", "fp8"])
def test_gpu_steps_repeat_to_the_bit_without_a_host_sync_and_in_a_cuda_graph(recipe):
    hidden, inner = 512, 256
    experts, weights = make_experts(hidden=hidden, inner=inner, dtype=torch.bfloat16, main=False)
    nn.ModuleList(experts).cuda()
    for w in weights:
        w.main_grad = torch.zeros(w.shape, device="cuda")
    node = SonicMoEMlpNode(experts, E, hidden, inner, recipe=recipe, tile=128)
    batches = []
    for seed, rows in enumerate((300, 0, 77)):
        x, counts, ids, probs = received(rows, hidden=hidden, dtype=torch.bfloat16, seed=seed)
        leaves = [t.detach().cuda().requires_grad_() for t in (x, probs)]
        batches.append((leaves[0], counts, ids.cuda(), leaves[1]))

    def step():
        for w in weights:
            w.main_grad.zero_()
        outs = [node(*b) for b in batches]
        for out in outs:
            out.backward(torch.ones_like(out))
        node.step()

    step()
    first = mains(weights)
    expected = SonicMoEMlpNode(experts, E, hidden, inner)  # in BF16
    for w in weights:
        w.main_grad.zero_()
    for b in batches:
        run(expected, b)
    expected.step()
    for w, g in zip(weights, first, strict=True):
        assert oracle.rel_fro(g, w.main_grad) < (0.12 if recipe else 1e-6)

    with no_host_waits():
        step()
    assert all(torch.equal(w.main_grad, g) for w, g in zip(weights, first, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for w in weights:
        w.main_grad.fill_(7)
    graph.replay()
    assert all(torch.equal(w.main_grad, g) for w, g in zip(weights, first, strict=True))
    with torch.no_grad():
        weights[0].mul_(2)  # a replay copies the weights anew
    graph.replay()
    assert not torch.equal(weights[0].main_grad, first[0])
