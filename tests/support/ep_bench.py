"""``bench ep`` on ranks as torchrun starts them: how many groups it makes, and how it ends where something fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from command_line import outcome

from supersonic_moe import Bf16Recipe
from supersonic_moe.bench import ep
from supersonic_moe.bench.ep_contenders import BY_HAND, Numbers, contenders, disagreement
from supersonic_moe.bench.report import OURS
from supersonic_moe.moe import MoE
from supersonic_moe.parallel import ExpertParallel
from supersonic_moe.perf_model import LayerShape


def measured(*args: str) -> tuple[int, str, int]:
    """Exit code, output, groups that were made."""
    with patch.object(dist, "init_process_group", wraps=dist.init_process_group) as made:
        return *outcome("bench", "ep", *args), made.call_count


def by_hand(shape: LayerShape, remote: float | None) -> tuple[str | None, float, str | None]:
    """How the layer written by hand differs from ours, the share of choices elsewhere, and how it differs where rank 1
    does it wrong.
    """
    assert dist.group.WORLD is not None
    size = dist.get_world_size()
    sizes = {"top_k": shape.top_k, "hidden": shape.hidden, "max_tokens": shape.tokens}
    with closing(ExpertParallel(dist.group.WORLD, num_experts=size * shape.experts, **sizes)) as ep:
        numbers = Numbers(torch.device("cpu"), torch.float32, Bf16Recipe(), remote, by_hand=True)
        found = contenders(shape, numbers, ep)
        agrees = disagreement(found, False, None)
        ids = (found[OURS].x @ found[OURS].parameters[0].T).topk(shape.top_k).indices
        here = (ids >= ep.first_expert) & (ids < ep.first_expert + ep.experts_here)
        hand = found[BY_HAND]
        factor = 1 + 0.5 * dist.get_rank()
        found[BY_HAND] = replace(hand, forward=lambda inference: hand.forward(inference) * factor)
        return agrees, 1 - float(here.float().mean()), disagreement(found, False, dist.group.WORLD)


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
    "building": lambda: setattr(ep, "contenders", _raise),
    "a call of ranks": lambda: setattr(ExpertParallel, "_experts", _raise),
    "a call of one": _in_the_plain_layer,
    "the timeline": lambda: setattr(ep, "timeline", _end),
}
