"""What the routing kernels of the inference operator are asked for, and what they must have written."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.kernels.sm90.route_rows import (
    ITEM_ROWS,
    MAX_BLOCKS,
    ROW_GROUP,
    Choices,
    RowTables,
    max_items,
    padded_rows,
)

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


def put_special(logits: Tensor) -> None:
    """Into the first eight tokens: equal logits, and such as are no numbers."""
    experts = logits.shape[1]
    logits[0] = 0
    logits[1] = math.nan
    logits[2, ::2] = math.nan
    logits[3] = -0.0
    logits[4, 5:] = math.nan
    logits[5, 3], logits[5, 9] = math.inf, -math.inf
    logits[6] = torch.arange(experts, device=logits.device) / 64  # the best side by side, all in one lane
    logits[7] = -logits[6]


def empty_tables(tokens: int, choices: Choices, device: str = "cuda", *, streamed: bool) -> RowTables:
    """Tables full of what nobody may rely on."""

    def poison(*shape: int) -> Tensor:
        return torch.full(shape, -77, dtype=torch.int32, device=device)

    local, slots = choices.num_local, tokens * choices.per_token
    weights = torch.full((tokens, choices.per_token), math.nan, device=device)
    items = max_items(local, slots)
    return RowTables(
        offsets=None if streamed else poison(local + 1),
        items=poison(1 + items, 4),
        row_slot=poison(padded_rows(slots, local)),
        row_token=None if streamed else poison(padded_rows(slots, local)),
        row_out=None if streamed else poison(padded_rows(slots, local), 2),
        slot_row=poison(tokens, choices.per_token),
        weights=weights,
        counters=poison(1000),
        counts=poison(MAX_BLOCKS, local),
        counter_words=990,
        max_items=items,
    )


def check_rows(tables: RowTables, slots_TC: Tensor, num_local: int) -> None:
    """``slots_TC``: local expert of each slot, -1 for none."""
    slots = slots_TC.flatten().cpu().numpy()
    by_expert = np.argsort(slots, kind="stable")[(slots < 0).sum() :]
    counts = np.bincount(slots[by_expert], minlength=num_local)
    streamed = tables.offsets is None
    taken = -(-counts // ROW_GROUP) * ROW_GROUP if streamed else counts
    starts = np.cumsum(taken) - taken
    row_of = np.arange(len(by_expert)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    row_slot, slot_row = np.full(taken.sum(), -1), np.full(len(slots), -1)
    row_slot[row_of], slot_row[by_expert] = by_expert, row_of
    items = [
        [e, int(starts[e]) + at, min(ITEM_ROWS, rows - at), at // ITEM_ROWS << 16 | -(-rows // ITEM_ROWS)]
        for e, rows in enumerate(counts.tolist())
        for at in range(0, rows, ITEM_ROWS)
    ]
    assert tables.slot_row.flatten().tolist() == slot_row.tolist()
    assert tables.row_slot[: len(row_slot)].tolist() == row_slot.tolist()
    assert tables.row_slot[len(row_slot) :].eq(-77).all()
    assert tables.counters.tolist() == [0] * 990 + [-77] * 10
    if streamed:
        assert tables.items[0].tolist() == [len(items), min(ITEM_ROWS, int(counts.max())), len(row_slot), 0]
        assert tables.items[1 : 1 + len(items)].tolist() == items
        assert tables.items[1 + len(items) :].eq(-77).all()
        return
    assert tables.items.eq(-77).all()
    assert tables.offsets.tolist() == [*starts.tolist(), len(by_expert)]
    token = row_slot // slots_TC.shape[1]
    assert tables.row_token[: len(row_slot)].tolist() == token.tolist()
    alone = (slots.reshape(len(slots_TC), -1) >= 0).sum(1) == 1
    row_out, weights = tables.row_out[: len(row_slot)].cpu(), tables.weights.flatten().cpu()
    assert row_out[:, 0].tolist() == np.where(alone[token], token, -1).tolist()
    weight = torch.where(row_out[:, 0] < 0, torch.ones(()), weights[torch.from_numpy(row_slot)])
    assert torch.equal(row_out[:, 1].contiguous().view(torch.float32), weight)


def local_experts(tables: RowTables, num_local: int) -> Tensor:
    """Local expert of each slot, read back from its row."""
    row = tables.slot_row.long()
    if tables.offsets is None:
        items = int(tables.items[0, 0])
        starts, experts = tables.items[1 : 1 + items, 1].long().contiguous(), tables.items[1 : 1 + items, 0]
        if items == 0:
            return torch.full_like(tables.slot_row, -1)
        return torch.where(row >= 0, experts[torch.searchsorted(starts, row, right=True) - 1], -1).int()
    return torch.where(row >= 0, torch.searchsorted(tables.offsets[1:].long().contiguous(), row, right=True), -1).int()
