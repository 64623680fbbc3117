"""The way of a call's tokens, there and back, and autograd along it.

    send      rows of tokens to the ranks that need them     (T, ·) -> (U, ·)     x, ids and scores; dout
    back      a row for each copy that was sent              (U, ·) -> (S, ·)     partial outputs; dx parts and dscores
    summed    rows of a token's copies, in order of ranks    (S, ·) -> (T, ·)

T tokens here, S copies sent, U copies received, C columns, K choices a token, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.autograd import refuse_second_derivatives
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import TokenRows
from supersonic_moe.parallel.collectives import Needed, Ranks, elements_as
from supersonic_moe.private_api import versions_of


class Trip(NamedTuple):
    ranks: Ranks
    call: int
    token_S: Tensor
    """int32 token of each copy sent; -1 for an empty place."""
    copy_TR: Tensor
    """int32 copy of each token for each rank; -1 where it does not go."""
    copy_TK: Tensor
    """int32 copy that carries each choice; -1 where it has no expert."""
    sent: Sequence[int] | None
    """Copies for each rank, on the host; None: the same number of places for each, some of them empty."""
    received: Sequence[int] | None
    gathers: bool
    """The place of a token on each rank is its number, whether or not it goes there."""
    first_expert: int
    experts_here: int
    needed: Needed | None = None
    """Rows that travel once choices have come, if not all do."""

    @property
    def arrived(self) -> int:
        """U"""
        return self.token_S.shape[0] if self.received is None else sum(self.received)

    def send(self, phase: str, rows_TC: Tensor) -> Tensor:
        """(U, C). In an empty place int32 rows have -1, others anything: no plan reads them."""
        if self.gathers:
            places, choices = self.token_S.shape[0] // self.copy_TR.shape[1], rows_TC.dtype is torch.int32
            needed = None if choices else self.needed
            return self.ranks.gather(rows_TC, places, -1 if choices else 0, self.call, phase, needed)
        if self.sent is not None:
            rows_SC = rows_TC.index_select(0, self.token_S)
        elif rows_TC.shape[0]:
            rows_SC = rows_TC.index_select(0, self.token_S.clamp(min=0))
        else:
            rows_SC = rows_TC.new_zeros(self.token_S.shape[0], rows_TC.shape[1])
        if self.sent is None and rows_TC.dtype is torch.int32:
            rows_SC = torch.where(self.token_S[:, None] >= 0, rows_SC, -1)
        return self.ranks.exchange(rows_SC, self.call, phase, self.sent, self.received)

    def send_choices(self, phase: str, ids_TK: Tensor, scores_TK: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """(ids (U, K) int32, scores (U, K), ``more`` (U, ·)...) in one message, the first of a call; elements are of 4
        or 8 bytes. Ids of this rank are counted from 0, others lie outside [0, E/R).
        """
        parts = [ids_TK, *(elements_as(torch.int32, t) for t in (scores_TK, *more))]
        message_UC = self.send(phase, torch.cat(parts, 1))
        ids_UK, *others = torch.split(message_UC, [t.shape[1] for t in parts], 1)
        ids_UK = ids_UK - self.first_expert
        if self.needed is not None:
            routing = registry.kernels(registry.choose(ids_UK.device).name).routing
            self.needed.rows = routing.needed_rows(ids_UK, self.experts_here, self.copy_TR.shape[1])
        copies = (t.clone(memory_format=torch.contiguous_format) for t in others)  # at aligned addresses
        return ids_UK, *(t.view(like.dtype) for t, like in zip(copies, (scores_TK, *more), strict=True))

    def again(self, x_TH: Tensor) -> Callable[[], Tensor]:
        """What sends x once more, in backward: (U, H) as it came in forward, if x is what it was."""
        x_TH, (version,) = x_TH.detach(), versions_of([x_TH])

        @torch.no_grad()
        def send() -> Tensor:
            if versions_of([x_TH]) != [version]:
                raise RuntimeError(
                    "x was changed in place between forward and backward, which sends it once more with "
                    "keep_received=False. Change a copy of it, or keep what was received."
                )
            return self.send("backward dispatch", x_TH)

        return send

    def back(self, phase: str, rows_UC: Tensor) -> Tensor:
        """(S, C)"""
        return self.ranks.exchange(rows_UC, self.call, phase, self.received, self.sent, self.needed)

    def summed(self, rows_SC: Tensor) -> Tensor:
        """(T, C): the rows of each token's copies, added in order of ranks and rounded once."""
        tokens, ranks = self.copy_TR.shape
        copies = TokenRows(self.copy_TR.view(-1), None, ranks, tokens)
        choice = registry.choose(rows_SC.device, rows_SC.dtype, hidden=rows_SC.shape[1])
        return registry.kernels(choice.name).experts.gather_sum(rows_SC, None, None, self.token_S, copies)

    def of_choices(self, values_SK: Tensor) -> Tensor:
        """(T, K): the value of each choice, from the copy that carried it; 0 where there is none."""
        k = values_SK.shape[1]
        choice_K = torch.arange(k, device=values_SK.device, dtype=torch.int32)
        index_TK = torch.add(choice_K, self.copy_TK, alpha=k)  # less than 0 where there is no copy
        pick = registry.kernels(registry.choose(values_SK.device).name).experts.pick  # of any dtype, as routing is
        return pick(values_SK.view(-1), index_TK.view(-1).to(torch.int32)).view_as(index_TK)


@dataclass
class Dispatched:
    """Tokens that arrived on this rank, in order of source rank, then token."""

    x: Tensor
    """(U, H), anything finite where no choice lives here."""
    ids: Tensor
    """(U, K) int32 experts of this rank, counted from 0; -1 where a choice lives elsewhere."""
    scores: Tensor
    """(U, K); their gradient goes home, and is 0 where a choice lives elsewhere."""
    rows_per_expert: Sequence[int] | Tensor
    """(E/R,) on the host; where the host does not know, a tensor on the device."""
    plan: RoutingPlan
    """Of these tokens and the experts of this rank."""
    handle: Trip | None
    """For ``combine``; None where a group has one rank and nothing travelled."""


class Dispatch(torch.autograd.Function):
    """``apply(x (T, H), scores (T, K), ids (T, K), trip)`` -> (x (U, H), scores (U, K), ids (U, K))."""

    @staticmethod
    def forward(x_TH: Tensor, scores_TK: Tensor, ids_TK: Tensor, trip: Trip) -> tuple[Tensor, Tensor, Tensor]:
        ids_UK, scores_UK = trip.send_choices("forward dispatch", ids_TK, scores_TK)
        x_UH = trip.send("forward dispatch", x_TH)
        return x_UH, scores_UK, torch.where((ids_UK >= 0) & (ids_UK < trip.experts_here), ids_UK, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.trip = inputs[3]
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dx_UH: Tensor, dscores_UK: Tensor, _ids: Tensor) -> tuple[Tensor | None, ...]:
        trip, needs = ctx.trip, ctx.needs_input_grad[:2]
        with torch.no_grad():
            dx = trip.summed(trip.back("backward combine", dx_UH)) if needs[0] else None
            dscores = trip.of_choices(trip.back("backward combine", dscores_UK)) if needs[1] else None
        grads = [dx, dscores]
        if torch.is_grad_enabled():  # create_graph
            grads = refuse_second_derivatives(_ONCE, grads, (dx_UH, dscores_UK))
        return *grads, None, None


class Combine(torch.autograd.Function):
    """``apply(part (U, H), trip)`` -> out (T, H)."""

    @staticmethod
    def forward(part_UH: Tensor, trip: Trip) -> Tensor:
        return trip.summed(trip.back("forward combine", part_UH))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.trip = inputs[1]

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads: Sequence[Tensor | None] = (ctx.trip.send("backward dispatch", dout_TH),)
        if torch.is_grad_enabled():  # create_graph
            grads = refuse_second_derivatives(_ONCE, grads, (dout_TH,))
        return *grads, None


_ONCE = (
    "second derivatives do not exist across ranks. Leave create_graph out, or use a layer on one rank where its "
    "gradient is differentiated again."
)
