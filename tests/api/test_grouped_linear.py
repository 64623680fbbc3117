"""``grouped_linear`` against a loop over experts in fp64: rows and gathered tokens, bias, dead rows, weights stored
either way, FP8, compiled; and the contracts of its ops.
"""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from compiled_graphs import Graphs
from torch import Tensor
from torch.library import opcheck

import supersonic_moe as sm
from supersonic_moe import grouped
from supersonic_moe.training.arguments import Plan
from supersonic_moe.training.fields import Fields

E, N, C, T, K = 4, 24, 16, 10, 3


def operands(
    rows: int, *, bias: bool = True, transposed: bool = False, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(0)
    w = torch.randn(E, C, N, dtype=dtype).mT if transposed else torch.randn(E, N, C, dtype=dtype)
    tensors = [torch.randn(rows, C, dtype=dtype), w, *([torch.randn(E, N, dtype=dtype)] if bias else [])]
    return [t.requires_grad_() for t in tensors]


def definition(x: Tensor, w: Tensor, bias: Tensor | None, owner: list[int]) -> Tensor:
    """``owner``: expert of each row, E for none."""
    zero = x.new_zeros(w.shape[1])
    rows = [zero if e == E else w[e] @ row + (0 if bias is None else bias[e]) for row, e in zip(x, owner, strict=True)]
    return torch.stack(rows)


def assert_same(got: Tensor, want: Tensor, leaves: list[Tensor], dy: Tensor) -> None:
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got, leaves, dy, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(want, leaves, dy))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("int64", [True, False])
def test_rows_by_offsets(bias: bool, transposed: bool, int64: bool) -> None:
    counts, dead = [5, 0, 7, 1], 3
    owner = [e for e, n in enumerate(counts) for _ in range(n)] + [E] * dead
    leaves = operands(len(owner), bias=bias, transposed=transposed)
    x, w, b = (*leaves, None)[:3]
    offsets = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int64 if int64 else torch.int32)
    dy = torch.randn(len(owner), N, dtype=torch.float64)
    got = sm.grouped_linear(x, w, offsets, bias=b)
    assert_same(got, definition(x, w, b, owner), leaves, dy)
    assert not got[-dead:].any()
    (dw,) = torch.autograd.grad(got, w, dy)
    assert dw.stride() == w.stride(), "autograd copies a gradient of other strides than its parameter's"


def test_dead_rows_are_never_read() -> None:
    counts, dead = [5, 0, 7, 1], 3
    leaves = operands(sum(counts) + dead)
    x, w, b = leaves
    with torch.no_grad():
        x[-dead:] = math.nan
    dy = torch.randn(len(x), N, dtype=torch.float64)
    dy[-dead:] = math.nan
    y = sm.grouped_linear(x, w, torch.tensor(counts).cumsum(0), bias=b)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    assert not y[-dead:].any() and not dx[-dead:].any()
    assert all(t.isfinite().all() for t in (y, dx, dw, db))


@pytest.mark.parametrize("tile", [1, 4])
def test_tokens_gathered_by_a_plan(tile: int) -> None:
    ids = torch.tensor([[0, 3, 3], [E, -1, 2], *torch.randint(E, (T - 2, K)).tolist()])  # a twin, two sentinels
    plan = sm.plan_from_topk(ids, E) if tile == 1 else sm.plan_from_topk(ids, E, tile=tile)
    leaves = operands(T)
    x, w, b = leaves
    token, owner = plan.gather_index.tolist(), plan.row_expert.tolist()
    rows = torch.stack([x[t] if t >= 0 else torch.zeros_like(x[0]) for t in token])
    dy = torch.randn(plan.capacity, N, dtype=torch.float64)
    got = sm.grouped_linear(x, w, plan, bias=b, gather=True)
    assert_same(got, definition(rows, w, b, owner), leaves, dy)


def test_two_of_them_and_a_gate_are_an_expert_mlp() -> None:
    """A gate of the caller's between two products, then the weighted sum: the layer that is built in."""
    ids, scores = torch.randint(E, (T, K)), torch.rand(T, K, dtype=torch.float64)
    w1, b1, w2, b2 = oracle.weights(E, C, N, 2)
    x = torch.randn(T, C, dtype=torch.float64, requires_grad=True)
    plan = sm.plan_from_topk(ids, E)
    gate, up = sm.grouped_linear(x, w1, plan, bias=b1, gather=True).chunk(2, -1)
    y = sm.grouped_linear(torch.nn.functional.silu(gate) * up, w2, plan, bias=b2)
    out = (y[plan.reverse_index.long()].view(T, K, C) * scores[..., None]).sum(1)
    want = sm.topk_experts(x, ids, scores, w1, w2, b1=b1, b2=b2, layout="gate_up")
    assert_same(out, want, [x, w1, b1, w2, b2], torch.randn(T, C, dtype=torch.float64))


@pytest.mark.parametrize("recipe", [sm.Fp8Recipe(), sm.Fp8Recipe(wgrad="bf16", scale="pow2")], ids=str)
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("positive", [True, False])
def test_fp8_is_within_its_contract(recipe: sm.Fp8Recipe, gather: bool, positive: bool) -> None:
    torch.manual_seed(1)
    tokens, hidden, width = 96, 256, 384
    plan = sm.plan_from_topk(torch.randint(E, (tokens, K)), E)
    shapes = (tokens if gather else plan.capacity, hidden), (E, width, hidden), (E, width)
    leaves = [torch.randn(shape).abs() if positive else torch.randn(shape) for shape in shapes]
    leaves = [t.bfloat16().requires_grad_() for t in leaves]
    x, w, b = leaves
    got = sm.grouped_linear(x, w, plan, bias=b, gather=gather, recipe=recipe)
    want = sm.grouped_linear(x.double(), w.double(), plan, bias=b.double(), gather=gather)
    dy = torch.randn(plan.capacity, width).bfloat16()
    grads = [torch.autograd.grad(y, leaves, dy.to(y.dtype)) for y in (got, want)]
    for name, ours, exact in zip(("y", "dx", "dw"), (got, *grads[0][:2]), (want, *grads[1][:2]), strict=True):
        in_bf16 = name == "dw" and recipe.wgrad == "bf16"
        lowest, highest = (0.0, 4e-3) if in_bf16 else (1e-3, 0.07)
        assert lowest < oracle.rel_fro(ours.detach(), exact.detach()) < highest, name
    assert oracle.rel_fro(grads[0][2], grads[1][2]) < 4e-3


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_that_of_the_leaves() -> None:
    leaves = operands(8, dtype=torch.float32)
    x, w, b = leaves
    offsets = torch.tensor([2, 4, 6, 8])
    with torch.autocast("cpu", torch.bfloat16):
        y = sm.grouped_linear(x, w, offsets, bias=b)
        assert y.dtype is torch.bfloat16
        y.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype is torch.float32 for t in leaves)
    assert oracle.rel_fro(y.detach(), sm.grouped_linear(x, w, offsets, bias=b).detach()) < 6e-3


def test_second_derivatives_are_refused() -> None:
    leaves = operands(8)
    x, w, b = leaves
    y = sm.grouped_linear(x, w, torch.tensor([2, 4, 6, 8]), bias=b)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_linear has no second derivatives"):
        dx.sum().backward()


def test_compiles_in_one_graph_for_every_number_of_rows() -> None:
    graphs = Graphs()
    compiled = torch.compile(sm.grouped_linear, fullgraph=True, dynamic=True, backend=graphs)
    for rows in (12, 8, 20):
        leaves = operands(rows)
        x, w, b = leaves
        offsets = torch.tensor([rows // 4, rows // 2, rows // 2, rows - 1])
        dy = torch.randn(rows, N, dtype=torch.float64)
        assert_same(compiled(x, w, offsets, bias=b), sm.grouped_linear(x, w, offsets, bias=b), leaves, dy)
    assert len(graphs) == 1


def cases() -> dict[str, tuple[object, ...]]:
    x, w, b = (t.detach() for t in operands(T, dtype=torch.bfloat16))
    found: dict[str, tuple[object, ...]] = {}
    for gather in (True, False):
        plan = sm.plan_from_topk(torch.randint(E + 1, (T, K)), E)
        rows = x if gather else torch.randn(plan.capacity, C).bfloat16()
        dy = torch.randn(plan.capacity, N).bfloat16()
        q, transposed, scale = torch.ops.supersonic_moe.quantize_weights.default([w], "fp32", "auto")
        plan = Plan.of(plan)
        forward, backward = Fields(grouped.Forward).flat, Fields(grouped.Backward).flat
        found[f"forward-{gather}"] = forward(rows, w, b, None, None, plan, gather, False)
        found[f"forward-{gather}-fp8"] = forward(rows, w, None, q, scale, plan, gather, True)
        turned = w.mT.contiguous().mT
        for fp8 in (False, True):
            copies = (transposed, scale) if fp8 else (None, None)
            for needs in ((True, True, True), (False, True, False)):
                name = f"backward-{gather}-{needs[0]}" + ("-fp8" if fp8 else "")
                stored = w if needs[0] else turned
                found[name] = backward(dy, rows, stored, *copies, plan, gather, False, fp8, *needs)
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.supersonic_moe, f"grouped_linear_{name.split('-')[0]}").default
    schema = () if "fp8" in name else ("test_schema",)  # its comparison of inputs multiplies, e4m3 cannot
    opcheck(op, CASES[name], test_utils=(*schema, "test_faketensor", "test_aot_dispatch_dynamic"))


X, W = torch.zeros(6, C), torch.zeros(E, N, C)
OFFSETS = torch.tensor([1, 2, 3, 6])
BAD = {
    "gather without a plan": (lambda: sm.grouped_linear(X, W, OFFSETS, gather=True), TypeError, "needs a RoutingPlan"),
    "a word for gather": (
        lambda: sm.grouped_linear(X, W, sm.plan_from_topk(torch.zeros(6, 2, dtype=torch.int64), E), gather="no"),
        TypeError,
        "gather must be True or False",
    ),
    "offsets in a list": (lambda: sm.grouped_linear(X, W, [1, 2, 3, 6]), TypeError, r"tensor \(E,\), or a RoutingPlan"),
    "offsets of other experts": (lambda: sm.grouped_linear(X, W, OFFSETS[1:]), ValueError, "length 4"),
    "another width": (lambda: sm.grouped_linear(X[:, 1:].contiguous(), W, OFFSETS), ValueError, "last dimension 15"),
    "another bias": (lambda: sm.grouped_linear(X, W, OFFSETS, bias=W[:, :, 0].T), ValueError, "one bias for each row"),
    "two dtypes": (lambda: sm.grouped_linear(X, W.bfloat16(), OFFSETS), TypeError, "one dtype"),
    "float offsets": (lambda: sm.grouped_linear(X, W, OFFSETS.float()), TypeError, "int32 or int64"),
    "rows that the plan lacks": (
        lambda: sm.grouped_linear(X, W, sm.plan_from_topk(torch.zeros(6, 2, dtype=torch.int64), E)),
        ValueError,
        "rows 12",
    ),
    "FP8 of fp32": (lambda: sm.grouped_linear(X, W, OFFSETS, recipe=sm.Fp8Recipe()), TypeError, "bfloat16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_sentence(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
