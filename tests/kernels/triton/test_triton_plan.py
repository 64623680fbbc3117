"""The Triton plan builder against a counting sort spelled out in Python; all comparisons are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels.interface import Slots
from supersonic_moe.kernels.triton import build_plan, plan


def oracle(
    ids: list[int], tokens: list[int], num_tokens: int, num_experts: int, tile: int, capacity: int
) -> dict[str, list[int]]:
    slots_of = [
        [s for s, (e, t) in enumerate(zip(ids, tokens, strict=True)) if e == expert and 0 <= t < num_tokens]
        for expert in range(num_experts)
    ]
    offsets, rows, owners = [0], [], []
    for expert, slots in enumerate(slots_of):
        padding = -len(slots) % tile
        rows += slots + [-1] * padding
        owners += [expert] * (len(slots) + padding)
        offsets.append(min(len(rows), capacity))
    rows = (rows + [-1] * capacity)[:capacity]
    reverse = [-1] * len(ids)
    for row, slot in enumerate(rows):
        if slot >= 0:
            reverse[slot] = row
    return {
        "expert_offsets": offsets,
        "gather_index": [tokens[slot] if slot >= 0 else -1 for slot in rows],
        "scatter_index": rows,
        "row_expert": (owners + [num_experts] * capacity)[:capacity],
        "reverse_index": reverse,
        "counts": [sum(s >= 0 and o == e for s, o in zip(rows, owners, strict=False)) for e in range(num_experts)],
    }


def check(device: torch.device, slots: Slots) -> None:
    """By one launch and by three, whichever takes so many slots."""
    for alone in (-1, 2**12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "ALONE", alone)
            check_one_way(device, slots)


def check_one_way(device: torch.device, slots: Slots) -> None:
    ids, tokens, k, *sizes = slots
    on_device = slots._replace(ids=ids.to(device), tokens=None if tokens is None else tokens.to(device))
    got = build_plan(on_device)
    token_list = [s // max(k, 1) for s in range(len(ids))] if tokens is None else tokens.tolist()
    want = oracle(ids.tolist(), token_list, *sizes)
    for name, tensor in got._asdict().items():
        assert tensor.dtype is torch.int32
        assert tensor.tolist() == want[name], name
    for first, again in zip(got, build_plan(on_device), strict=True):
        assert torch.equal(first, again)


@settings(max_examples=30)
@given(data=st.data())
def test_matches_a_counting_sort(data: st.DataObject, device: torch.device) -> None:
    num_experts = data.draw(st.integers(1, 40), "E")
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), "dtype")
    garbage = [-1, num_experts, -(2**31), 2**31 - 1] + ([2**32, -(2**40)] if dtype is torch.int64 else [])
    expert_ids = st.one_of(st.integers(0, num_experts - 1), st.sampled_from(garbage))
    tile = data.draw(st.sampled_from([1, 1, 2, 5, 16]), "tile")
    if data.draw(st.booleans(), "triples"):
        k, num_tokens = 0, data.draw(st.integers(0, 9), "T")
        pairs = data.draw(st.lists(st.tuples(expert_ids, st.integers(-2, num_tokens + 1)), max_size=300), "pairs")
        ids = torch.tensor([e for e, _ in pairs], dtype=dtype)
        tokens = torch.tensor([t for _, t in pairs], dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    else:
        k, num_tokens = data.draw(st.integers(1, 5), "K"), data.draw(st.integers(0, 60), "T")
        ids = torch.tensor(
            data.draw(st.lists(expert_ids, min_size=k * num_tokens, max_size=k * num_tokens)), dtype=dtype
        )
        tokens = None
    full = len(ids) + num_experts * (tile - 1)
    capacity = data.draw(st.sampled_from([full, full, full // 2, len(ids) // 3]), "capacity")
    check(device, Slots(ids, tokens, k, num_tokens, num_experts, tile, capacity))


@pytest.mark.parametrize(
    ("num_tokens", "k", "num_experts", "tile", "hot"),
    [
        (0, 4, 8, 128, False),  # nothing to place, every output still written
        (1, 1, 1, 1, False),
        (300, 2, 7, 1, True),  # one expert owns every row
        (77, 8, 128, 32, False),
        (19, 6, 1000, 1, False),  # mostly empty experts, more bins than slots
    ],
)
def test_shapes(num_tokens: int, k: int, num_experts: int, tile: int, hot: bool, device: torch.device) -> None:
    ids = torch.full((num_tokens * k,), num_experts - 1) if hot else torch.randint(num_experts, (num_tokens * k,))
    check(device, Slots(ids, None, k, num_tokens, num_experts, tile, len(ids) + num_experts * (tile - 1)))


def test_chunks_of_several_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large S makes a program walk several blocks and the scan several steps; smaller bounds do so at a small S."""
    monkeypatch.setattr(plan, "MIN_CHUNKS", 3)
    monkeypatch.setattr(plan, "MAX_COUNTS", 3 * 32)
    monkeypatch.setattr(plan, "SCAN_C", 2)
    ids = torch.randint(-1, 12, (1700,), dtype=torch.int32)  # 14 blocks: 3 chunks of 5, the last one short
    check(device, Slots(ids, None, 4, 425, 11, 4, 1700 + 11 * 3))


def test_rejects_more_rows_than_an_int32_holds(device: torch.device) -> None:
    with pytest.raises(ValueError, match="2\\^31 rows"):
        build_plan(Slots(torch.zeros(8, dtype=torch.int32, device=device), None, 2, 4, 4096, 2**20, 8))
