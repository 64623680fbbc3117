"""What virtual ranks run of ``MegaMoE`` as it is by default: dispatch, the operator, combine, over copies."""

from __future__ import annotations

from collections.abc import Sequence

import mega_cases as cases
import ranks
import torch.distributed as dist
import virtual_cases
from parallel_cases import timed_error_of
from virtual_ranks import run_virtual, times_on

from supersonic_moe.inference import workspace

EXCHANGES = 3
"""Of a call: codes; choices and scales; partial outputs."""


def over_copies(size: int, gpu: bool, calls: Sequence[cases.Call], most: int) -> list[list[str]]:
    """``mega_cases.same_as_one_process``; on a GPU twice, the second time with random delays before each flag."""
    _start(size, gpu, careful=EXCHANGES * (len(calls) + 1))  # two calls each, of two objects that take turns
    return run_virtual(size, cases.same_as_one_process, calls, "gather", most, False, times_on(gpu))


def with_a_late_rank(size: int, gpu: bool, phase: str, limit_s: float) -> list[str]:
    """Rank 1 is late for a phase of the third call, until others have given up: what each rank raises."""
    _start(size, gpu, careful=EXCHANGES * 2)
    return run_virtual(size, _late, phase, limit_s)


def _late(phase: str, limit_s: float) -> str:
    rank, size = dist.get_rank(), dist.get_world_size()
    layer = cases.mega(dist.group.WORLD, max_tokens_per_rank=8, timeout_s=limit_s)
    case = cases.case_of(3, seed=rank)
    case = cases.on_gpu(case) if ranks.device().type == "cuda" else case
    experts = slice(rank * cases.E // size, (rank + 1) * cases.E // size)
    for _ in range(2):
        cases.call(layer, case, experts=experts)
    if rank == 1:
        assert layer._ranks is not None
        virtual_cases._before(layer._ranks.ranks, phase, lambda: ranks.stay(True, 2.5 * limit_s))

    def third() -> None:
        cases.call(layer, case, experts=experts)
        layer.check()

    told = timed_error_of(third)
    if rank != 1:
        ranks.stay(False)
    return told


def _start(size: int, gpu: bool, careful: int) -> None:
    """As for few rows, but sizes decide what is streamed."""
    cases._start(size, gpu, careful)
    if gpu:
        from supersonic_moe.inference import sm90

        sm90.streams = workspace.streams
