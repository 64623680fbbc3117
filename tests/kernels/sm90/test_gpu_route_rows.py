"""The routing kernels of the inference operator on a GPU: choices, weights and sorted rows against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from supersonic_moe.config.grouped_routing import GroupedRouting
from supersonic_moe.kernels.reference import local_ids, route_grouped

pytest.importorskip("cuda.bindings.nvrtc")

from routed_rows import RULES, check_rows, empty_tables, local_experts, put_special

from supersonic_moe.jit.launch import Launch
from supersonic_moe.kernels.sm90.route_rows import Choices, place_topk, route_rows

pytestmark = pytest.mark.gpu

SIZES = [0, 1, 2, 7, 8, 9, 31, 64, 127, 128, 129, 130, 900, 4097, 14107, 70001]


def run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_from_logits(name: str, streamed: bool, tokens: int) -> None:
    rule = RULES[name]
    logits = torch.randn(tokens, rule.num_experts, device="cuda")
    bias = (torch.randn(rule.num_experts, device="cuda") * 0.1).to(
        torch.bfloat16 if name == "deepseek_v3" else torch.float32
    )
    routed = max(1, rule.num_experts // 8)
    choices = Choices(rule.num_experts, routed, routed // 2, rule.top_k, shared=name == "kimi_k2")
    tables = empty_tables(tokens, choices, streamed=streamed)
    run(route_rows(logits, bias, rule, choices, tables))
    if tokens == 0:
        assert tables.items[0].tolist() == [0] * 4 if streamed else tables.offsets.eq(0).all()
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
    written = [t for t in tables[:9] if t is not None]
    first = [t.clone() for t in written]
    run(route_rows(logits, bias, rule, choices, tables))
    assert all(torch.equal(a, b) for a, b in zip(first, written, strict=True))


@pytest.mark.parametrize("tokens", [16, 300])
def test_ties_and_nan(tokens: int) -> None:
    rule = GroupedRouting(num_experts=256)
    choices = Choices(256, 256, 0, 8, shared=False)
    logits = torch.randint(-2, 3, (tokens, 256), device="cuda").float()  # mostly ties
    put_special(logits)
    logits[8] = torch.arange(256, device="cuda") % 32 / 16  # the same in every group
    tables = empty_tables(tokens, choices, streamed=True)
    run(route_rows(logits, None, rule, choices, tables))
    weights, ids = route_grouped(logits, None, rule)
    assert torch.equal(local_experts(tables, 256), ids)
    torch.testing.assert_close(tables.weights, weights, equal_nan=True)
    check_rows(tables, ids, 256)


@pytest.mark.parametrize("tokens", SIZES[1:])
@pytest.mark.parametrize(("wide", "streamed"), [(False, True), (False, False), (True, True), (True, False)])
def test_from_ids(wide: bool, streamed: bool, tokens: int) -> None:
    choices = Choices(num_experts=300, routed=40, offset=0, top_k=9, shared=True)
    ids = torch.randint(-1, 301, (tokens, 9), device="cuda", dtype=torch.int64 if wide else torch.int32)
    weights = torch.rand(tokens, 9, device="cuda")
    placed = torch.full((300,), -1, dtype=torch.int32, device="cuda")
    placed[torch.randperm(300, device="cuda")[:40]] = torch.randperm(40, device="cuda").int()
    tables = empty_tables(tokens, choices, streamed=streamed)
    run(place_topk(ids, weights, placed, 2.5, choices, tables))
    slots_TC = ids.new_full((tokens, 10), 40)
    slots_TC[:, :9] = local_ids(ids, 40, expert_map=placed)
    check_rows(tables, slots_TC, 41)
    assert torch.equal(tables.weights[:, :9], weights * 2.5) and tables.weights[:, 9].eq(1).all()
    for offset in (-3, 30, 250, 299, 1000):
        moved = choices._replace(offset=offset)
        run(place_topk(ids, None, None, 1.0, moved, tables))
        slots_TC[:, :9] = local_ids(ids, 40, offset, 300)
        for t in (tables.row_slot, tables.items) if streamed else (tables.row_slot, tables.row_token):
            t.fill_(-77)
        run(place_topk(ids, None, None, 1.0, moved, tables))
        check_rows(tables, slots_TC, 41)
        assert tables.weights.eq(1).all()


def test_all_at_one_expert_and_none() -> None:
    choices = Choices(num_experts=64, routed=8, offset=8, top_k=2, shared=False)
    for tokens in (100, 5000):
        for expert, streamed in itertools.product((8, 15, 16), (True, False)):
            ids = torch.full((tokens, 2), expert, dtype=torch.int32, device="cuda")
            tables = empty_tables(tokens, choices, streamed=streamed)
            run(place_topk(ids, None, None, 1.0, choices, tables))
            check_rows(tables, local_ids(ids, 8, 8), 8)


def test_in_a_graph_with_new_contents() -> None:
    rule = RULES["deepseek_v3"]
    choices = Choices(256, 32, 96, 8, shared=False)
    logits = torch.randn(80, 256, device="cuda")
    tables = empty_tables(80, choices, streamed=True)
    run(route_rows(logits, None, rule, choices, tables))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(route_rows(logits, None, rule, choices, tables))
    for _ in range(3):
        logits.normal_()
        for t in (tables.items, tables.row_slot, tables.slot_row, tables.counters):
            t.fill_(-77)
        graph.replay()
        _, ids = route_grouped(logits, None, rule)
        check_rows(tables, local_experts(tables, 32), 32)
        same = local_experts(tables, 32) == local_ids(ids, 32, 96, 256)
        assert same.float().mean() > 0.98
