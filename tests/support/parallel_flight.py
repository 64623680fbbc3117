"""What ranks of tests/parallel keep from forward to backward, and calls in flight at the same time."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import parallel_cases as cases
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from supersonic_moe import Fp8Recipe
from supersonic_moe.parallel.trip import Trip


def received_alive(way: dict[str, Any], fp8: bool) -> list[int]:
    """How many tensors of received tokens are alive between forward and backward, with and without
    ``keep_received``.
    """
    tokens = (9, 5)
    given = cases.here(cases.inputs(tokens, torch.bfloat16), tokens)
    recipe = {"recipe": Fp8Recipe(scale="pow2")} if fp8 else {}
    found: list[weakref.ref[Tensor]] = []
    send = Trip.send

    def recorded(trip: Trip, phase: str, rows: Tensor) -> Tensor:
        arrived = send(trip, phase, rows)
        if phase == "forward dispatch" and rows.dtype in (torch.bfloat16, torch.uint8):
            found.append(weakref.ref(arrived.untyped_storage()))
        return arrived

    Trip.send = recorded  # type: ignore[method-assign]
    alive = []
    for keep in (True, False):
        ep = cases.make(keep_received=keep, wire="fp8" if fp8 else "exact", **way)
        out = ep.experts(
            *(cases.leaf(t) if t.is_floating_point() else t for t in given[:3]), given.w1, given.w2, **recipe
        )
        alive.append(sum(r() is not None for r in found))
        del out
        ep.close()
    Trip.send = send  # type: ignore[method-assign]
    return alive


def changed_in_place() -> str:
    """x changes between forward and backward."""
    tokens = (4, 4)
    given = cases.here(cases.inputs(tokens, torch.float32), tokens)
    ep = cases.make(keep_received=False)
    w1, x = cases.leaf(given.w1), given.x.clone()
    out = ep.experts(x, given.ids, given.scores, w1, given.w2)
    x.zero_()
    error = cases.error_of(lambda: out.sum().backward())
    ep.close()
    return error


def explained() -> list[str]:
    """With and without both options."""
    found = []
    for options in ({}, {"keep_received": False, "channels": 2}):
        ep = cases.make(**options)
        found.append(ep.explain())
        ep.close()
    return found


def checkpointed(tokens: Sequence[int], way: dict[str, Any]) -> list[str]:
    """Steps of the experts alone under activation checkpointing, which ends the second forward as soon as it can, or
    runs all of it, as where more follows in the block.
    """
    given = cases.inputs(tokens, torch.float32)
    mine, want = cases.here(given, tokens), cases.one_process(given, 2)
    ep, found = cases.make(**way), list[str]()
    for early in (True, True, False):
        x, scores, w1, w2 = map(cases.leaf, (mine.x, mine.scores, mine.w1, mine.w2))
        with set_checkpoint_early_stop(early):
            out = checkpoint(ep.experts, x, mine.ids, scores, w1, w2, use_reentrant=False)
        out.backward(mine.dout)
        got = cases.Results(out.detach(), x.grad, scores.grad, w1.grad, w2.grad, None, None)
        found += cases.differences(way, got, want, tokens)
    ep.check()
    ep.close()
    return found


def in_two_threads(count: int, way: dict[str, Any]) -> list[str]:
    """Each thread makes calls of its own through a channel of its own, at its own pace, unlike on other ranks."""
    ep, found = cases.make(channels=2, **way), list[str]()

    def calls(number: int) -> None:
        draw, pace = random.Random(number), random.Random(10 * ep.rank + number)
        with ep.channel(number):
            for _ in range(count):
                tokens = [draw.randrange(40) for _ in range(ep.size)]
                given = cases.inputs(tokens, torch.bfloat16)
                time.sleep(0.02 * pace.random())
                got = cases.run(ep, cases.here(given, tokens))
                found.extend(cases.differences(number, got, cases.one_process(given, ep.size), tokens))
        found.append(f"channel {number} is done")

    threads = [threading.Thread(target=calls, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found += [cases.error_of(lambda n=n: ep.channel(n).__enter__()) for n in (2, "0")]
    ep.close()
    return sorted(found)
