"""Rows that travel beside products against the same rows before and after them."""

from __future__ import annotations

from collections.abc import Sequence

import parallel_cases as cases
import torch
import torch.distributed as dist

from supersonic_moe import Fp8Recipe
from supersonic_moe.parallel import ExpertParallel, ranges

MAX_TOKENS = 1500
HIDDEN, INNER = 512, 256


def same_bits(calls: Sequence[Sequence[int]], fp8: bool) -> list[str]:
    """Of calls with so many tokens by rank: where bits differ. What comes beside is in the buffers of the call before
    until then.
    """
    ep, options = _layer(fp8)
    enough, found = ranges.LEAST_ROWS, []
    for number, tokens in enumerate(calls):
        given = cases.here(_inputs(number, tokens), tokens)
        results = []
        for ranges.LEAST_ROWS in (1 << 40, enough):
            results.append(cases.run(ep, given, **options))
        for name, after, beside in zip(cases.Results._fields, *results, strict=True):
            if after is not None and not torch.equal(after, beside):
                found.append(f"call {number}, {tokens}: {name} of rank {dist.get_rank()}")
    return found


def in_a_graph(fp8: bool) -> list[str]:
    """A step captured and replayed: rows come before products there, and leave beside them."""
    ep, options = _layer(fp8)
    tokens = [MAX_TOKENS] * dist.get_world_size()
    return cases.replayed(ep, [cases.here(_inputs(seed, tokens), tokens) for seed in range(3)], **options)


def _layer(fp8: bool) -> tuple[ExpertParallel, dict[str, Fp8Recipe]]:
    """With enough rows, and options of a call."""
    assert dist.get_world_size() * MAX_TOKENS * cases.K >= ranges.LEAST_ROWS * cases.E
    layer = {"wire": "fp8"} if fp8 else {}
    ep = cases.make(hidden=HIDDEN, max_tokens=MAX_TOKENS, transport="gather", **layer)
    return ep, {"recipe": Fp8Recipe(scale="pow2")} if fp8 else {}


def _inputs(seed: int, tokens: Sequence[int]) -> cases.Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=g)).bfloat16()

    total = sum(tokens)
    ids = torch.rand(total, cases.E, generator=g).argsort(1)[:, : cases.K]
    scores = torch.rand(total, cases.K, generator=g)
    w1 = normal(cases.E, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5)
    w2 = normal(cases.E, HIDDEN, INNER, scale=INNER**-0.5)
    x, dout = normal(total, HIDDEN), normal(total, HIDDEN)
    return cases.on_device(cases.Inputs(x, ids, scores, w1, None, w2, None, dout))
