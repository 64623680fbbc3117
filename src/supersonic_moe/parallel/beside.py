"""Experts whose tokens come and go beside their products, in parts of the row blocks (``ranges.py``).

    this stream     up-projection: own, after, before    down(before) sum   down(after) sum   down(own) sum     total
    beside it          after come   before come                  before leave       after leave

    this stream     down backward: own, after, before    dx sum    dW2    dW1    total
    beside it          dO of after  dO of before                   dx leaves

What comes is waited for inside a product, by the warps that load it: one launch, whose tiles of own rows come first.
What leaves has been summed by token, so the down-projection is a launch for each part; own sums are written to where
they are added up. Beside products there are nothing but copies, which need no multiprocessor, and which are enqueued
before what waits for them; what waits for another rank does so between products. Choices come first, in one message,
because the plan is made of them. The parts have the tiles of one launch, and the sums are those of each token, so not
one bit differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from supersonic_moe.kernels.alignment import ALIGNMENT
from supersonic_moe.kernels.interface import Arrivals, Experts, RowBlocks, TokenRows
from supersonic_moe.parallel import ranges
from supersonic_moe.parallel.copies import Copies, Departure
from supersonic_moe.parallel.trip import Trip
from supersonic_moe.training.arguments import Plan


def padded(rows_TC: Tensor) -> Tensor:
    """Rows as they travel: each starts where TMA can load it."""
    missing = -rows_TC.shape[1] % (ALIGNMENT // rows_TC.element_size())
    return F.pad(rows_TC, (0, missing)) if missing else rows_TC


class Way(NamedTuple):
    """Of a call whose rows travel beside products."""

    copies: Copies
    trip: Trip
    places: int
    """M: of each rank."""

    @classmethod
    def of(cls, trip: Trip, rows_TC: Tensor, sums: Tensor, top_k: int) -> Way | None:
        """None where it is better, or only possible, not to. ``rows`` come, and what is like ``sums`` leaves."""
        copies, ranks = trip.ranks, trip.copy_TR.shape[1]
        if not (trip.gathers and isinstance(copies, Copies) and copies.beside_products):
            return None
        places = trip.token_S.shape[0] // ranks
        enough = places * top_k >= ranges.LEAST_ROWS * trip.experts_here
        fits = all(copies.takes(rows[:0], places, at_once=True) for rows in (padded(rows_TC[:0]), sums))
        return cls(copies, trip, places) if enough and fits else None

    def arrive(self, rows_TC: Tensor, phase: str) -> tuple[Tensor, Tensor | None]:
        """(rows (U, C) that are on their way, parts that are there (parts,))."""
        parts = ranges.sources_of(self.copies.rank, self.trip.copy_TR.shape[1])
        rows_UC, there_P = self.copies.gather_in_parts(padded(rows_TC), self.places, parts, self.trip.call, phase)
        return rows_UC[:, : rows_TC.shape[1]], there_P

    def parts(self, plan: Plan) -> ranges.Parts:
        return ranges.parts_of(plan, self.copies.rank, self.trip.copy_TR.shape[1], self.places)

    def arrivals(self, parts: ranges.Parts, there_P: Tensor | None) -> Arrivals:
        return Arrivals(parts.begin_PE, parts.end_PE, there_P, self.copies.join)

    def sums(
        self,
        k: Experts,
        parts: ranges.Parts,
        product: Callable[[Sequence[RowBlocks]], Tensor],
        row_scores_P: Tensor,
        b2: Tensor | None,
        plan: Plan,
        like: Tensor,
    ) -> Tensor:
        """(T, H): the down-projection ``product`` in parts, whose sums of the tokens of a part leave while the next one
        is computed. ``like``: a tensor of H columns in the dtype of the result.
        """
        trip, places = self.trip, self.places
        tokens, hidden = trip.token_S.shape[0], like.shape[1]
        rows_UK = plan.rows_of_tokens(tokens).rows.view(tokens, -1)
        home = self.copies.departure(places, hidden, like.dtype, trip.call, "forward combine")

        def leave(at: int, sources: range) -> RowBlocks:
            here, count = slice(sources.start * places, sources.stop * places), len(sources) * places

            def summed(y_PH: Tensor) -> None:
                rows = TokenRows(rows_UK[here].reshape(-1), None, rows_UK.shape[1], count)
                own = home.own() if at == 0 else None
                sums = k.gather_sum(y_PH, row_scores_P, b2, plan.row_expert, rows, own)
                if own is None:
                    home.send(sums, sources)

            return RowBlocks(parts.begin_PE[at], parts.end_PE[at], summed)

        product([leave(at, sources) for at, sources in reversed([*enumerate(parts.sources)])])
        return trip.summed(home.arrived())


class WayBack:
    """dx and dscores on their way home, in backward: dx leaves as soon as it is there, beside the weight gradients."""

    def __init__(self, trip: Trip) -> None:
        self._trip = trip
        self._home: Departure | None = None

    @property
    def leave(self) -> Callable[[Tensor | None], None] | None:
        """What is called with dx before the weight gradients; None where nothing can go on beside them."""
        ranks = self._trip.ranks
        return self._leave if isinstance(ranks, Copies) and ranks.beside_products else None

    def _leave(self, dx_UH: Tensor | None) -> None:
        trip, copies = self._trip, self._trip.ranks
        assert isinstance(copies, Copies)
        copies.join()  # dO is no longer on its way
        if dx_UH is None or trip.sent is not None:
            return
        ranks = trip.copy_TR.shape[1]
        places = trip.token_S.shape[0] // ranks
        if copies.takes(dx_UH, places, at_once=True):
            self._home = copies.departure(places, dx_UH.shape[1], dx_UH.dtype, trip.call, "backward combine")
            self._home.send(dx_UH, range(ranks))

    def arrived(self, dx_UH: Tensor | None, dscores_S: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(dx (T, H), dscores (T, K)) at home."""
        trip = self._trip
        dx = dscores = None
        if dx_UH is not None:
            dx = trip.summed(trip.back("backward combine", dx_UH) if self._home is None else self._home.arrived())
        if dscores_S is not None:
            dscores_UK = dscores_S.view(trip.arrived, trip.copy_TK.shape[1])
            dscores = trip.of_choices(trip.back("backward combine", dscores_UK))
        return dx, dscores
