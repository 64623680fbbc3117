"""FP8 experts whose tokens come and go beside their products: three parts of the row blocks (``ranges.py``).

    this stream     up(own)   up(after)   up(before)   down(before) sum   down(after) sum   down(own) sum   total
    beside it     after here  before here                      before leaves     after leaves      own

Choices and scales come first, in one message, because the plan is made of them. A part of the up-projection waits for
its sources; sums of the tokens of a part's sources leave as soon as its down-projection is done. The parts have the
tiles of one launch, and the sums are those of each token, so not one bit differs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supersonic_moe.kernels.interface import Fp8Experts, Quantized, RowBlocks, Rows, TokenRows, UpProjection
from supersonic_moe.parallel import ranges
from supersonic_moe.parallel.copies import Copies
from supersonic_moe.parallel.trip import Trip
from supersonic_moe.quantization.block_format import E4M3
from supersonic_moe.training.arguments import Fp8Forward

ALIGNMENT = 16
"""Bytes at which rows of codes start, for TMA; rows travel padded to it."""


def padded_bytes(codes_TH: Tensor) -> Tensor:
    return F.pad(codes_TH.view(torch.uint8), (0, -codes_TH.shape[1] % ALIGNMENT))


class Way(NamedTuple):
    """Of a call in parts."""

    copies: Copies
    trip: Trip
    parts: ranges.Parts
    codes: Tensor
    """(U, H) e4m3, which are there when ``arriving`` has been called."""
    arriving: list[RowBlocks]
    places: int


def takes(trip: Trip, codes_TH: Tensor, top_k: int) -> Copies | None:
    """The copies that carry a call in parts; None where it is better, or only possible, in one."""
    copies, places = trip.ranks, trip.token_S.shape[0] // trip.copy_TR.shape[1]
    if not (trip.gathers and isinstance(copies, Copies)):
        return None
    enough = trip.token_S.shape[0] * top_k >= ranges.LEAST_ROWS * trip.experts_here * trip.copy_TR.shape[1]
    hidden = codes_TH.shape[1]
    fits = copies.takes(padded_bytes(codes_TH), places) and copies.takes(codes_TH.new_empty(0, 2 * hidden), places)
    return copies if enough and fits else None


def start(copies: Copies, trip: Trip, codes_TH: Tensor, ids_UK: Tensor) -> Way:
    """The codes set out."""
    ranks, places = trip.copy_TR.shape[1], trip.token_S.shape[0] // trip.copy_TR.shape[1]
    parts = ranges.parts_of(ids_UK, trip.experts_here, trip.first_expert // trip.experts_here, ranks)
    in_order = parts.in_order()
    sources = [part.sources for part in in_order]
    rows_UC, there = copies.gather_in_parts(padded_bytes(codes_TH), places, sources, trip.call, "forward dispatch")
    arriving = [RowBlocks(part.begin_E, part.end_E, here) for part, here in zip(in_order, there, strict=True)]
    return Way(copies, trip, parts, rows_UC.view(E4M3)[:, : codes_TH.shape[1]], arriving, places)


def forward(k: Fp8Experts, call: Fp8Forward, x_q: Quantized, way: Way) -> tuple[Tensor, Tensor, Quantized]:
    """(out (T, H), scores of the rows (P,), Z): ``training.fp8.forward``, and what it gives brought home."""
    plan, offsets = call.plan, call.plan.expert_offsets
    x = Rows(x_q, plan.read_index)
    up = UpProjection(x, call.w1, call.b1, offsets, plan.row_expert, call.static.gate(), call.save)
    z, a = k.up_projection_fp8(up, call.numerics.recipe(), way.arriving)
    s_P = k.pick(call.scores, plan.scatter_index)
    tokens, hidden = call.x.shape
    rows_UK = plan.rows_of_tokens(tokens).rows.view(tokens, -1)
    home = way.copies.departure(way.places, hidden, torch.bfloat16, way.trip.call, "forward combine")

    def leave(part: ranges.Part) -> RowBlocks:
        here = slice(part.sources.start * way.places, part.sources.stop * way.places)
        count = len(part.sources) * way.places

        def summed(y_PH: Tensor) -> None:
            if count:
                rows = TokenRows(rows_UK[here].reshape(-1), None, rows_UK.shape[1], count)
                home.send(k.gather_sum(y_PH, s_P, call.b2, plan.row_expert, rows), part.sources)

        return RowBlocks(part.begin_E, part.end_E, after=summed)

    before, own, after = way.parts
    k.grouped_mm_fp8(Rows(a), call.w2, offsets, [leave(part) for part in (before, after, own)])
    return way.trip.summed(home.arrived()), s_P, z
