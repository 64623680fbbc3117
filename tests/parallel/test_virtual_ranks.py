"""Copies between ranks that reach each other's memory: the package's code, with ranks that are threads of one process,
on the CPU and on one GPU. Each test has a process of its own, which a failed wait may end.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import virtual_cases as cases
from ranks import Ended, end_ranks, run_ranks
from virtual_ranks import ON, ONE_AT_A_TIME, end_processes

from supersonic_moe import Fp8Recipe
from supersonic_moe.parallel.watch import carried

BF16 = torch.bfloat16
PHASES = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")
SIZES = (7, 0, 33, 1, 2, 100, 0, 64)


def alone(function: Any, *args: Any) -> Any:
    (result,) = run_ranks(1, function, *args, timeout_s=300)
    return result


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize("transport", ["gather", "push"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_together_have_the_bits_of_one_process(size: int, transport: str, gpu: bool) -> None:
    """Pushed, what did not travel is NaN: nobody reads it."""
    routings = ("random", "skewed", "one rank", "masked", "nobody")
    calls = [(SIZES[i : i + size] + SIZES[: max(0, i + size - 8)], BF16, r, i % 2 == 1) for i, r in enumerate(routings)]
    calls += [((0,) * size, BF16, "random", False), ((512,) + (3,) * (size - 1), BF16, "random", True)]
    assert alone(cases.same_as_one_process, size, gpu, calls, transport) == [[]] * size


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize(("size", "hidden", "transport"), [(2, 256, "gather"), (2, 136, "gather"), (4, 136, "push")])
def test_an_fp8_wire_carries_what_the_experts_would_make(size: int, hidden: int, transport: str, gpu: bool) -> None:
    tokens, recipe = (700, 531, 0, 64)[:size], Fp8Recipe(scale="pow2")
    found = alone(cases.fp8_wire, size, gpu, tokens, recipe, hidden, transport)
    assert found == [[]] * size * cases.times_on(gpu)


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize(("tokens", "hidden"), [((700, 531), 256), ((0, 700, 3, 300), 136)])
def test_products_in_parts_have_the_bits_of_whole_ones(tokens: tuple[int, ...], hidden: int, gpu: bool) -> None:
    """Against an exact wire, which computes in one launch."""
    assert alone(cases.in_parts, len(tokens), gpu, tokens, hidden) == [[]] * len(tokens) * cases.times_on(gpu)


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize("size", [2, 4])
def test_exact_rows_that_travel_beside_products_have_the_bits_of_one_process(size: int, gpu: bool) -> None:
    calls = [(SIZES[i : i + size], BF16, r, i % 2 == 1) for i, r in enumerate(("random", "skewed", "masked", "nobody"))]
    calls += [((0,) * size, BF16, "random", True), ((512,) + (3,) * (size - 1), BF16, "random", False)]
    assert alone(cases.exact_in_parts, size, gpu, calls) == [[]] * size


def test_experts_of_ones_own_read_zeros_where_nothing_was_pushed() -> None:
    """In forward and in backward: a product of all rows has finite gradients."""
    assert alone(cases.dense_experts, 4) == [True] * 4


def test_gradients_over_an_exact_wire_reach_main_grad_and_exist_once() -> None:
    assert alone(cases.exact_ends, 2) == [[], []]


@pytest.mark.parametrize("gpu", ON)
def test_kernels_read_scores_in_fp32_over_an_exact_wire(gpu: bool) -> None:
    assert alone(cases.exact_scores, 2, gpu) == ([[], []], {torch.float32})


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize("transport", ["gather", "push"])
def test_random_calls_with_random_delays_repeat_to_the_bit(transport: str, gpu: bool) -> None:
    assert alone(cases.random_calls, 4, gpu, 60, transport) is True


@pytest.mark.gpu
@ONE_AT_A_TIME
def test_a_thousand_random_calls_repeat_to_the_bit() -> None:
    """Twice 500."""
    assert alone(cases.random_calls, 4, True, 500) is True


def errors_of(gpu: bool, case: Any, *args: Any) -> list[str]:
    """What each rank raised. On a GPU the first failed wait ends the context of all, and nobody else says why."""
    return raised(gpu, end_ranks(1, case, *args))


def raised(gpu: bool, process: list[Ended]) -> list[str]:
    (ended,) = process
    assert ended.result is not None, ended
    errors: list[str] = ended.result
    assert "no error" not in " ".join(errors), errors
    said = [e for e in errors if "ExpertParallelError" in e] if gpu else errors
    assert said, errors
    return said


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize(("size", "transport"), [(2, "gather"), (4, "gather"), (8, "gather"), (2, "push")])
def test_a_late_rank_is_named(size: int, transport: str, gpu: bool) -> None:
    """With 8 ranks an expert each has so many rows that they travel beside products."""
    calls = [(size, gpu, phase, 3.0, transport) for phase in PHASES]
    for phase, process in zip(PHASES, end_processes(gpu, cases.with_a_muted_rank, calls), strict=True):
        errors, wanted = raised(gpu, process), rf"waited 3 s in the {phase} of call 2 for rank 1 "
        wanted += r"\(exchange \d+ expected, \d+ seen\)\. Rank 1 is past the"
        assert any(re.search(wanted, error) for error in errors), errors
        assert all("ExpertParallelError" in error and "for rank 1" in error for error in errors), errors


@pytest.mark.parametrize("gpu", ON)
def test_ranks_that_call_different_things_are_told(gpu: bool) -> None:
    errors = errors_of(gpu, cases.with_a_rank_elsewhere, 2, gpu)
    backward, forward = "the backward dispatch with rows of 64 bytes", "the forward dispatch with rows of 24 bytes"
    assert any(
        f"rank 0 is in call 3, {backward}; rank 1 is in call 4, {forward}. Run the same layers" in error
        or f"rank 1 is in call 4, {forward}; rank 0 is in call 3, {backward}. Run the same layers" in error
        for error in errors
    ), errors
    assert all(error.startswith("ExpertParallelError") for error in errors), errors
    assert carried("backward dispatch", 64, 7) != carried("forward dispatch", 64, 7)
    assert carried("forward dispatch", 64, 7) != carried("forward dispatch", 64, 8)
    assert carried("backward combine", 2**40, 2**40) < 2**31


@pytest.mark.parametrize("gpu", ON)
def test_an_error_of_one_rank_ends_the_waits_of_others_at_once(gpu: bool) -> None:
    errors = errors_of(gpu, cases.with_a_rank_out_of_memory, 4, gpu, 20.0)
    told = [error for error in errors if "OutOfMemoryError" not in error]
    assert len(told) == 3 or (gpu and told), errors
    for error in told:
        assert float(error.split()[0]) < 10, error
        assert "Rank 1 has failed: no memory for the experts of this rank" in error, error
        assert "stopped in the forward combine of call 2" in error, error


@pytest.mark.parametrize("gpu", ON)
def test_a_call_that_one_rank_refuses_ends_the_waits_of_others_at_once(gpu: bool) -> None:
    errors = errors_of(gpu, cases.with_a_rank_that_refuses, 4, gpu, 20.0)
    told = [error for error in errors if "ValueError: w1" not in error[:30]]
    assert len(told) == 3 or (gpu and told), errors
    for error in told:
        assert float(error.split()[0]) < 10, error
        assert "Rank 1 has refused this call: ValueError: w1 must have hidden size" in error, error
        assert "stopped in the forward dispatch of call 3" in error, error


@pytest.mark.parametrize("gpu", ON)
def test_a_rank_that_goes_on_after_a_refused_call_gets_no_rows_of_another_one(gpu: bool) -> None:
    errors = errors_of(gpu, cases.with_a_rank_that_goes_on, 2, gpu, 20.0)
    assert all(float(error.split()[0]) < 10 and "Rank 1 has refused " in error for error in errors), errors
    assert all("call 2: ValueError: w1" in error or "this call: ValueError: w1" in error for error in errors), errors


@pytest.mark.parametrize("gpu", ON)
def test_two_channels_in_flight_have_the_bits_of_one(gpu: bool) -> None:
    assert alone(cases.in_two_channels, 2, gpu, 24) is True


def test_auto_takes_copies_where_most_tokens_need_most_ranks() -> None:
    two = alone(cases.explanations, 2)
    assert all("transport: gather, by copies between GPUs that reach each other's memory, through " in e for e in two)
    eight = alone(cases.explanations, 8)
    assert all("a rank needs 38% of the tokens of another, below 80%" in e for e in eight), eight[0]


def test_explain_counts_what_is_pushed() -> None:
    """Of 512 tokens 38 % to each of seven ranks in 64 bytes, choices of all."""
    for text in alone(cases.explanations, 8, "push"):
        assert "transport: push, by kernels that write what is needed to GPUs that reach each other's memory" in text
        assert "places: 512 for each rank: no wait for the host" in text
        assert "x, ids, scores 0.172, partial outputs 0.086\n" in text, text
