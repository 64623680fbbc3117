"""The inference operator on a GPU, from logits or ids to the combined output: errors, and what must not change it."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from host_waits import no_host_waits
from torch import Tensor

pytest.importorskip("cuda.bindings.nvrtc")

from inference_oracle import Case, make_case

from supersonic_moe.config.activation import as_layout
from supersonic_moe.config.grouped_routing import GroupedRouting
from supersonic_moe.inference import SharedExpert, moe_fp8_ds_routed, moe_fp8_topk, replays, workspace_bytes
from supersonic_moe.kernels.reference import local_ids, route_grouped
from supersonic_moe.kernels.reference.inference import Fp8Experts, moe_fp8

pytestmark = pytest.mark.gpu

SIZES = [*range(1, 18), 31, 32, 33, 52, 57, 64, 80, 97, 127, 128, 129, 130, 900]
EXPERTS, LOCAL, HIDDEN, INTER = 64, 8, 512, 512  # up to 512 tokens are streamed
BOUND = (
    0.01  # rows this short scatter (test_accuracy_budget.py); test_gpu_deepseek_shape.py has the bounds of long ones
)
RULE = {"n_group": 8, "topk_group": 4, "top_k": 8}


class Call:
    """One call of ``moe_fp8_ds_routed`` and what it reads; x scales lie (H / 128, T)."""

    def __init__(self, tokens: int, kind: str = "contest", offset: int = 16, seed: int = 0, **sizes: Any) -> None:
        sizes = {"hidden": HIDDEN, "inter": INTER, "local": LOCAL, "order": "up_gate"} | sizes
        self.case: Case = make_case(kind, tokens=tokens, choices=1, num_experts=1, seed=seed, **sizes)
        for name in ("x", "x_scale", "w13", "w13_scale", "w2", "w2_scale"):
            setattr(self.case, name, getattr(self.case, name).cuda())
        self.x_scale = self.case.x_scale.t().contiguous()
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(tokens, EXPERTS, generator=generator).cuda()
        self.bias = (torch.randn(EXPERTS, generator=generator) * 0.1).bfloat16().cuda()
        self.offset = offset

    def __call__(self, **options: Any) -> Tensor:
        c = self.case
        return moe_fp8_ds_routed(
            self.logits, self.bias, c.x, self.x_scale, c.w13, c.w13_scale, c.w2, c.w2_scale, self.offset, 2.5,
            gate_up_order=c.order, **RULE, **options,
        )  # fmt: skip

    def choices(self) -> tuple[Tensor, Tensor]:
        """(weights (T, K), local ids (T, K)) of the reference."""
        rule = GroupedRouting(num_experts=EXPERTS, scaling_factor=2.5, **RULE)
        weights, ids = route_grouped(self.logits, self.bias, rule)
        return weights, local_ids(ids, LOCAL, self.offset, EXPERTS)

    def reference(self, requantize: bool = True) -> Tensor:
        c = self.case
        weights, ids = self.choices()
        experts = Fp8Experts(c.w13, c.w13_scale, c.w2, c.w2_scale)
        scales = self.x_scale.t()
        return moe_fp8(c.x, scales, experts, weights, ids, order=as_layout(c.order), requantize=requantize)


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(relative Frobenius error, worst relative error of a row that is not zero)."""
    difference, size = (got.double() - want.double()).norm(dim=1), want.double().norm(dim=1)
    rows = (difference / size)[size > 0]
    return float(difference.norm() / size.norm()) if len(rows) else 0.0, float(rows.max()) if len(rows) else 0.0


def scattered(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error without the token that differs most, if eight or more have an output. In rows this short
    one large code of c that turns over is 1.8 % of all: emulated tensor cores (test_accuracy_budget.py) err by 0.01761
    in ``Call(64)`` and by 0.01724 in ``Call(40, offset=0)``, and so does an H200, 98 % of it in one token; without it
    by a tenth of that. Infinite where something is that should be zero.
    """
    difference, size = (got.double() - want.double()).square().sum(1), want.double().square().sum(1)
    if not difference.any():
        return 0.0
    left_out = difference.max() if size.count_nonzero() >= 8 else 0.0
    return float(((difference.sum() - left_out) / size.sum()).sqrt())


@pytest.mark.parametrize("tokens", SIZES)
def test_every_size(tokens: int) -> None:
    call = Call(tokens)
    out = call()
    assert scattered(out, call.reference()) <= BOUND
    _, ids = call.choices()
    nowhere = (ids < 0).all(1)
    assert out[nowhere].view(torch.int16).eq(0).all()  # +0, by bits
    whole, row = errors(out, call.reference(requantize=False))
    assert whole <= 0.03 and row <= 0.06


@pytest.mark.parametrize(("kind", "bound"), [("contest", BOUND), ("realistic", BOUND), ("positive", 0.015)])
@pytest.mark.parametrize("order", ["gate_up", "up_gate", "interleaved"])
def test_data_and_orders(order: str, kind: str, bound: float) -> None:
    for tokens in (13, 600):
        call = Call(tokens, kind, order=order)
        assert errors(call(), call.reference())[0] <= bound


@pytest.mark.parametrize("tokens", [4097, 6000])
def test_many_tokens(tokens: int) -> None:
    """Through the tile kernels, whatever tokens choose."""
    call = Call(tokens)
    assert errors(call(), call.reference())[0] <= BOUND
    call.logits[:, 16:24] += 5  # every token
    assert errors(call(), call.reference())[0] <= BOUND
    call.logits[:, 16:24] -= 10  # none
    assert call().view(torch.int16).eq(0).all()
    call.logits[:, 20] += 20  # one hot expert
    assert errors(call(), call.reference())[0] <= BOUND


@pytest.mark.parametrize("offset", [-3, 0, 60, 63, 64, 1000])
def test_offsets(offset: int) -> None:
    call = Call(40, offset=offset)
    got, want = call(), call.reference()
    assert scattered(got, want) <= BOUND
    assert errors(got, call.reference(requantize=False))[0] <= 0.03


def test_nothing_is_remembered() -> None:
    """Logits, x, scales and weights changed in place between calls."""
    call = Call(24)
    call()
    for tensor in (call.logits, call.x_scale, call.case.w13_scale, call.case.w2_scale):
        tensor.copy_(torch.randn_like(tensor))
        assert errors(call(), call.reference())[0] <= BOUND
    for tensor in (call.case.x, call.case.w13, call.case.w2):
        tensor.copy_(torch.randn(tensor.shape, device="cuda").clamp(-2, 2))
        assert errors(call(), call.reference())[0] <= BOUND


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF])
def test_poisoned_output_and_workspace(byte: int) -> None:
    for tokens in (5, 128, 1500):
        call = Call(tokens)
        needed = workspace_bytes(tokens, 8, HIDDEN, INTER, LOCAL)
        memory = torch.full((needed + 256,), byte, dtype=torch.uint8, device="cuda")
        out = torch.full((tokens, HIDDEN), math.nan, dtype=torch.bfloat16, device="cuda")
        got = call(out=out, workspace=memory[:needed])
        assert got is out and torch.equal(out, call())
        assert memory[needed:].eq(byte).all()


def test_rows_of_nan_stay_where_they_are() -> None:
    call = Call(50)
    clean = call()
    _, ids = call.choices()
    nowhere = (ids < 0).all(1)
    assert nowhere.any() and not nowhere.all()
    call.case.x.view(torch.uint8)[nowhere] = 0x7F
    call.x_scale[:, nowhere] = math.nan
    assert torch.equal(call(), clean)
    first = int((~nowhere).nonzero()[0])
    call.case.x.view(torch.uint8)[first] = 0x7F
    out = call()
    assert out[first].isnan().all()
    others = torch.arange(50, device="cuda") != first
    assert torch.equal(out[others], clean[others])


def test_logits_of_nan_in_a_capture() -> None:
    call = Call(16)
    call()
    call.logits.fill_(math.nan)
    graph, out = capture(call)
    graph.replay()
    call.logits.copy_(torch.randn_like(call.logits))
    call.logits[3] = math.nan
    graph.replay()
    keep = torch.arange(16, device="cuda") != 3
    assert errors(out[keep], call.reference()[keep])[0] <= BOUND


@pytest.mark.parametrize("tokens", [1, 33, 128, 600, 1500])
def test_graph_replays_with_new_contents(tokens: int) -> None:
    call = Call(tokens)
    call()
    graph, out = capture(call)
    for seed in range(1, 4):
        other = Call(tokens, seed=seed)
        call.logits.copy_(other.logits), call.case.x.copy_(other.case.x), call.x_scale.copy_(other.x_scale)
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, call())
        assert errors(out, call.reference())[0] <= BOUND


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def moved(tensor: Tensor, by: int = 0) -> Tensor:
    """Equal, elsewhere: ``by`` elements behind the start of its memory."""
    memory = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device="cuda")[by:]
    return torch.as_strided(memory, tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("tokens", [3, 200, 1500])
def test_tensors_elsewhere_in_a_call_made_before(tokens: int) -> None:
    call = Call(tokens)
    expected = call()
    kept = len(replays._of_thread.calls)
    needed = workspace_bytes(tokens, 8, HIDDEN, INTER, LOCAL)
    for by in (0, 0, 16, 1, 4, 32):  # noted, recorded, replayed; by 1 and 4 elements x does not start at 16 bytes
        for name in ("logits", "bias", "x_scale"):
            setattr(call, name, moved(getattr(call, name), by))
        call.case.x = moved(call.case.x, by)
        out = moved(torch.full_like(expected, math.nan), by)
        memory = torch.empty(needed + 256 * by, dtype=torch.uint8, device="cuda")[256 * by :]
        assert torch.equal(call(), expected)
        assert call(out=out, workspace=memory) is out and torch.equal(out, expected)
    assert len(replays._of_thread.calls) <= kept + 2
    call.case.w13 = moved(call.case.w13)
    call.case.w13.copy_(torch.randn(call.case.w13.shape, device="cuda").clamp(-2, 2))
    assert errors(call(), call.reference())[0] <= BOUND


def test_result_over_the_input() -> None:
    case = make_case("realistic", tokens=9, hidden=HIDDEN, inter=INTER, local=5, choices=2, num_experts=5)
    experts = [t.cuda() for t in (case.w13, case.w2, case.w13_scale, case.w2_scale)]
    ids, weights = case.ids.cuda(), case.weights.cuda()

    def call(x: Tensor, out: Tensor | None = None) -> Tensor:
        return moe_fp8_topk(x, *experts, weights, ids, gate_up_order=case.order, out=out)

    x = torch.randn(9, HIDDEN, device="cuda").bfloat16()
    expected = call(x)
    for _ in range(2):
        over = x.clone()
        assert torch.equal(call(over, out=over), expected)
        elsewhere = torch.empty_like(x)
        assert torch.equal(call(x.clone(), out=elsewhere), expected)


def test_host_time_of_a_call_made_before() -> None:
    """The best of five times forty: other processes want the cores, too."""
    call = Call(1)
    call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(40):
            call()
        times.append((time.perf_counter() - begin) / 40)
    assert min(times) <= 60e-6  # 25 us where nothing else runs
    torch.cuda.synchronize()


def test_on_another_stream() -> None:
    call = Call(64)
    expected = call()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        out = call()
    side.synchronize()
    assert torch.equal(out, expected)


def test_a_token_alone_and_in_a_batch() -> None:
    """The same bits where the same kernels work."""
    call = Call(128)
    whole = call()
    for first, end in ((0, 1), (5, 7), (10, 43), (0, 127)):
        part = Call(128)
        part.logits, part.case.x = call.logits[first:end], call.case.x[first:end]
        part.x_scale = call.x_scale[:, first:end]
        assert torch.equal(part(), whole[first:end])


@pytest.mark.parametrize("tokens", [1, 20, 128, 1100])
@pytest.mark.parametrize("shared", [False, True])
def test_topk(shared: bool, tokens: int) -> None:
    """bf16 x, a map with sentinels, duplicates, a clamp, a shared expert."""
    case = make_case(
        "realistic", tokens=tokens, hidden=HIDDEN, inter=INTER, local=6, choices=4, num_experts=24, order="gate_up"
    )
    extra = make_case("realistic", tokens=1, hidden=HIDDEN, inter=INTER, local=1, seed=3, order="gate_up")
    x = torch.randn(tokens, HIDDEN).bfloat16().cuda()
    experts = Fp8Experts(case.w13.cuda(), case.w13_scale.cuda(), case.w2.cuda(), case.w2_scale.cuda())
    one = Fp8Experts(extra.w13.cuda(), extra.w13_scale.cuda(), extra.w2.cuda(), extra.w2_scale.cuda())
    ids, weights = case.ids.cuda(), case.weights.cuda()
    ids[0, 1] = ids[0, 0]
    ids[-1] = torch.tensor([-1, 24, 2**31 - 1, 3])
    placed = torch.full((24,), -1, dtype=torch.int32, device="cuda")
    placed[torch.randperm(24, device="cuda")[:6]] = torch.randperm(6, device="cuda").int()
    got = moe_fp8_topk(
        x, experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, weights, ids, expert_map=placed,
        gate_up_order="gate_up", swiglu_limit=1.0, routed_scaling_factor=1.5,
        shared_expert=SharedExpert(one.w13[0], one.w2[0], one.w13_scale[0], one.w2_scale[0]) if shared else None,
    )  # fmt: skip
    want = moe_fp8(
        x, None, experts, weights, local_ids(ids, 6, expert_map=placed), order=as_layout("gate_up"), limit=1.0,
        scaling_factor=1.5, shared=one if shared else None,
    )  # fmt: skip
    assert errors(got, want)[0] <= 0.006


@pytest.mark.parametrize("tokens", [3, 700])
def test_router_weight_on_the_input(tokens: int) -> None:
    case = make_case("realistic", tokens=tokens, hidden=HIDDEN, inter=INTER, local=5, choices=1, num_experts=5)
    experts = Fp8Experts(case.w13.cuda(), case.w13_scale.cuda(), case.w2.cuda(), case.w2_scale.cuda())
    x, x_scale, ids, weights = case.x.cuda(), case.x_scale.cuda(), case.ids.cuda(), case.weights.cuda()
    got = moe_fp8_topk(
        x, experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, weights, ids, x_scale=x_scale,
        gate_up_order=case.order, apply_router_weight_on_input=True,
    )  # fmt: skip
    order = as_layout(case.order)
    want = moe_fp8(x, x_scale, experts, weights, ids.long(), order=order, weight_on_input=True)
    assert errors(got, want)[0] <= 0.006


def test_nobody_waits_for_the_host() -> None:
    for tokens in (16, 1500):
        call = Call(tokens)
        call()
        with no_host_waits():
            call()
