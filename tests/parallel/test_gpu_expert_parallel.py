"""Expert parallelism on GPUs: ranks that share one over gloo, and over NCCL with a GPU each."""

from __future__ import annotations

import re

import beside_cases as beside
import overflow_cases
import parallel_cases as cases
import pytest
import torch
from ranks import end_ranks, run_ranks

from supersonic_moe import Fp8Recipe

BF16 = torch.bfloat16
CALLS = [
    ((333, 7), BF16, "random", True),
    ((0, 333), BF16, "skewed", False),
    ((1, 0), BF16, "masked", True),
    ((0, 0), BF16, "random", False),
    ((7, 7), BF16, "one rank", True),
    ((128, 200), BF16, "nobody", False),
]
FP8 = Fp8Recipe(scale="pow2")
WAYS = [
    pytest.param({"transport": "all_to_all"}, id="exact"),
    pytest.param({"capacity": 512}, id="capacity"),
    pytest.param({"transport": "gather"}, id="gather"),
    pytest.param({"transport": "push"}, id="push", marks=pytest.mark.multigpu),
]
OVER = [
    pytest.param({"gpu": True}, marks=pytest.mark.gpu, id="one GPU"),
    pytest.param({"backend": "nccl"}, marks=pytest.mark.multigpu, id="NCCL"),
]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_together_have_the_bits_of_one_process(over: dict, way: dict) -> None:
    assert run_ranks(2, cases.same_as_one_process, CALLS, way, **over) == [[], []]


@pytest.mark.gpu
def test_four_ranks_on_one_gpu() -> None:
    calls = [((333, 0, 7, 100), BF16, "random", True), ((0, 1, 0, 0), BF16, "masked", False)]
    assert run_ranks(4, cases.same_as_one_process, calls, gpu=True) == [[]] * 4


@pytest.mark.parametrize("over", OVER)
def test_fp8_experts_have_the_bits_of_one_process(over: dict) -> None:
    assert run_ranks(2, cases.same_with, {"recipe": Fp8Recipe()}, (37, 150), **over) == [[], []]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    ("hidden", "way"),
    [
        (256, {}),
        (136, {"capacity": 700}),
        (256, {"transport": "gather"}),
        pytest.param(136, {"transport": "push"}, marks=pytest.mark.multigpu),
    ],
)
def test_an_fp8_wire_carries_what_the_experts_would_make(over: dict, hidden: int, way: dict) -> None:
    found = run_ranks(2, cases.over_an_fp8_wire, (700, 531), FP8, True, hidden, way, **over)
    assert found == [[], []]


@pytest.mark.parametrize("over", OVER)
def test_overflow_is_never_silent(over: dict) -> None:
    for out, checked, after, later in run_ranks(2, overflow_cases.on_a_gpu, **over):
        assert out == "NaN"
        assert "more than capacity = 3 tokens to another in a call; one had 4" in checked
        assert after == "no error", "it has been reported"
        assert later.startswith("8: ValueError") and "one had 4" in later


@pytest.mark.multigpu
@pytest.mark.parametrize("way", WAYS[1:])
def test_calls_without_host_sizes_are_captured_in_a_graph(way: dict) -> None:
    assert run_ranks(2, cases.in_a_graph, way, backend="nccl") == [[], []]


@pytest.mark.multigpu
def test_auto_takes_copies_between_two_gpus() -> None:
    """First, because the tests below are of copies only where this holds; the sentence says what is in the way."""
    for text in run_ranks(2, cases.explanation, backend="nccl"):
        assert "transport: gather, by copies between GPUs that reach each other's memory" in text, text


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", ["gather", "push"])
def test_rows_too_wide_for_copies_go_through_collectives(transport: str) -> None:
    calls = [((33, 7), torch.float32, "random", True), ((33, 7), BF16, "random", True)]
    assert run_ranks(2, cases.same_as_one_process, calls, {"transport": transport}, backend="nccl") == [[], []]


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", ["gather", "push"])
def test_random_calls_over_copies_repeat_to_the_bit(transport: str) -> None:
    """Only two GPUs show whether memory is ordered between them."""
    way = {"transport": transport}
    assert run_ranks(2, cases.repeats_to_the_bit, 1000, way, backend="nccl", timeout_s=300) == [True, True]


@pytest.mark.multigpu
@pytest.mark.parametrize("fp8", [False, True])
def test_rows_beside_products_have_the_bits_of_rows_before_and_after(fp8: bool) -> None:
    calls = [(1500, 1500), (1500, 3), (0, 1500), (700, 1400)] * 5
    assert run_ranks(2, beside.same_bits, calls, fp8, backend="nccl", timeout_s=120) == [[], []]


@pytest.mark.multigpu
@pytest.mark.parametrize("fp8", [False, True])
def test_rows_beside_products_are_captured_in_a_graph(fp8: bool) -> None:
    assert run_ranks(2, beside.in_a_graph, fp8, backend="nccl") == [[], []]


@pytest.mark.multigpu
@pytest.mark.parametrize("phase", ["forward combine", "backward dispatch"])
def test_the_gpu_that_waits_for_a_late_rank_names_it(phase: str) -> None:
    way = {"transport": "gather"}
    first, _ = end_ranks(2, cases.with_a_lost_rank, phase, "late", 4.0, way, backend="nccl", timeout_s=40)
    wanted = rf"ExpertParallelError: .*waited 4 s in the {phase} of call 2 for rank 1 \(exchange"
    assert re.search(wanted, first.result or first.error), first
    assert first.exit_code in (0, 1), first  # no abort; NCCL may refuse to end its group on a GPU that has failed


@pytest.mark.multigpu
def test_a_late_rank_is_named_by_the_thread_that_watches() -> None:
    """Over NCCL the host does not wait: the other rank raises when the aborted group lets it go on."""
    way = {"transport": "all_to_all"}
    first, _ = end_ranks(2, cases.with_a_lost_rank, "backward dispatch", "late", 5.0, way, backend="nccl")
    assert "in the backward dispatch of call 2. Rank 1 is past" in first.result, first
