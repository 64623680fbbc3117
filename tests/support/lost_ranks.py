"""Two ranks of which one is late or killed in a phase: what the other one says, and how soon."""

from __future__ import annotations

import os
import signal
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parallel_cases as cases
import ranks
import torch
import torch.distributed as dist
from symmetric_cases import copies_through
from torch import Tensor

from supersonic_moe.parallel.overflow import LAG, Overflow

TOKENS = (5, 5)


def lost(phase: str, how: str, limit_s: float, way: dict[str, Any]) -> str:
    """Rank 1 is killed before a phase of a call, or late for it until the other has given up. What ranks raise, and
    after how long. What the calls need has been loaded before, by an object that waits longer.
    """
    given = cases.here(cases.inputs(TOKENS, torch.bfloat16), TOKENS)
    first, ep = (cases.make(timeout_s=seconds, **way) for seconds in (60.0, limit_s))
    for each in (first, first, ep):
        cases.run(each, given)
        each.check()
    first.close()
    late = partial(ranks.stay, True, 2.5 * limit_s)
    if dist.get_rank() == 1:
        cases.at_phase(2, phase, _kill if how == "killed" else late)

    def call() -> None:
        cases.run(ep, given)
        ep.check()

    told = cases.timed_error_of(call)
    if dist.get_rank() == 0:
        ranks.stay(False)
    return told


def lost_through_files(phase: str, how: str, limit_s: float, way: dict[str, Any], folder: Path) -> str:
    """The same over copies, or rows that are pushed, without GPUs."""
    with copies_through(folder):
        return lost(phase, how, limit_s, way)


def _kill() -> None:
    """As all that belongs to the phases before has been done, the other one waits in this phase, not in an earlier."""
    if ranks.device().type == "cuda":
        torch.cuda.synchronize()
    os.kill(os.getpid(), signal.SIGKILL)


def aborted_while_the_host_waits() -> str:
    """The numbers that the host waits for are those of an aborted collective, which ends as if nothing had happened on
    a GPU.
    """
    ep = cases.make(transport="all_to_all")
    given, channel = cases.here(cases.inputs(TOKENS, torch.bfloat16), TOKENS), ep._channel
    exchange = channel._collectives.exchange

    def aborted(*arguments: Any) -> Tensor:
        arrived = exchange(*arguments)
        channel.watch.failure = "rank 1 did not come"
        return arrived.fill_(2**40 + 7)

    channel._collectives.exchange = aborted  # type: ignore[method-assign]
    return cases.error_of(lambda: cases.run(ep, given))


def overflow_of_an_aborted_call(check: Any) -> None:
    """``check`` is that of a watch."""
    overflow = Overflow(SimpleNamespace(watch=SimpleNamespace(check=check)), capacity=3)  # type: ignore[arg-type]
    overflow._coming = deque([(torch.tensor([999]), SimpleNamespace(synchronize=lambda: None))] * LAG)
    overflow.guard(torch.rand(1, 1), torch.tensor([1]), 9)
