"""Measuring over the ranks of torchrun: one group of processes for all cases, and times of the slowest rank.

Ranks must make the same calls, so all of them take their decisions from the same times: the longest of all ranks. A
contender that fails on one rank has failed on all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from supersonic_moe.bench.timing import Call, Clock, Missing, Slice

ANOTHER_FAILED = "another rank has failed, and says why"


class SlowestRank:
    """A clock that shows every rank the times of the slowest one. Where a rank fails, all of them raise.

    ``group``: one of the host that nobody else uses, so that ranks meet in it whatever has become of their calls.
    """

    def __init__(self, clock: Clock, group: dist.ProcessGroup) -> None:
        self.clock, self.group = clock, group

    def slice(self, call: Call, settle: int, calls: int) -> Slice:
        try:
            own = self.clock.slice(call, settle, calls)
        except Exception:
            self._slowest([math.inf] * calls)
            raise
        times_us = self._slowest(own.times_us)
        if math.inf in times_us:
            raise RuntimeError(ANOTHER_FAILED)
        return Slice(times_us, own.readings)

    def _slowest(self, times_us: list[float]) -> list[float]:
        times = torch.tensor(times_us, dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX, group=self.group)
        return times.tolist()


@contextmanager
def group_of_ranks(device: torch.device, limit_s: float | None = None) -> Iterator[dist.ProcessGroup | None]:
    """What all cases run inside. The group that it yields is one of the host, whose waits last ``limit_s`` at most
    (None: as torch has it), where there are several ranks, else None.

    The default group is one for all cases: the store of torchrun keeps what the ranks of an earlier group wrote there,
    and NCCL would look for them where they no longer are. After an error of several ranks none ends the group in order,
    which may wait for a rank that is elsewhere.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    several = dist.get_world_size() > 1
    limit = None if limit_s is None else timedelta(seconds=limit_s)
    try:
        yield dist.new_group(backend="gloo", timeout=limit) if several else None
    except BaseException:
        if not several:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def told_by_all(own: Any, group: dist.ProcessGroup, limit_s: float) -> list[Any]:
    """What each rank tells, in a ``group`` of the host whose waits last ``limit_s``."""
    told: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(told, own, group=group)
    except RuntimeError as error:
        raise RuntimeError(f"another rank has ended, or has not come within {limit_s:g} s") from error
    return told


def agreed(found: Any, group: dist.ProcessGroup, limit_s: float) -> Any:
    """``found``, or Missing where it is so on any rank."""
    told = told_by_all(found if isinstance(found, Missing) else None, group, limit_s)
    reasons = {rank: one.reason for rank, one in enumerate(told) if one and ANOTHER_FAILED not in one.reason}
    if not reasons:
        return found
    rank, reason = next(iter(reasons.items()))
    everywhere = len(reasons) == len(told) and len(set(reasons.values())) == 1
    return Missing(reason if everywhere else f"rank {rank}: {reason}")
