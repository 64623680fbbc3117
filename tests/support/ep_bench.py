"""``bench ep`` on ranks as torchrun starts them: how many groups it makes, and how it ends where something fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from command_line import outcome

from supersonic_moe.bench import ep
from supersonic_moe.moe import MoE
from supersonic_moe.parallel import ExpertParallel


def measured(*args: str) -> tuple[int, str, int]:
    """Exit code, output, groups that were made."""
    with patch.object(dist, "init_process_group", wraps=dist.init_process_group) as made:
        return *outcome("bench", "ep", *args), made.call_count


def failing(where: str, ranks: Sequence[int], *args: str) -> tuple[int, str]:
    """Exit code and output of ``bench ep``, with an error of those ``ranks`` alone."""
    if int(os.environ["RANK"]) in ranks:
        _FAILURES[where]()
    return outcome("bench", "ep", *args)


def _raise(*args: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("no memory for this rank")


def _end(*args: Any, **options: Any) -> Any:
    raise StopIteration


def _in_the_plain_layer() -> None:
    forward = MoE.forward

    def fails(self: MoE, *args: Any, **options: Any) -> Any:
        return (_raise if self.expert_parallel is None else forward)(self, *args, **options)

    MoE.forward = fails  # type: ignore[method-assign]


_FAILURES: dict[str, Callable[[], None]] = {
    "building": lambda: setattr(ep, "_contender", _raise),
    "a call of ranks": lambda: setattr(ExpertParallel, "_experts", _raise),
    "a call of one": _in_the_plain_layer,
    "the timeline": lambda: setattr(ep, "timeline", _end),
}
