"""What two ranks with a GPU each run: all pairs of token counts, and two groups at the same time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import parallel_cases as cases
import ranks
import torch
import torch.distributed as dist
from parallel_cases import E, Inputs, K

from supersonic_moe.parallel import ExpertParallel


def inputs(tokens: Sequence[int], masked: float, hidden: int, inner: int) -> Inputs:
    """In bf16, of all ranks; choices have no expert with probability ``masked``."""
    g = torch.Generator().manual_seed(sum(t * 7**i for i, t in enumerate(tokens)))
    total = sum(tokens)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=g)).bfloat16()

    ids = torch.rand(total, E, generator=g).argsort(1)[:, :K]
    ids = torch.where(torch.rand(total, K, generator=g) < masked, torch.tensor([-1, E, 2**40])[:K], ids)
    w1, w2 = normal(E, 2 * inner, hidden, scale=hidden**-0.5), normal(E, hidden, inner, scale=inner**-0.5)
    b1, b2 = normal(E, 2 * inner), normal(E, hidden)
    x, scores, dout = normal(total, hidden), torch.rand(total, K, generator=g), normal(total, hidden)
    return cases.on_device(Inputs(x, ids, scores, w1, b1, w2, b2, dout))


def all_pairs(counts: Sequence[int], transports: Sequence[str], hidden: int, inner: int) -> list[str]:
    """Where a forward and backward has other bits than one process, of two ranks with any two of the ``counts``, in any
    order. Objects of each transport take turns in one group.
    """
    ways = [_of(dist.group.WORLD, transport, hidden=hidden, max_tokens=max(counts)) for transport in transports]
    pairs, found = list(itertools.product(counts, repeat=2)), list[str]()
    random.Random(0).shuffle(pairs)
    for number, tokens in enumerate(pairs):
        given = inputs(tokens, (0.0, 0.3, 0.7)[number % 3], hidden, inner)
        want = cases.one_process(given, 2)
        for transport, ep in zip(transports, ways, strict=True):
            got = cases.run(ep, cases.here(given, tokens))
            found += cases.differences((transport, tokens), got, want, tokens)
    for ep in ways:
        ep.check()
        ep.close()
    return found


def two_groups(count: int, transport: str) -> list[str]:
    """Calls of two groups in pairs, both forwards first, each group on a stream of its own where there are streams:
    where they have other bits than one process. The groups take turns in being first.
    """
    made = [_of(group, transport) for group in _groups()]
    on_gpu = ranks.device().type == "cuda"
    streams = [torch.cuda.Stream() for _ in made] if on_gpu else []
    draw, found = random.Random(0), list[str]()

    def on(group: int) -> AbstractContextManager[Any]:
        if not streams:
            return nullcontext()
        streams[group].wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(streams[group])

    for number in range(count):
        order = (0, 1) if draw.randrange(2) else (1, 0)
        calls = {group: _drawn(draw) for group in order}
        leaves, outs = {}, {}
        for group in order:
            tokens, whole = calls[group]
            given = cases.here(whole, tokens)
            with on(group):
                x, scores, w1, w2 = leaves[group] = [*map(cases.leaf, (given.x, given.scores, given.w1, given.w2))]
                outs[group] = made[group].experts(x, given.ids, scores, w1, w2)
        for group in reversed(order) if draw.randrange(2) else order:
            tokens, whole = calls[group]
            dout = cases.here(whole, tokens).dout
            with on(group):
                outs[group].backward(dout)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for group, (tokens, whole) in calls.items():
            got = cases.Results(outs[group].detach(), *(t.grad for t in leaves[group]), None, None)
            found += cases.differences((number, group, tokens), got, cases.one_process(whole, 2), tokens)
    for ep in made:
        ep.check()
        ep.close()
    return found


def _groups() -> list[Any]:
    """Two of all ranks."""
    return [dist.group.WORLD, dist.new_group()]


def _of(group: Any, transport: str, **sizes: int) -> ExpertParallel:
    sizes = {"num_experts": E, "top_k": K, "hidden": cases.H, "max_tokens": 64} | sizes
    ep = ExpertParallel(group, transport=transport, timeout_s=60.0, **sizes)  # type: ignore[arg-type]
    if transport != "all_to_all" and ranks.device().type == "cuda":
        assert "GPUs that reach each other's memory" in ep.explain(), ep.explain()
    return ep


def _drawn(draw: random.Random) -> tuple[tuple[int, int], Inputs]:
    tokens = draw.choice((0, 1, 17, draw.randrange(64))), draw.choice((0, 2, draw.randrange(64)))
    return tokens, cases.inputs(tokens, torch.bfloat16, draw.choice(("random", "skewed", "masked", "nobody")))


_kept: list[ExpertParallel] = []


def teardown(order: str, transport: str) -> str:
    """Two groups leave in some ``order``, after a call of each."""
    made, tokens = [_of(group, transport) for group in _groups()], (3, 3)
    given = cases.here(cases.inputs(tokens, torch.bfloat16), tokens)
    for ep in made:
        cases.run(ep, given)
    first, second = made
    del made, ep
    if order == "close, destroy":
        first.close()
        second.close()
        dist.destroy_process_group()
    elif order == "destroy, close":
        dist.destroy_process_group()
        second.close()
        first.close()
    elif order == "destroy, drop":
        dist.destroy_process_group()
        del first, second
    elif order == "drop":
        del second, first
    else:  # exit: neither, and both live as long as the process
        _kept.extend((first, second))
    return order
