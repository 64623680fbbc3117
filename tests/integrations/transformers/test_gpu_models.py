"""Models of Transformers on a GPU: the experts of each family in BF16 and fp16, on the tokens that they meet inside the
model; whole models; decode in a CUDA graph; nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_waits import no_host_waits
from oracle import rel_fro
from torch import Tensor, nn
from transformers_experts import decorated_classes, inputs, outputs_and_gradients, random_experts
from transformers_models import FAMILIES, model_of, tokens

import supersonic_moe as sm
from supersonic_moe.integrations.transformers import served

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def first_experts(model: nn.Module, ids: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """The first layer of experts, and what the model hands to it."""
    (experts,) = (m for name, m in model.named_modules() if name == served(model)[0].layer)
    seen: list[list[Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda _, given: seen.append([t.detach().clone() for t in given[:3]]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return experts, seen[0]


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_no_further_from_fp64_than_the_librarys(family: str, dtype: torch.dtype) -> None:
    model, ids = model_of(family, dtype).to(CUDA), tokens(4, 32).to(CUDA)
    experts, (x, chosen, scores) = first_experts(model, ids)
    assert_no_further(experts, x, chosen, scores)


def assert_no_further(experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor) -> None:
    given = x.requires_grad_(), ids, scores.requires_grad_()
    ours = outputs_and_gradients(experts, "supersonic", *given)
    eager = outputs_and_gradients(experts, "eager", *given)
    doubles = (x.detach().double().requires_grad_(), ids, scores.detach().double().requires_grad_())
    exact = outputs_and_gradients(experts.double(), "eager", *doubles)
    for leaf in exact:
        assert rel_fro(ours[leaf], exact[leaf]) < 1.2 * rel_fro(eager[leaf], exact[leaf]) + 5e-4, leaf


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_like_that_of_its_own_experts(family: str, dtype: torch.dtype) -> None:
    model, ids = model_of(family, dtype).to(CUDA), tokens(4, 32).to(CUDA)
    losses = []
    for implementation in ("supersonic", "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_an_expert_named_twice_counts_twice() -> None:
    experts = random_experts(decorated_classes()["DeepseekV4Experts"], torch.bfloat16).to(CUDA)
    x, ids, scores = (t.detach().to(CUDA) for t in inputs(experts, torch.bfloat16))
    ids[:6] = 2
    assert_no_further(experts, x, ids, scores)


def in_graph(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


DECODED = ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "Gemma4TextExperts", "Qwen3MoeExperts"]


@pytest.mark.parametrize("training", [True, False], ids=["layer", "decode"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", DECODED)
def test_decode_never_waits_and_fits_a_cuda_graph(name: str, batch: int, training: bool) -> None:
    """By the layer's own kernels, as in train mode, and by those of decode."""
    experts = random_experts(decorated_classes()[name], torch.bfloat16).to(CUDA).train(training)
    experts.config._experts_implementation = "supersonic"
    x, ids, scores = (t.detach()[:batch].to(CUDA) for t in inputs(experts, torch.bfloat16))

    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = experts(x, ids, scores)
        return out

    first = call()
    with no_host_waits():
        again = call(), call()  # recorded, then played, where a tape can hold it
    assert all(torch.equal(out, first) for out in again)
    graph, out = in_graph(call)
    x.copy_(torch.randn_like(x))
    ids.copy_((ids + 1) % 4)
    graph.replay()
    assert torch.equal(out, call())


def test_generation_is_that_of_fp32_on_the_cpu() -> None:
    model, ids = model_of("qwen3_moe"), tokens()
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    found = model.to(CUDA).generate(ids.to(CUDA), max_new_tokens=6, do_sample=False)
    assert torch.equal(found.cpu(), wanted)


# ---- the grouped products behind unknown gates -----------------------------------------------------------------------


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
