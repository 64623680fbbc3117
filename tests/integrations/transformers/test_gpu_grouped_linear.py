"""The grouped products behind gates that nobody knows, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_graphs import in_graph
from host_waits import no_host_waits
from oracle import rel_fro
from torch import Tensor

import supersonic_moe as sm

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def grouped_case(dtype: torch.dtype, gather: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    num_experts, columns, depth, count, k = 6, 144, 200, 70, 3
    plan = sm.plan_from_topk(torch.randint(num_experts + 1, (count, k), device=CUDA), num_experts)  # some to nobody
    x = torch.randn(count if gather else plan.capacity, depth, device=CUDA, dtype=dtype)
    if not gather:
        x[int(plan.expert_offsets[-1]) :] = torch.nan
    w = torch.randn(num_experts, columns, depth, device=CUDA, dtype=dtype) / depth**0.5
    bias = torch.randn(num_experts, columns, device=CUDA, dtype=dtype)
    dy = torch.randn(plan.capacity, columns, device=CUDA, dtype=dtype)
    return plan, [t.requires_grad_() for t in (x, w, bias)], dy


@DTYPES
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_linear(dtype: torch.dtype, gather: bool, transposed: bool) -> None:
    plan, (x, w, bias), dy = grouped_case(dtype, gather)
    stored = w.detach().mT.contiguous().mT.requires_grad_() if transposed else w
    y = sm.grouped_linear(x, stored, plan, bias=bias, gather=gather)
    got = [y, *torch.autograd.grad(y, (x, stored, bias), dy)]
    doubles = [t.detach().double().cpu().requires_grad_() for t in (x, w, bias)]
    on_cpu = sm.RoutingPlan(*(t.cpu() if isinstance(t, Tensor) else t for t in vars(plan).values()))
    want_y = sm.grouped_linear(doubles[0], doubles[1], on_cpu, bias=doubles[2], gather=gather)
    want = [want_y, *torch.autograd.grad(want_y, doubles, dy.double().cpu())]
    assert all(rel_fro(a.detach(), b.detach()) < 5e-3 for a, b in zip(got, want, strict=True))
    dead = int(plan.expert_offsets[-1])
    assert not y[dead:].any() and (gather or not got[1][dead:].any())


def test_grouped_linear_in_fp8() -> None:
    plan, (x, w, bias), dy = grouped_case(torch.bfloat16, gather=True)
    found = []
    for recipe in (sm.Fp8Recipe(), None):
        y = sm.grouped_linear(x, w, plan, bias=bias, gather=True, recipe=recipe)
        found.append([y, *torch.autograd.grad(y, (x, w, bias), dy)])
    assert all(rel_fro(a.detach(), b.detach()) < 0.07 for a, b in zip(*found, strict=True))


OFFSETS = ([30, 30, 71, 90, 100], [0, 5, 5, 127, 128], [0, 0, 0, 0, 0], [128, 128, 128, 128, 128])
"""Ends of five experts in 128 rows: other experts, other dead rows, none, all of one."""


@pytest.mark.parametrize("recipe", [None, sm.Fp8Recipe()], ids=["as it is", "fp8"])
@pytest.mark.parametrize("biased", [True, False])
@DTYPES
def test_a_cuda_graph_replays_with_other_contents_and_offsets(
    dtype: torch.dtype, biased: bool, recipe: sm.Fp8Recipe | None
) -> None:
    """Forward and backward, which wait for nobody."""
    if recipe is not None and dtype is torch.float16:
        pytest.skip("FP8 products are of bfloat16")
    x = torch.randn(128, 256, device=CUDA, dtype=dtype).requires_grad_()
    w = (torch.randn(5, 384, 256, device=CUDA, dtype=dtype) / 16).requires_grad_()
    bias = torch.randn(5, 384, device=CUDA, dtype=dtype).requires_grad_() if biased else None
    dy = torch.randn(128, 384, device=CUDA, dtype=dtype)
    ends = torch.tensor([20, 50, 60, 100, 120], device=CUDA, dtype=torch.int32)
    leaves = [t for t in (x, w, bias) if t is not None]

    def call() -> list[Tensor]:
        y = sm.grouped_linear(x, w, ends, bias=bias, recipe=recipe)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    call()
    with no_host_waits():
        call()
    graph, captured = in_graph(call)
    for numbers in OFFSETS:
        with torch.no_grad():
            for t in (*leaves, dy):
                t.copy_(torch.randn_like(t) / 16)
        ends.copy_(torch.tensor(numbers))
        for t in captured:
            t.fill_(torch.nan)  # what is not written shows
        graph.replay()
        assert all(map(torch.equal, captured, call()))
        y, dx, dw = captured[:3]
        assert not y[numbers[-1] :].any() and not dx[numbers[-1] :].any()
        owner = [e for e in range(5) for _ in range(numbers[e] - (numbers[e - 1] if e else 0))]
        for e in range(5):
            rows = [r for r, of in enumerate(owner) if of == e]
            want = dy[rows].double().T @ x.detach()[rows].double()
            assert rel_fro(dw[e], want) < (5e-3 if recipe is None else 0.07)
