"""Row blocks in three parts: each block once, no row before its source has come, none sent home incomplete."""

from __future__ import annotations

import pytest
import torch

from supersonic_moe.kernels.interface import RANGE_ROWS
from supersonic_moe.parallel.ranges import Part, parts_of
from supersonic_moe.routing.plan import plan_from_topk

EXPERTS = 3


def blocks_of(part: Part, expert: int) -> set[int]:
    assert part.begin_E.dtype is part.end_E.dtype is torch.int32
    return set(range(int(part.begin_E[expert]), int(part.end_E[expert])))


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(("places", "share"), [(1, 1.0), (100, 0.5), (2 * RANGE_ROWS, 1.0), (700, 0.7), (700, 0.0)])
def test_each_block_is_in_one_part_which_has_its_rows(ranks: int, places: int, share: float) -> None:
    g = torch.Generator().manual_seed(places + ranks)
    ids = torch.rand(ranks * places, EXPERTS, generator=g).argsort(1)[:, :2]
    ids = torch.where(torch.rand(ids.shape, generator=g) < share, ids, torch.tensor([-1, EXPERTS])).to(torch.int32)
    plan = plan_from_topk(ids, EXPERTS)
    offsets = plan.expert_offsets.tolist()
    for rank in range(ranks):
        before, own, after = parts_of(ids, EXPERTS, rank, ranks)
        assert [*before.sources, *own.sources, *after.sources] == list(range(ranks)) and own.sources == range(
            rank, rank + 1
        )
        for expert in range(EXPERTS):
            source = plan.gather_index[offsets[expert] : offsets[expert + 1]] // places
            rows = {
                b: set(source[b * RANGE_ROWS :][:RANGE_ROWS].tolist()) for b in range(-(-len(source) // RANGE_ROWS))
            }
            first, mine, last = (blocks_of(part, expert) for part in (before, own, after))
            assert sorted([*first, *mine, *last]) == list(rows), "each block once"
            assert all(rows[b] == {rank} for b in mine), "own rows alone, which are there at once"
            assert all(min(rows[b]) >= rank for b in last), "those before this rank come last"
            for block, sources in rows.items():
                assert block in first or min(sources) >= rank, "complete when the first part is done"
                assert block in first | last or max(sources) <= rank, "complete when the second part is done"
            whole = sum(sources == {rank} for sources in rows.values())
            assert len(mine) == whole, "nothing waits that need not"
