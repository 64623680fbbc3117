"""Row blocks in parts: each block once, no row before its source has come, none sent home incomplete."""

from __future__ import annotations

import pytest
import torch

from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import RANGE_ROWS, Sources
from supersonic_moe.parallel.ranges import Parts, sources_of
from supersonic_moe.routing.plan import plan_from_topk

EXPERTS = 3


def blocks_of(parts: Parts, at: int, expert: int) -> set[int]:
    assert parts.begin_PE.dtype is parts.end_PE.dtype is torch.int32
    return set(range(int(parts.begin_PE[at, expert]), int(parts.end_PE[at, expert])))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(("places", "share"), [(1, 1.0), (100, 0.5), (2 * RANGE_ROWS, 1.0), (700, 0.7), (700, 0.0)])
def test_each_block_is_in_one_part_which_has_its_rows(
    ranks: int, places: int, share: float, backend: str, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(places + ranks)
    ids = torch.rand(ranks * places, EXPERTS, generator=g).argsort(1)[:, :2]
    ids = torch.where(torch.rand(ids.shape, generator=g) < share, ids, torch.tensor([-1, EXPERTS])).to(torch.int32)
    plan = plan_from_topk(ids.to(device), EXPERTS)
    offsets, gather_index = plan.expert_offsets.tolist(), plan.gather_index.cpu()
    routing = registry.kernels(backend).routing
    for rank in range(ranks):
        limits = routing.row_parts(plan.expert_offsets, plan.gather_index, Sources(rank, ranks, places))
        parts = Parts(*(t.cpu() for t in limits), sources_of(rank, ranks))
        assert len(parts.begin_PE) == len(parts.sources) and parts.sources[0] == range(rank, rank + 1)
        assert sorted(r for sources in parts.sources for r in sources) == list(range(ranks)) and all(parts.sources)
        for expert in range(EXPERTS):
            source = gather_index[offsets[expert] : offsets[expert + 1]] // places
            rows = {
                b: set(source[b * RANGE_ROWS :][:RANGE_ROWS].tolist()) for b in range(-(-len(source) // RANGE_ROWS))
            }
            blocks = [blocks_of(parts, at, expert) for at in range(len(parts.sources))]
            assert sorted(b for part in blocks for b in part) == list(rows), "each block once"
            assert all(rows[b] == {rank} for b in blocks[0]), "own rows alone, which are there at once"
            for at, part in enumerate(blocks):
                there = {r for sources in parts.sources[: at + 1] for r in sources}
                assert all(rows[b] <= there for b in part), "no row before its source has come"
                complete = set().union(*blocks[at:])
                assert all(b in complete for b in rows if rows[b] & set(parts.sources[at])), "sent home complete"
            whole = sum(sources == {rank} for sources in rows.values())
            assert len(blocks[0]) == whole, "nothing waits that need not"
