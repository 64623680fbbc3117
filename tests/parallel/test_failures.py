"""Mistakes, dead ranks and late ones: every rank says what happened, and none hangs or is left behind."""

from __future__ import annotations

import re
from typing import Any

import forks
import parallel_cases as cases
import parallel_refusals as refusals
import parallel_teardown
import pytest
from ranks import end_groups, end_ranks, run_ranks

PHASES = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")


def test_a_mistake_of_one_rank_is_an_error_on_all() -> None:
    for errors in run_ranks(2, cases.errors_on_every_rank):
        arguments, experts, tokens, calls, gather, capacity, scales, recipe, closed = errors
        assert re.match(
            r"ValueError: ExpertParallel needs the same arguments on every rank; max_tokens is 51[23] on rank [01]",
            arguments,
        )
        assert "must be a multiple of the ranks of the group; got 9 experts for 2 ranks" in experts
        assert "max_tokens = 8 tokens in a call; rank 1 has 9" in tokens
        assert re.match(r"ExpertParallelError: ranks must make the same calls; .*no gradients", calls)
        assert re.match(r"ValueError: .*and no capacity; got 3\. Leave capacity out\.", gather)
        assert "more than capacity = 3 tokens to another in a call; one had 4" in capacity
        assert re.match(r"ValueError: .*powers of two.*Use Fp8Recipe\(scale=\"pow2\"\)", scales)
        assert re.match(r"TypeError: .*needs an Fp8Recipe and bfloat16; got Bf16Recipe", recipe)
        assert re.match(r"ExpertParallelError: .* is closed; make a new ExpertParallel", closed)


def test_a_killed_rank_is_named() -> None:
    groups = end_groups(4, cases.with_a_lost_rank, [(phase, "killed", 8.0) for phase in PHASES], timeout_s=60)
    for phase, (first, second, *others) in zip(PHASES, groups, strict=True):
        assert second.exit_code == -9
        for rank in (first, *others):
            assert rank.exit_code == 0, rank
            assert float(rank.result.split()[0]) < 6, "found at once, not at the limit"
            assert re.search(rf"failed after .* in the {phase} of call 2\. Rank 1 no longer reports", rank.result)


def test_a_late_rank_is_named() -> None:
    groups = end_groups(4, cases.with_a_lost_rank, [(phase, "late", 3.0) for phase in PHASES], timeout_s=60)
    for phase, (first, second, *others) in zip(PHASES, groups, strict=True):
        assert second.exit_code == 0  # told when it comes, not at its limit:
        assert re.search(r"failed after .* Rank [023] has failed: .* rank [023] waited 3", second.result), second.result
        for rank in (first, *others):
            assert rank.exit_code == 0 and float(rank.result.split()[0]) < 5, rank
            wanted = rf"waited 3[.\d]* s in the {phase} of call 2\. Rank 1 is past the [a-z ]* of call [12]: it is slow"
            assert re.search(wanted, rank.result), rank.result
            assert "Rank 0" not in rank.result and "Rank 2" not in rank.result, "only the late one is named"
            assert rank.result.endswith("ExpertParallel(timeout_s=...) sets the limit.")


def test_who_waits_for_a_rank_that_raised_is_told_why() -> None:
    first, second = run_ranks(2, cases.with_too_many_tokens_to_gather)
    assert re.match(r"ValueError: a rank must not have more than max_tokens = 8 tokens in a call; got 9", second)
    told = r"failed after [0-4](\.\d*)? s .*Rank 1 has refused this call: ValueError: a rank must not have more than"
    assert re.search(told, first), first


def test_a_call_that_one_rank_refuses_ends_at_once_and_one_that_all_refuse_ends_nothing() -> None:
    told = r"[0-3]\.\d s: ExpertParallelError: .*Rank 1 has refused this call: \w+Error: "
    for first, second in end_groups(2, refusals.one_after_all, [(m, 5.0) for m in refusals.MISTAKES], timeout_s=60):
        assert first.exit_code == second.exit_code == 0, (first, second)
        assert re.match(told, first.result), first
        assert second.result.split(": ", 1)[1] in first.result, "the sentence of rank 1 is in that of rank 0"


def test_a_rank_that_goes_on_after_a_refused_call_is_found_in_another_one() -> None:
    """Also where no host need wait for numbers: its rows would be those of another layer."""
    ways: list[dict[str, Any]] = [{}, {"transport": "gather"}, {"transport": "push"}, {"capacity": 64}]
    for ended in end_groups(2, refusals.one_goes_on, [(way,) for way in ways], timeout_s=60):
        for rank in ended:
            error = rank.result
            assert re.match(
                r"ExpertParallelError: ranks must make the same calls; rank [01] is in call [23] ", error
            ), error
            assert "Rank 1 has refused call 2: ValueError: hidden_states must have last dimension" in error


@pytest.mark.parametrize("order", ["close, destroy", "destroy, close", "destroy, drop", "drop", "exit"])
def test_leaving_in_any_order_is_quiet(order: str) -> None:
    assert end_ranks(2, parallel_teardown.teardown, order) == [(order, "", 0, "")] * 2


def test_the_thread_of_an_object_ends_with_it() -> None:
    assert run_ranks(2, parallel_teardown.threads_after_dropping) == [0, 0]


def test_an_interrupt_ends_every_rank() -> None:
    for rank in end_ranks(2, parallel_teardown.teardown, "interrupt", timeout_s=30):
        assert rank.exit_code == 1 and "KeyboardInterrupt" in rank.error


def test_ranks_are_forked_from_a_server_that_has_imported_everything() -> None:
    """Each of them would take 4 s of CPU to do so."""
    assert run_ranks(2, forks.imported) == [forks.IMPORTED] * 2
