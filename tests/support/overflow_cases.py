"""What ranks run whose ``capacity`` is too small for the tokens of a call."""

from __future__ import annotations

from collections.abc import Sequence

import parallel_cases as cases
import torch
import torch.distributed as dist
from torch import Tensor

from supersonic_moe.parallel.overflow import Overflow


def as_on_a_gpu(given_cases: Sequence[tuple[int, str]]) -> list[bool]:
    """Whether all outputs are NaN where a token has an expert and zero elsewhere, on a device that nobody waits for.
    Each case is (capacity, routing).
    """

    def guard(overflow: Overflow, scores_TK: Tensor, tokens_R: Tensor, call: int) -> Tensor:
        most = overflow.ranks.maximum(tokens_R.max().reshape(1), call, "forward dispatch")
        return torch.where(most > overflow.capacity, torch.nan, scores_TK)

    Overflow.guard = guard  # type: ignore[method-assign]
    size, found = dist.get_world_size(), []
    for capacity, routing in given_cases:
        given = cases.here(cases.inputs(t := [2] * (size - 1) + [40], torch.float32, routing), t)
        routed = ((given.ids >= 0) & (given.ids < cases.E)).any(1)[:, None]
        ep = cases.make(capacity=capacity)
        want = torch.where(routed, torch.nan, torch.zeros_like(given.x))
        found.append(bool(torch.equal(cases.run(ep, given).out.nan_to_num(7), want.nan_to_num(7))))
        ep.close()
    return found


def on_a_gpu() -> list[str]:
    """Outputs of the call are NaN on every rank, and every rank raises later."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ep, t = cases.make(capacity=3), [2] * (size - 1) + [4]
    out = cases.run(ep, cases.here(cases.inputs(t, torch.bfloat16, "one rank"), t)).out
    nan = "NaN" if bool(out.isnan().all()) else f"rank {rank} got numbers"
    checked = cases.error_of(ep.check)
    small = cases.here(cases.inputs(s := [2] * size, torch.bfloat16), s)
    after = [cases.error_of(lambda: cases.run(ep, small)) for _ in range(9)]
    cases.run(ep, cases.here(cases.inputs(t, torch.bfloat16, "one rank"), t))
    later = [cases.error_of(lambda: cases.run(ep, small)) for _ in range(9)]
    return [nan, checked, *set(after), *(f"{i}: {error}" for i, error in enumerate(later, 1) if error != "no error")]
