"""``MegaMoE`` on GPUs: alone against the definition, in graphs and in random launches, and over ranks."""

from __future__ import annotations

import math
import random
import time

import mega_cases as cases
import pytest
import torch
from inference_oracle import Case
from mega_cases import calc_diff, worst_row
from ranks import run_ranks
from torch import Tensor

pytest.importorskip("cuda.bindings.nvrtc")

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.inference import workspace
from supersonic_moe.kernels.reference import local_ids
from supersonic_moe.kernels.reference.inference import Fp8Experts, moe_fp8
from supersonic_moe.parallel import MegaMoE, mega_deep_gemm

HIDDEN, INTER, EXPERTS, CHOICES = 512, 2048, 8, 4  # in shorter rows of c a code that turns over may cost a row 0.03
STREAMED = (
    int(workspace.few_rows(HIDDEN, EXPERTS)) * EXPERTS // CHOICES
)  # tokens up to which rows are streamed; more go through tiles
SIZES = {"hidden": HIDDEN, "inter": INTER, "local": EXPERTS, "num_experts": EXPERTS, "choices": CHOICES}
CALLS = {
    "streamed": (8, [((7, 1), 0.0, None), ((0, 8), 0.3, 10.0), ((8, 8), 0.7, 1.0), ((1, 0), 1.0, None)]),
    "in tiles": (400, [((201, 1), 0.0, None), ((0, 260), 0.3, 10.0), ((400, 180), 0.7, 1.0), ((0, 0), 0.0, None)]),
}
"""Of two ranks, by what the operator does with their rows: the most tokens of a rank, and calls."""


def alone(tokens: int, kind: str = "contest", masked: float = 0.0, seed: int = 0) -> Case:
    return cases.on_gpu(cases.case_of(tokens, kind, masked, seed, **SIZES))


def layer(most: int = 8192) -> MegaMoE:
    return MegaMoE(None, EXPERTS, HIDDEN, INTER, CHOICES, most)


def definition(case: Case, limit: float | None = None) -> Tensor:
    experts = Fp8Experts(case.w13, case.w13_scale, case.w2, case.w2_scale)
    ids = local_ids(case.ids, EXPERTS)
    return moe_fp8(case.x, case.x_scale, experts, case.weights, ids, order=GateUpLayout.GATE_UP, limit=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["contest", "all_positive"])
@pytest.mark.parametrize(("masked", "limit"), [(0.0, None), (0.3, 10.0), (0.7, 1.0), (1.0, None)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 333, 8192])
def test_like_the_definition(tokens: int, masked: float, limit: float | None, kind: str) -> None:
    case = alone(tokens, kind, masked)
    received = torch.zeros(EXPERTS, dtype=torch.int32, device="cuda")
    got = cases.call(layer(), case, swiglu_limit=limit, received_rows=received)
    want = definition(case, limit)
    assert calc_diff(got, want) <= 0.001 and worst_row(got, want) <= 0.03
    nowhere = ((case.ids < 0) | (case.ids >= EXPERTS)).all(1)
    assert got[nowhere].view(torch.int16).eq(0).all()  # +0, by bits
    assert received.tolist() == [int((case.ids == e).sum()) for e in range(EXPERTS)]


@pytest.mark.gpu
def test_graphs_of_several_sizes_replayed_with_other_contents() -> None:
    mega, graphs = layer(), {}
    for tokens in (1, 60, 900):
        case = alone(tokens)
        received = torch.zeros(EXPERTS, dtype=torch.int32, device="cuda")
        cases.call(mega, case, received_rows=received)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cases.call(mega, case, received_rows=received)
        graphs[tokens] = graph, case, received, out
    for seed, tokens in enumerate((60, 1, 900, 1, 60, 900)):
        graph, case, received, out = graphs[tokens]
        other = alone(tokens, masked=0.3, seed=seed + 1)
        for name in ("x", "x_scale", "ids", "weights"):
            getattr(case, name).copy_(getattr(other, name))
        out.fill_(math.nan)
        before = received.clone()
        graph.replay()
        assert torch.equal(out, cases.call(mega, case))
        assert (received - before).tolist() == [int((case.ids == e).sum()) for e in range(EXPERTS)]


@pytest.mark.gpu
def test_two_instances_take_turns() -> None:
    first, second = layer(), layer()
    calls = [alone(tokens, masked=0.3, seed=tokens) for tokens in (5, 300, 5000, 64)]
    alone_first = [cases.call(first, case) for case in calls]
    for _ in range(3):
        for case, expected in zip(calls, alone_first, strict=True):
            out = torch.full_like(expected, math.nan)
            assert torch.equal(cases.call(second, case, out=out), expected)
            assert torch.equal(cases.call(first, case, out=out, accumulate=True), expected + expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("least", "most"), [(1, STREAMED), (STREAMED + 1, 4 * STREAMED)], ids=["streamed", "in tiles"])
def test_a_thousand_random_launches(least: int, most: int) -> None:
    """Any tokens of a batch, as many as the same kernels take."""
    case, mega, draw = alone(most, masked=0.3), layer(most), random.Random(0)
    whole = cases.call(mega, case)
    other = torch.zeros((), dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(1000):
        tokens = draw.randint(least, most)
        first = draw.randint(0, most - tokens)
        rows = slice(first, first + tokens)
        other |= (cases.call(mega, case, rows) != whole[rows]).any()
    assert not bool(other)
    assert time.perf_counter() - start < 20


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_device() -> None:
    case, mega = alone(300), layer()
    received = torch.zeros(EXPERTS, dtype=torch.int32, device="cuda")
    out = cases.call(mega, case, received_rows=received)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cases.call(mega, case, received_rows=received, out=out, accumulate=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_in_the_words_of_deep_gemm() -> None:
    buffer = mega_deep_gemm.get_symm_buffer_for_mega_moe(None, EXPERTS, 512, CHOICES, HIDDEN, INTER)
    for tokens in (512, 3, 0, 100):
        case = alone(tokens, masked=0.3, seed=tokens)
        weights = (case.w13, case.w13_scale), (case.w2, case.w2_scale)
        pairs = mega_deep_gemm.transform_weights_for_mega_moe_sm90(*weights)
        for name, given in (
            ("x", case.x), ("x_sf", case.x_scale), ("topk_idx", case.ids), ("topk_weights", case.weights)
        ):  # fmt: skip
            getattr(buffer, name)[:tokens].copy_(given)
        y = torch.full((tokens, HIDDEN), math.nan, device="cuda").bfloat16()
        mega_deep_gemm.fp8_mega_moe(y, *pairs, buffer, activation_clamp=10.0)
        assert torch.equal(y, cases.call(layer(), case, swiglu_limit=10.0))
    buffer.destroy()


# ---- several ranks ---------------------------------------------------------------------------------------------------

OVER = [
    pytest.param({"gpu": True}, marks=pytest.mark.gpu, id="one GPU"),
    pytest.param({"backend": "nccl"}, marks=pytest.mark.multigpu, id="NCCL"),
]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("transport", ["gather", "all_to_all", pytest.param("push", marks=pytest.mark.multigpu)])
@pytest.mark.parametrize("rows", CALLS)
def test_ranks_together_have_the_bits_of_one_process(rows: str, transport: str, over: dict) -> None:
    most, calls = CALLS[rows]
    assert run_ranks(2, cases.same_as_one_process, calls, transport, most, **over) == [[], []]


@pytest.mark.parametrize("rows", CALLS)
def test_one_process_and_each_rank_take_the_same_kernels(rows: str) -> None:
    """In the calls above, with both transports: those of streamed rows and of tiles round differently."""
    (most, calls), here = CALLS[rows], cases.E // 2
    for number, (tokens, masked, _) in enumerate(calls):
        ids = cases.case_of(sum(tokens), masked=masked, seed=number).ids
        arrived = [int(((ids >= first) & (ids < first + here)).any(1).sum()) for first in (0, here)]
        for count in (2 * most, *filter(None, (sum(tokens), *arrived))):  # places of gather; of one process; all_to_all
            at_most = count * cases.K
            assert workspace.streams(at_most, at_most / 2, cases.H, cases.I, here) == (rows == "streamed")


@pytest.mark.multigpu
@pytest.mark.parametrize(("most", "direct"), [(cases.MOST, False), (cases.few_tokens(2), True)])
def test_a_call_of_two_ranks_is_captured_in_a_graph(most: int, direct: bool) -> None:
    assert run_ranks(2, cases.in_a_graph, most, direct, backend="nccl") == [[], []]
