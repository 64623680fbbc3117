"""Calls that ranks of tests/parallel refuse because of their arguments: all of them, then one alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import parallel_cases as cases
import ranks
import torch
import torch.distributed as dist

from supersonic_moe import MoE
from supersonic_moe.parallel import ExpertParallel

Call = Callable[[bool], object]
"""Of the layer, with or without a mistake."""


def _experts(ep: ExpertParallel, given: cases.Inputs) -> Call:
    """Before anything is sent."""
    return lambda wrong: cases.run(ep, given._replace(scores=given.scores[:, 1:]) if wrong else given)


def _between(ep: ExpertParallel, given: cases.Inputs) -> Call:
    """Tokens have arrived when the experts find out."""
    return lambda wrong: cases.run(ep, given._replace(w2=given.w2[:, 1:]) if wrong else given)


def _dispatch(ep: ExpertParallel, given: cases.Inputs) -> Call:
    def call(wrong: bool) -> None:
        got = ep.dispatch(given.x[:, 1:] if wrong else given.x, given.ids, given.scores)
        ep.combine(got.x, got.handle)

    return call


def _combine(ep: ExpertParallel, given: cases.Inputs) -> Call:
    def call(wrong: bool) -> None:
        got = ep.dispatch(given.x, given.ids, given.scores)
        ep.combine(got.x[:, 1:] if wrong else got.x, got.handle)

    return call


def _layer(ep: ExpertParallel, given: cases.Inputs) -> Call:
    layer = MoE(cases.E, cases.K, cases.H, cases.I, "swiglu", False, 0.02, expert_parallel=ep)
    return lambda wrong: layer(given.x[:, 1:] if wrong else given.x)


def _unsupported(ep: ExpertParallel, given: cases.Inputs) -> Call:
    """What a layer says under a transform of torch.func, for instance."""

    def call(wrong: bool) -> None:
        with ep.call():
            if wrong:
                raise NotImplementedError("transforms are not supported; got one.")
            cases.run(ep, given)

    return call


MISTAKES = {
    "experts": _experts, "between": _between, "dispatch": _dispatch, "combine": _combine, "layer": _layer,
    "unsupported": _unsupported,
}  # fmt: skip
WAYS = {"dispatch": {"transport": "gather"}, "between": {"transport": "gather"}, "combine": {"capacity": 64}}


def one_after_all(mistake: str, limit_s: float) -> str:
    """What rank 1 raises, and after how long the others, where all ranks have made the same mistake once before."""
    ep, tokens = cases.make(timeout_s=limit_s, **WAYS.get(mistake, {})), [5] * dist.get_world_size()
    call = MISTAKES[mistake](ep, cases.here(cases.inputs(tokens, torch.float32), tokens))
    call(False)
    assert "got" in cases.error_of(lambda: call(True))
    call(False)
    told = cases.timed_error_of(lambda: call(dist.get_rank() == 1))
    ranks.stay(dist.get_rank() == 1)
    return told


def one_goes_on(way: dict[str, Any]) -> str:
    """What a rank raises in its next call where rank 1 has refused one before, and calls again at once."""
    ep, tokens = cases.make(timeout_s=20.0, **way), [5] * dist.get_world_size()
    call = _layer(ep, cases.here(cases.inputs(tokens, torch.float32), tokens))
    call(False)
    if dist.get_rank() == 1:
        cases.error_of(lambda: call(True))
    return cases.error_of(lambda: call(False))
