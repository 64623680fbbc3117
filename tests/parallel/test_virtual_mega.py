"""``MegaMoE`` as it is by default over copies between virtual ranks: bits, and a rank that is late."""

from __future__ import annotations

import re

import composed_cases
import mega_cases
import pytest
from mega_cases import E, H, I, K
from ranks import run_ranks
from virtual_ranks import ON, end_processes

from supersonic_moe.inference import workspace

SIZES = {
    "streamed": (8, [(7, 1, 0, 3, 8, 2, 0, 5), (0, 8) * 4, (8,) * 8, (1,) + (0,) * 7]),
    "in tiles": (400, [(301, 9, 0, 2, 1, 40, 3, 0), (5, 260) * 4, (400, 180) + (7,) * 6, (0,) * 8]),
}
"""By what the operator does with the rows: the most tokens of a rank, and tokens of 8 ranks in each call."""
MASKED, LIMITS = (0.0, 0.3, 0.7, 0.0), (None, 10.0, 1.0, None)


def calls_of(rows: str, ranks: int) -> tuple[int, list[mega_cases.Call]]:
    most, tokens = SIZES[rows]
    return most, [(t[:ranks], masked, limit) for t, masked, limit in zip(tokens, MASKED, LIMITS, strict=True)]


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rows", SIZES)
def test_copies_between_ranks_have_the_bits_of_one_process(rows: str, ranks: int, gpu: bool) -> None:
    most, calls = calls_of(rows, ranks)
    (found,) = run_ranks(1, composed_cases.over_copies, ranks, gpu, calls, most, timeout_s=240)
    assert found == [[]] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rows", SIZES)
def test_one_process_and_each_rank_take_the_same_kernels(rows: str, ranks: int) -> None:
    """In the calls above: those of streamed rows and of tiles round differently."""
    most, calls = calls_of(rows, ranks)
    for count in (ranks * most, *filter(None, (sum(tokens) for tokens, _, _ in calls))):
        assert workspace.streams(count * K, count * K / ranks, H, I, E // ranks) == (rows == "streamed")


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_late_rank_is_named(ranks: int, gpu: bool) -> None:
    phases = ("forward dispatch", "forward combine")
    calls = [(ranks, gpu, phase, 3.0) for phase in phases]
    for phase, (ended,) in zip(phases, end_processes(gpu, composed_cases.with_a_late_rank, calls), strict=True):
        assert ended.result is not None, ended
        errors: list[str] = ended.result
        wanted = rf"waited 3 s in the {phase} of call 3 for rank 1 \(exchange \d+ expected, \d+ seen\)"
        assert any(re.search(wanted, error) for error in errors), errors  # on a GPU it ends the context of all
        others = errors[:1] + errors[2:]  # the late one finds all that it reads, if the others have sent it
        assert "no error" not in " ".join(others), errors
