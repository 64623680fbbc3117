"""The row blocks of a call in up to three parts, so that rows travel while products run.

Inside an expert, rows lie in order of source rank: those of sources before this rank, its own, those of sources after
it. Blocks of RANGE_ROWS are divided at the two borders:

    way in     own, after, before     sources are copied from in this order: this rank, those after it, those before it
    way out    before, after, own     rows leave as soon as they are summed; own ones need not travel

A block with rows of two kinds goes to the part that comes last on the way in: to *before* if it has any of those rows,
else to *after*. On the way out that part comes earlier, so rows are complete when their sources get them. Each block is
in one part, so the tiles are those of one launch, and so are the bits. An expert without a whole block of own rows has
none in *own*. The first rank has no *before*, the last one no *after*.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import RANGE_ROWS, Sources
from supersonic_moe.training.arguments import Plan

LEAST_ROWS = 4 * RANGE_ROWS
"""Of an expert, on average, from which on rows travel beside products. A guess until several GPUs have run it."""


class Parts(NamedTuple):
    """Blocks of each expert, part by part in order of the way in; that of the way out is the reverse."""

    begin_PE: Tensor
    """(parts, E) int32, in blocks from the first row of the expert on."""
    end_PE: Tensor
    sources: list[range]
    """Of each part: ranks whose rows are complete with it."""


def sources_of(rank: int, ranks: int) -> list[range]:
    """The parts of ``rank``, by what is copied for them; its own rows come first."""
    others = range(rank + 1, ranks), range(rank)
    return [range(rank, rank + 1), *(sources for sources in others if sources)]


def parts_of(plan: RoutingPlan | Plan, rank: int, ranks: int, places: int) -> Parts:
    """Of a plan of tokens of all ranks, ``places`` from each, and the experts here. Nothing waits for the device."""
    routing = registry.kernels(registry.choose(plan.gather_index.device).name).routing
    limits = routing.row_parts(plan.expert_offsets, plan.gather_index, Sources(rank, ranks, places))
    return Parts(*limits, sources_of(rank, ranks))
