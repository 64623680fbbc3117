"""RoutingPlan: the invariants that every kernel relies on, for arbitrary ids, against a naive construction."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import supersonic_moe as sm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def naive_rows(experts, tokens, num_tokens, num_experts, tile):
    """[(slot, token, expert) or ('pad', expert)] in row order, and the offsets."""
    rows, offsets = [], [0]
    for e in range(num_experts):
        mine = [
            (s, t, e) for s, (t, x) in enumerate(zip(tokens, experts, strict=True)) if x == e and 0 <= t < num_tokens
        ]
        rows += mine
        rows += [("pad", e)] * (-len(mine) % tile)
        offsets.append(len(rows))
    return rows, offsets


def assert_plan(plan, experts, tokens, num_tokens, num_experts, tile):
    rows, offsets = naive_rows(experts, tokens, num_tokens, num_experts, tile)
    assert plan.expert_offsets.tolist() == offsets
    assert plan.capacity == len(plan.gather_index) >= len(rows)
    real = {r: row for r, row in enumerate(rows) if row[0] != "pad"}
    dead = plan.capacity - len(rows)
    assert plan.scatter_index.tolist() == [real[r][0] if r in real else -1 for r in range(len(rows))] + [-1] * dead
    assert plan.gather_index.tolist() == [real[r][1] if r in real else -1 for r in range(len(rows))] + [-1] * dead
    assert plan.row_expert.tolist() == [row[-1] for row in rows] + [num_experts] * dead
    slot_row = {row[0]: r for r, row in real.items()}
    assert plan.reverse_index.tolist() == [slot_row.get(s, -1) for s in range(len(experts))]
    assert plan.expert_counts.tolist() == [sum(row[2] == e for row in real.values()) for e in range(num_experts)]
    assert all(
        t.dtype == torch.int32
        for t in (plan.expert_offsets, plan.gather_index, plan.scatter_index, plan.row_expert, plan.token_rows)
    )
    if plan.token_offsets is None:
        starts = [t * plan.slots_per_token for t in range(num_tokens + 1)]
    else:
        starts = plan.token_offsets.tolist()
    summed = [[r for r in plan.token_rows.tolist()[a:b] if r >= 0] for a, b in itertools.pairwise(starts)]
    wanted = [[slot_row[s] for s, x in enumerate(tokens) if x == t and s in slot_row] for t in range(num_tokens)]
    return summed, wanted


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tile=st.sampled_from([1, 2, 5, 128]), num_experts=st.integers(1, 9), int64=st.booleans())
def test_topk_plan(data, tile, num_experts, int64):
    num_tokens, k = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 4))
    ids = data.draw(st.lists(st.integers(-2, num_experts + 1), min_size=num_tokens * k, max_size=num_tokens * k))
    table = torch.tensor(ids, dtype=torch.int64 if int64 else torch.int32, device=DEVICE).view(num_tokens, k)
    plan = sm.plan_from_topk(table, num_experts, tile=tile)
    tokens = [s // k for s in range(num_tokens * k)]
    summed, wanted = assert_plan(plan, ids, tokens, num_tokens, num_experts, tile)
    assert summed == wanted


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tile=st.sampled_from([1, 3, 128]), num_tokens=st.integers(0, 9), num_experts=st.integers(1, 6))
def test_triples_plan_takes_any_order_and_skips_bad_indices(data, tile, num_tokens, num_experts):
    pairs = data.draw(st.lists(st.tuples(st.integers(-1, num_tokens), st.integers(-1, num_experts)), max_size=30))
    tokens, experts = [t for t, _ in pairs], [e for _, e in pairs]
    plan = sm.plan_from_triples(
        torch.tensor(tokens, dtype=torch.int32, device=DEVICE),
        torch.tensor(experts, dtype=torch.int32, device=DEVICE),
        num_tokens,
        num_experts,
        tile=tile,
    )
    summed, wanted = assert_plan(plan, experts, tokens, num_tokens, num_experts, tile)
    assert summed == wanted


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tile=st.sampled_from([1, 4, 128]), on_host=st.booleans())
def test_deepep_plan(data, tile, on_host):
    num_experts, num_tokens = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 10))
    k = data.draw(st.integers(1, num_experts))
    table = [data.draw(st.permutations(range(num_experts)))[:k] for _ in range(num_tokens)]
    table = [[e if data.draw(st.booleans()) else -1 for e in row] for row in table]
    experts = [e for row in table for e in row]
    counts = [experts.count(e) for e in range(num_experts)]
    ids = torch.tensor(experts, dtype=torch.int32, device=DEVICE).view(num_tokens, k)
    probs = torch.rand(num_tokens, k, device=DEVICE, requires_grad=True)
    plan, scores = sm.plan_from_deepep(
        ids, probs, counts if on_host else torch.tensor(counts), tile=tile, validate=True
    )
    tokens = [s // k for s in range(num_tokens * k)]
    summed, wanted = assert_plan(plan, experts, tokens, num_tokens, num_experts, tile)
    assert summed == [sorted(rows) for rows in wanted]  # ascending expert id
    assert plan.capacity == plan.expert_offsets[-1]
    assert scores.requires_grad
    assert scores.shape == (num_tokens * k,)


def test_deepep_host_counts_that_are_too_small_drop_rows_safely():
    ids = torch.tensor([[0], [1], [1], [2]], device=DEVICE)
    plan, _ = sm.plan_from_deepep(ids, torch.ones(4, 1, device=DEVICE), [1, 1, 0])
    assert plan.expert_offsets.tolist() == [0, 1, 2, 2]
    assert plan.reverse_index.tolist() == [0, 1, -1, -1]
    with pytest.raises(ValueError, match="must not be less than the number of ids of each expert; got 1 at index 1"):
        sm.plan_from_deepep(ids, torch.ones(4, 1, device=DEVICE), [1, 1, 0], validate=True)


@pytest.mark.parametrize("num_tokens", [4, 200])
@pytest.mark.parametrize("tile", [1, 128])
def test_deepep_counts_may_be_rounded_up_to_its_expert_alignment(num_tokens, tile):
    """DeepEP's ``expert_alignment`` rounds counts up: 3 experts of 128 rows for a batch of 8 pairs. Same rows as with
    the exact counts.
    """
    ids = torch.stack([torch.randperm(3, device=DEVICE)[:2] for _ in range(num_tokens)])
    probs = torch.rand(num_tokens, 2, device=DEVICE)
    exact = torch.bincount(ids.flatten(), minlength=3).tolist()
    aligned = [-(-n // 128) * 128 for n in exact]
    want, _ = sm.plan_from_deepep(ids, probs, exact, tile=tile)
    for counts in (aligned, torch.tensor(aligned), tuple(aligned)):
        plan, _ = sm.plan_from_deepep(ids, probs, counts, tile=tile, validate=True)
        live = want.capacity
        assert torch.equal(plan.expert_offsets, want.expert_offsets)
        assert torch.equal(plan.gather_index[:live], want.gather_index)
        assert plan.gather_index[live:].eq(-1).all()
        assert torch.equal(plan.token_rows, want.token_rows)


@settings(max_examples=40, deadline=None)
@given(ends=st.lists(st.integers(-3, 30), min_size=1, max_size=7), num_rows=st.integers(0, 20))
def test_offsets_plan_is_memory_safe_for_any_offsets(ends, num_rows):
    plan = sm.plan_from_offsets(torch.tensor(ends, dtype=torch.int32, device=DEVICE), num_rows)
    offsets = plan.expert_offsets.tolist()
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= num_rows
    rows = [r if r < offsets[-1] else -1 for r in range(num_rows)]
    assert plan.gather_index.tolist() == plan.token_rows.tolist() == rows
    owner = [next((e for e in range(len(ends)) if r < offsets[e + 1]), len(ends)) for r in range(num_rows)]
    assert plan.row_expert.tolist() == owner


def test_capacity_is_the_stated_bound():
    plan = sm.plan_from_topk(torch.zeros(10, 2, dtype=torch.int32, device=DEVICE), 4, tile=8)
    assert plan.capacity == 20 + 4 * 7
    plan = sm.plan_from_topk(
        torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), 64, tile=8
    )  # two slots touch at most two experts
    assert plan.capacity == 2 + 2 * 7
