"""The routing kernels of the inference operator on a GPU: choices, weights and sorted rows against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.kernels.reference import local_ids, route_grouped

pytest.importorskip("cuda.bindings.nvrtc")

from supersonic_moe.jit.launch import Launch
from supersonic_moe.kernels.sm90.route_rows import (
    ITEM_ROWS,
    MAX_BLOCKS,
    ROW_GROUP,
    Choices,
    RowTables,
    max_items,
    padded_rows,
    place_topk,
    route_rows,
)

pytestmark = pytest.mark.gpu

SIZES = [0, 1, 2, 7, 8, 9, 31, 64, 127, 128, 129, 130, 900, 4097, 14107, 70001]
RULES = {
    "deepseek_v3": GroupedRouting(num_experts=256, scaling_factor=2.5),
    "kimi_k2": GroupedRouting(num_experts=384, n_group=1, topk_group=1, scaling_factor=2.827),
    "qwen3_next": GroupedRouting(num_experts=512, top_k=10, n_group=1, topk_group=1, scoring=Scoring.SOFTMAX),
    "deepseek_v4": GroupedRouting(
        num_experts=256, top_k=6, n_group=1, topk_group=1, scoring=Scoring.SQRT_SOFTPLUS, scaling_factor=1.5
    ),
    "small": GroupedRouting(num_experts=21, top_k=5, n_group=3, topk_group=2),
    "one_a_group": GroupedRouting(num_experts=16, top_k=3, n_group=16, topk_group=5),
    "widest": GroupedRouting(num_experts=1024, top_k=16, n_group=2, topk_group=1),
}


def empty_tables(tokens: int, choices: Choices) -> RowTables:
    """Tables full of what nobody may rely on."""

    def poison(*shape: int) -> Tensor:
        return torch.full(shape, -77, dtype=torch.int32, device="cuda")

    local, slots = choices.num_local, tokens * choices.per_token
    weights = torch.full((tokens, choices.per_token), math.nan, device="cuda")
    items = max_items(local, slots)
    return RowTables(
        offsets=poison(local + 1),
        items=poison(1 + items, 4),
        row_slot=poison(padded_rows(slots, local)),
        row_token=poison(padded_rows(slots, local)),
        row_out=poison(padded_rows(slots, local), 2),
        slot_row=poison(tokens, choices.per_token),
        weights=weights,
        counters=poison(1000),
        counts=poison(MAX_BLOCKS, local),
        counter_words=990,
        max_items=items,
        stream_rows=slots // 2,
    )


def run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def check_rows(tables: RowTables, slots_TC: Tensor, num_local: int) -> None:
    """``slots_TC``: local expert of each slot, -1 for none."""
    slots = slots_TC.flatten().cpu().numpy()
    by_expert = np.argsort(slots, kind="stable")[(slots < 0).sum() :]
    counts = np.bincount(slots[by_expert], minlength=num_local)
    streamed = len(by_expert) <= tables.stream_rows
    taken = -(-counts // ROW_GROUP) * ROW_GROUP if streamed else counts
    starts = np.cumsum(taken) - taken
    row_of = np.arange(len(by_expert)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    row_slot, slot_row = np.full(taken.sum(), -1), np.full(len(slots), -1)
    row_slot[row_of], slot_row[by_expert] = by_expert, row_of
    offsets = [0] * (num_local + 1) if streamed else [*starts.tolist(), len(by_expert)]
    items = [
        [e, int(starts[e]) + at, min(ITEM_ROWS, rows - at), at // ITEM_ROWS << 16 | -(-rows // ITEM_ROWS)]
        for e, rows in enumerate(counts.tolist())
        for at in range(0, rows if streamed else 0, ITEM_ROWS)
    ]
    assert tables.offsets.tolist() == offsets
    assert tables.slot_row.flatten().tolist() == slot_row.tolist()
    assert tables.row_slot[: len(row_slot)].tolist() == row_slot.tolist()
    assert tables.row_slot[len(row_slot) :].eq(-77).all()
    token = np.where(row_slot >= 0, row_slot // slots_TC.shape[1], -77)
    assert tables.row_token[: len(row_slot)].tolist() == token.tolist()
    alone = (slots.reshape(len(slots_TC), -1) >= 0).sum(1) == 1
    used, weights = row_slot >= 0, tables.weights.flatten().cpu()
    row_out = tables.row_out[: len(row_slot)].cpu()[torch.from_numpy(used)]
    assert row_out[:, 0].tolist() == np.where(alone[token[used]], token[used], -1).tolist()
    weight = torch.where(row_out[:, 0] < 0, torch.ones(()), weights[torch.from_numpy(row_slot[used])])
    assert torch.equal(row_out[:, 1].contiguous().view(torch.float32), weight)
    padded = int((-(-counts // ROW_GROUP) * ROW_GROUP).sum())
    assert tables.items[0].tolist() == [len(items), min(ITEM_ROWS, int(counts.max())), padded, int(streamed)]
    assert tables.items[1 : 1 + len(items)].tolist() == items
    assert tables.items[1 + len(items) :].eq(-77).all()
    assert tables.counters.tolist() == [0] * 990 + [-77] * 10


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("name", RULES)
def test_from_logits(name: str, tokens: int) -> None:
    rule = RULES[name]
    logits = torch.randn(tokens, rule.num_experts, device="cuda")
    bias = (torch.randn(rule.num_experts, device="cuda") * 0.1).to(
        torch.bfloat16 if name == "deepseek_v3" else torch.float32
    )
    routed = max(1, rule.num_experts // 8)
    choices = Choices(rule.num_experts, routed, routed // 2, rule.top_k, shared=name == "kimi_k2")
    tables = empty_tables(tokens, choices)
    run(route_rows(logits, bias, rule, choices, tables))
    if tokens == 0:
        assert tables.offsets.eq(0).all() and tables.items[0].tolist() == [0, 0, 0, 1]
        return

    weights, ids = route_grouped(logits, bias, rule)
    _, exact = route_grouped(logits.double(), bias.double(), rule)
    slots_TC = tables.slot_row.new_full((tokens, choices.per_token), choices.routed)
    slots_TC[:, : rule.top_k] = local_ids(ids, routed, choices.offset, rule.num_experts)
    clear = (ids == exact).all(1)  # no near tie, which one ulp of a score may turn round
    assert clear.float().mean() > 0.98
    got_local = local_experts(tables, choices.num_local)
    assert torch.equal(got_local[clear], slots_TC[clear])
    torch.testing.assert_close(tables.weights[clear][:, : rule.top_k], weights[clear], rtol=1e-5, atol=1e-9)
    assert tables.weights[:, rule.top_k :].eq(1).all()
    check_rows(tables, got_local, choices.num_local)
    first = [t.clone() for t in tables[:9]]
    run(route_rows(logits, bias, rule, choices, tables))
    assert all(torch.equal(a, b) for a, b in zip(first, tables[:9], strict=True))


def local_experts(tables: RowTables, num_local: int) -> Tensor:
    """Local expert of each slot, read back from its row."""
    row, (items, _, _, streamed) = tables.slot_row.long(), tables.items[0].tolist()
    if streamed:
        starts, experts = tables.items[1 : 1 + items, 1].long().contiguous(), tables.items[1 : 1 + items, 0]
        if items == 0:
            return torch.full_like(tables.slot_row, -1)
        return torch.where(row >= 0, experts[torch.searchsorted(starts, row, right=True) - 1], -1).int()
    return torch.where(row >= 0, torch.searchsorted(tables.offsets[1:].long().contiguous(), row, right=True), -1).int()


@pytest.mark.parametrize("tokens", [16, 300])
def test_ties_and_nan(tokens: int) -> None:
    rule = GroupedRouting(num_experts=256)
    choices = Choices(256, 256, 0, 8, shared=False)
    logits = torch.randint(-2, 3, (tokens, 256), device="cuda").float()  # mostly ties
    logits[0] = 0
    logits[1] = math.nan
    logits[2, ::2] = math.nan
    logits[3] = -0.0
    logits[4, 5:] = math.nan
    logits[5, 3], logits[5, 9] = math.inf, -math.inf
    logits[6] = torch.arange(256, device="cuda") / 64  # the best side by side, all in one lane
    logits[7] = -logits[6]
    logits[8] = torch.arange(256, device="cuda") % 32 / 16  # the same in every group
    tables = empty_tables(tokens, choices)
    run(route_rows(logits, None, rule, choices, tables))
    weights, ids = route_grouped(logits, None, rule)
    assert torch.equal(local_experts(tables, 256), ids)
    torch.testing.assert_close(tables.weights, weights, equal_nan=True)
    check_rows(tables, ids, 256)


@pytest.mark.parametrize("tokens", SIZES[1:])
@pytest.mark.parametrize("wide", [False, True])
def test_from_ids(wide: bool, tokens: int) -> None:
    choices = Choices(num_experts=300, routed=40, offset=0, top_k=9, shared=True)
    ids = torch.randint(-1, 301, (tokens, 9), device="cuda", dtype=torch.int64 if wide else torch.int32)
    weights = torch.rand(tokens, 9, device="cuda")
    placed = torch.full((300,), -1, dtype=torch.int32, device="cuda")
    placed[torch.randperm(300, device="cuda")[:40]] = torch.randperm(40, device="cuda").int()
    tables = empty_tables(tokens, choices)
    run(place_topk(ids, weights, placed, 2.5, choices, tables))
    slots_TC = ids.new_full((tokens, 10), 40)
    slots_TC[:, :9] = local_ids(ids, 40, expert_map=placed)
    check_rows(tables, slots_TC, 41)
    assert torch.equal(tables.weights[:, :9], weights * 2.5) and tables.weights[:, 9].eq(1).all()
    for offset in (-3, 30, 250, 299, 1000):
        moved = choices._replace(offset=offset)
        run(place_topk(ids, None, None, 1.0, moved, tables))
        slots_TC[:, :9] = local_ids(ids, 40, offset, 300)
        for t in (tables.row_slot, tables.row_token, tables.items):
            t.fill_(-77)
        run(place_topk(ids, None, None, 1.0, moved, tables))
        check_rows(tables, slots_TC, 41)
        assert tables.weights.eq(1).all()


def test_all_at_one_expert_and_none() -> None:
    choices = Choices(num_experts=64, routed=8, offset=8, top_k=2, shared=False)
    for tokens in (100, 5000):
        for expert in (8, 15, 16):
            ids = torch.full((tokens, 2), expert, dtype=torch.int32, device="cuda")
            tables = empty_tables(tokens, choices)
            run(place_topk(ids, None, None, 1.0, choices, tables))
            check_rows(tables, local_ids(ids, 8, 8), 8)


def test_in_a_graph_with_new_contents() -> None:
    rule = RULES["deepseek_v3"]
    choices = Choices(256, 32, 96, 8, shared=False)
    logits = torch.randn(80, 256, device="cuda")
    tables = empty_tables(80, choices)
    run(route_rows(logits, None, rule, choices, tables))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(route_rows(logits, None, rule, choices, tables))
    for _ in range(3):
        logits.normal_()
        for t in (*tables[:6], tables.counters):
            t.fill_(-77)
        graph.replay()
        _, ids = route_grouped(logits, None, rule)
        check_rows(tables, local_experts(tables, 32), 32)
        same = local_experts(tables, 32) == local_ids(ids, 32, 96, 256)
        assert same.float().mean() > 0.98
