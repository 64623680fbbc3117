"""Of two ranks one sleeps or dies in a phase: the other says so within twice the limit, and ends by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lost_ranks
import pytest
from ranks import Ended, end_groups, run_ranks

PHASES = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")
LIMIT_S = 3.0
ON_TWO_GPUS = [pytest.mark.multigpu, pytest.mark.xdist_group("lost ranks on two GPUs")]
OVER = [
    pytest.param("gather", "files", id="copies through files"),
    pytest.param("push", "files", id="pushed through files"),
    pytest.param("gather", "NCCL", id="copies", marks=ON_TWO_GPUS),
    pytest.param("push", "NCCL", id="pushed", marks=ON_TWO_GPUS),
    pytest.param("all_to_all", "NCCL", id="NCCL", marks=ON_TWO_GPUS),
]


def ended(transport: str, over: str, how: str, folder: Path) -> list[list[Ended]]:
    """For each phase, all at the same time, how both ranks ended; none is left after a minute."""
    ways = [(phase, how, LIMIT_S, {"transport": transport}) for phase in PHASES]
    if over == "NCCL":
        return end_groups(2, lost_ranks.lost, ways, backend="nccl", timeout_s=60)
    folders = [folder / phase for phase in PHASES]
    for each in folders:
        each.mkdir()
    calls = [(*way, each) for way, each in zip(ways, folders, strict=True)]
    return end_groups(2, lost_ranks.lost_through_files, calls, timeout_s=60)


def waited(transport: str, phase: str) -> str:
    """How the sentence of rank 0 starts."""
    if transport == "all_to_all":
        return rf"ExpertParallelError: .*rank 0 waited 3[.\d]* s in the {phase} of call 2\. "
    return rf"ExpertParallelError: .*waited 3 s in the {phase} of call 2 for rank 1 \(exchange \d+ .*, \d+ seen\)\. "


def check_survivor(rank: Ended, wanted: str) -> None:
    assert rank.result is not None, rank
    assert re.search(wanted, rank.result), rank
    assert float(rank.result.split()[0]) < 2 * LIMIT_S, rank
    assert rank.exit_code in (0, 1), rank  # NCCL may refuse to end its group on a GPU that has failed


@pytest.mark.parametrize(("transport", "over"), OVER)
def test_a_killed_rank_is_named_in_time(transport: str, over: str, tmp_path: Path) -> None:
    for phase, (first, second) in zip(PHASES, ended(transport, over, "killed", tmp_path), strict=True):
        assert second.exit_code == -9, second
        check_survivor(first, waited(transport, phase) + "Rank 1 no longer reports, last seen ")


@pytest.mark.parametrize(("transport", "over"), OVER)
def test_a_rank_asleep_is_named_in_time(transport: str, over: str, tmp_path: Path) -> None:
    for phase, (first, second) in zip(PHASES, ended(transport, over, "late", tmp_path), strict=True):
        check_survivor(first, waited(transport, phase) + r"Rank 1 is past the [a-z ]* of call [12]: it is slow")
        told = second.result or second.error  # when it comes, not at its limit
        assert "ExpertParallelError" in told and "Rank 0 has failed: " in told, second
        assert second.exit_code in (0, 1), second


def test_numbers_of_an_aborted_exchange_are_not_read() -> None:
    """Nobody is told then that another rank is in call 1099511627783."""
    assert run_ranks(2, lost_ranks.aborted_while_the_host_waits) == ["ExpertParallelError: rank 1 did not come"] * 2


def test_an_aborted_call_has_not_overflowed() -> None:
    def check() -> Any:
        raise RuntimeError("rank 1 did not come")

    with pytest.raises(RuntimeError, match="did not come"):
        lost_ranks.overflow_of_an_aborted_call(check)
