"""One channel of an ExpertParallel: what a call in flight needs for itself, and how a call begins.

A channel has a process group, limits on waits, buffers with their flags, and a count of calls. Calls of one channel
come one after the other; those of two have nothing in common, so each may be on a stream of its own.

    all_to_all, exact    one exchange of numbers first: how many tokens and rows come from each rank    (R, 4 + E/R)
    all_to_all, fixed    the largest number that any rank has for another                               (1,)
    gather, push         nothing: the place of each token is its number
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from supersonic_moe.parallel.collectives import Collectives, Needed, name_of
from supersonic_moe.parallel.departures import Departures, departures, departures_everywhere, in_fixed_places
from supersonic_moe.parallel.overflow import Overflow
from supersonic_moe.parallel.transport import choose
from supersonic_moe.parallel.trip import Trip
from supersonic_moe.parallel.watch import ExpertParallelError, Watch
from supersonic_moe.private_api import default_store

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Sizes(NamedTuple):
    """Of an ExpertParallel."""

    num_experts: int
    top_k: int
    max_tokens: int
    row_bytes: int
    """Of the rows of an exchange, at most."""
    capacity: int | Literal["exact"]
    timeout_s: float
    names: tuple[str, str]
    """What the user made, and its limit of tokens."""
    largest_bank: int | None
    """Bytes of one of the two buffers that copies go through, at most."""


class Channel:
    """Channel ``number`` of the ranks of ``group``; collective. ``transport`` is what was asked for, ``key`` a name of
    the ExpertParallel that all ranks know, and no other one has.
    """

    def __init__(self, group: dist.ProcessGroup, number: int, transport: str, sizes: Sizes, key: str) -> None:
        self.rank, self.size, self._sizes = dist.get_rank(group), dist.get_world_size(group), sizes
        self.first_expert = self.rank * sizes.num_experts // self.size
        self.experts_here = sizes.num_experts // self.size
        what = f"expert parallel group {name_of(group)!r} ({self.size} ranks)"
        if number:
            what = f"channel {number} of {what}"
            group = _again(group)
        self.watch = Watch(
            what, self.rank, self.size, default_store(f"{key}/{number}"), sizes.timeout_s, sizes.names[0]
        )
        self._collectives = Collectives(group, self.watch)
        self.transport, self.ranks, self.how = choose(
            transport, self._collectives, self.watch, num_experts=sizes.num_experts, top_k=sizes.top_k,
            places=sizes.max_tokens, row_bytes=sizes.row_bytes, largest_bank=sizes.largest_bank,
        )  # fmt: skip
        self.fixed_places = self.transport != "all_to_all"
        """Whether every token has a place on every rank, needed there or not."""
        capacity = sizes.capacity
        self.overflow = None if capacity == "exact" else Overflow(self._collectives, capacity)
        self.calls = 0
        self._inside = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call, from its first look at its arguments on: the other ranks are told if this one cannot go on. Inside
        another one it is a part of that. A call whose arguments are refused counts, too, as it does on other ranks.
        """
        if self._inside:
            yield
            return
        self._inside = True
        self.calls += 1
        try:
            with self.watch.telling(self.calls):
                yield
        finally:
            self._inside = False

    def refuse(self, error: Exception) -> None:
        """The next call is left out, and the others are told."""
        self.calls += 1
        self.watch.refuse(self.calls, error)

    def departures(self, ids_TK: Tensor) -> Departures:
        ids_TK, experts, most = ids_TK.contiguous(), self._sizes.num_experts, self._sizes.max_tokens
        if not self.fixed_places:
            return departures(ids_TK, experts, self.size)
        self.check_tokens(ids_TK.shape[0])
        return departures_everywhere(ids_TK, experts, self.size, most)

    def check_tokens(self, tokens: int) -> None:
        """Where each rank finds out by itself."""
        if tokens > self._sizes.max_tokens:
            raise self._too_many(f"got {tokens}")

    def start(self, x_TH: Tensor, scores_TK: Tensor, found: Departures) -> tuple[Trip, list[int] | None, Tensor]:
        """The trip of this call, the rows of each expert here if the host knows, and scores to send."""
        if scores_TK.dtype not in (torch.float32, torch.float64):
            scores_TK = scores_TK.float()
        with self.watch.raising_everywhere():
            if self.fixed_places or self.overflow is not None:
                self._compare(x_TH, scores_TK)
            if self.fixed_places:
                return self._trip(found, None, None), None, scores_TK
            if self.overflow is None:
                return *self._meet(x_TH, scores_TK, found), scores_TK
            scores_TK = self.overflow.guard(scores_TK, found.tokens_R, self.calls)
        return self._trip(in_fixed_places(found, self.overflow.capacity), None, None), None, scores_TK

    def _meet(self, x_TH: Tensor, scores_TK: Tensor, found: Departures) -> tuple[Trip, list[int]]:
        """Tell all ranks what comes from here, and hear what comes from them: the one wait for the host."""
        ranks, here, signature = self.size, self.experts_here, _signature(x_TH, scores_TK)
        common = found.rows_E.new_tensor([self.calls, signature, x_TH.shape[0]])
        mine = torch.cat((common.expand(ranks, 3), found.tokens_R.long()[:, None], found.rows_E.view(ranks, here)), 1)
        theirs = self._collectives.exchange(mine, self.calls, "forward dispatch", None, None)
        host = torch.cat((found.tokens_R.long(), theirs.view(-1))).tolist()
        self.watch.check()  # on a GPU an aborted exchange ends, too, and leaves any numbers
        sent, told = host[:ranks], [host[i : i + 4 + here] for i in range(ranks, len(host), 4 + here)]
        self._check_told(told, (self.calls, signature, x_TH.shape[0]))
        rows = [sum(column) for column in zip(*(source[4:] for source in told), strict=True)]
        found = found._replace(token_M=found.token_M[: sum(sent)])
        return self._trip(found, sent, [source[3] for source in told]), rows

    def _compare(self, x_TH: Tensor, scores_TK: Tensor) -> None:
        """Calls for which no host need wait, on a CPU, where it waits all the same. Flags between GPUs carry the number
        of a call (``copies.py``).
        """
        if x_TH.device.type == "cpu" and self.ranks is self._collectives:
            mine = self.calls, _signature(x_TH, scores_TK), x_TH.shape[0]
            told = self._collectives.gather(torch.tensor([mine]), 1, 0, self.calls, "forward dispatch")
            self._check_told(told.tolist(), mine)

    def _check_told(self, told: list[list[int]], mine: tuple[int, int, int]) -> None:
        """Every rank hears the same, so all of them raise or none."""
        for rank, (call, signature, tokens, *_) in enumerate(told):
            if (call, signature) != mine[:2]:
                why = self.watch.ahead((call, mine[0])) or "Run the same layers and steps on every rank."
                raise ExpertParallelError(
                    f"ranks must make the same calls; rank {self.rank} is in {_described(*mine[:2])}, rank {rank} in "
                    f"{_described(call, signature)}. {why}"
                )
            if tokens > self._sizes.max_tokens:
                raise self._too_many(f"rank {rank} has {tokens}")

    def _trip(self, found: Departures, sent: list[int] | None, received: list[int] | None) -> Trip:
        places = found.token_M, found.copy_TR, found.copy_TK
        needed = Needed(found.copy_TR) if self.transport == "push" else None
        here = self.first_expert, self.experts_here
        return Trip(self.ranks, self.calls, *places, sent, received, self.fixed_places, *here, needed)

    def _too_many(self, found: str) -> ValueError:
        kind, limit = self._sizes.names
        return ValueError(
            f"a rank must not have more than {limit} = {self._sizes.max_tokens} tokens in a call; {found}. Make the "
            f"{kind} with a larger {limit}."
        )


def _again(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same ranks in the same order, whose collectives need not wait for those of the first."""
    ranks = dist.get_process_group_ranks(group)
    order = {} if ranks == sorted(ranks) else {"sort_ranks": False}
    backend = dist.get_backend_config(group)
    other: dist.ProcessGroup = dist.new_group(
        ranks,
        backend=backend,
        use_local_synchronization=True,
        **order,  # type: ignore[arg-type]
    )
    return other


def _signature(x_TH: Tensor, scores_TK: Tensor) -> int:
    grad = torch.is_grad_enabled()
    return _DTYPES.index(x_TH.dtype) * 4 + 2 * (grad and x_TH.requires_grad) + (grad and scores_TK.requires_grad)


def _described(call: int, signature: int) -> str:
    kinds = [name for bit, name in ((2, "x"), (1, "scores")) if signature & bit]
    dtype = str(_DTYPES[signature // 4]).removeprefix("torch.")
    return f"call {call} ({dtype}, {'gradients of ' + ' and '.join(kinds) if kinds else 'no gradients'})"
