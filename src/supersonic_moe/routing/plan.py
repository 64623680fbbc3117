"""Builders of a :class:`RoutingPlan` (``config/plan.py``): a stable counting sort on the device, no host sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import PlanTensors, Slots
from supersonic_moe.ops import caller

MAX_INDEX = 2**31 - 1


def plan_from_topk(
    topk_ids_TK: Tensor, num_experts: int, *, tile: int = 1, capacity: int | None = None, validate: bool = False
) -> RoutingPlan:
    """Plan of a (T, K) table of expert ids (int32 or int64). Ids outside [0, E) are skipped.

    ``capacity``: rows to allocate, padding included, for a caller who knows how many there will be; further ones are
    skipped. Default: as many as there may be, T·K and padding.

    ``validate=True`` costs a sync and raises on out-of-range ids (-1 and E, the usual sentinels, excepted) and on ids
    repeated in a token.
    """
    checks.ids("topk_ids", topk_ids_TK, 2)
    _check_sizes(num_experts, tile)
    num_tokens, k = topk_ids_TK.shape
    if validate:
        checks.valid_topk_ids(topk_ids_TK, num_experts)
    ids_S = topk_ids_TK.reshape(-1)
    most = _capacity(ids_S.shape[0], num_experts, tile)
    if capacity is None:
        capacity = most
    else:
        checks.non_negative("capacity", capacity)
        checks.index_count("capacity", capacity)
    slots = Slots(ids_S, None, k, num_tokens, num_experts, tile, capacity)
    tensors = build(slots)
    return _plan(slots, tensors, tensors.reverse_index)


def plan_from_triples(
    token_indices_S: Tensor,
    expert_indices_S: Tensor,
    num_tokens: int,
    num_experts: int,
    *,
    tile: int = 1,
    validate: bool = False,
) -> RoutingPlan:
    """Plan of (token, expert) pairs in any order; a token may have any number of experts. Pairs with an id out of range
    are skipped.

    A token's rows are summed in the order in which its pairs come. ``validate=True`` costs a sync and raises on token
    ids outside [0, T), on expert ids outside [-1, E] and on repeated pairs.
    """
    checks.ids("token_indices", token_indices_S, 1)
    checks.ids("expert_indices", expert_indices_S, 1)
    checks.same_length("token_indices", token_indices_S, "expert_indices", expert_indices_S)
    checks.same_device("token_indices", token_indices_S, "expert_indices", expert_indices_S)
    checks.non_negative("num_tokens", num_tokens)
    checks.index_count("tokens", num_tokens)
    _check_sizes(num_experts, tile)
    if validate:
        checks.valid_triples(token_indices_S, expert_indices_S, num_tokens, num_experts)
    capacity = _capacity(token_indices_S.shape[0], num_experts, tile)
    slots = Slots(expert_indices_S, token_indices_S, 0, num_tokens, num_experts, tile, capacity)
    tensors = build(slots)
    sorted_tokens, order = torch.sort(token_indices_S, stable=True)
    bounds = torch.arange(num_tokens + 1, device=order.device, dtype=sorted_tokens.dtype)
    token_offsets = torch.searchsorted(sorted_tokens, bounds, out_int32=True)
    return _plan(slots, tensors, tensors.reverse_index.index_select(0, order), token_offsets)


def plan_from_sorted_triples(
    token_indices_S: Tensor, expert_indices_S: Tensor, token_offsets_T1: Tensor, num_experts: int
) -> RoutingPlan:
    """``plan_from_triples`` without its sort, for the pairs of token rounding: sorted by token, those of token t at
    [token_offsets[t], token_offsets[t+1]), int32, unused pairs last. Nothing is checked.
    """
    num_tokens, capacity = token_offsets_T1.shape[0] - 1, _capacity(token_indices_S.shape[0], num_experts, 1)
    slots = Slots(expert_indices_S, token_indices_S, 0, num_tokens, num_experts, 1, capacity)
    tensors = build(slots)
    return _plan(slots, tensors, tensors.reverse_index, token_offsets_T1)


def plan_from_offsets(offs_E: Tensor, num_rows: int, *, validate: bool = False) -> RoutingPlan:
    """Plan of rows that are already sorted by expert. ``offs`` (E,) holds cumulative ends, as in
    ``torch.nn.functional.grouped_mm``.

    Rows at and past ``offs[-1]`` are dead. Offsets that decrease or exceed ``num_rows`` are clamped, so that no memory
    outside the rows is touched; ``validate=True`` costs a sync and raises on them.
    """
    checks.ids("offs", offs_E, 1)
    checks.non_negative("num_rows", num_rows)
    num_experts = offs_E.shape[0]
    _check_sizes(num_experts, 1)
    checks.index_count("rows", num_rows)
    if validate:
        checks.valid_offsets(offs_E, num_rows)
    ends = offs_E.clamp(0, num_rows).cummax(0).values.to(torch.int32)
    expert_offsets = torch.nn.functional.pad(ends, (1, 0))
    rows = torch.arange(num_rows, device=offs_E.device, dtype=torch.int32)
    row_expert = torch.searchsorted(ends, rows, right=True, out_int32=True)
    index = torch.where(row_expert < num_experts, rows, -1)
    return RoutingPlan(
        num_rows,
        num_experts,
        num_rows,
        1,
        expert_offsets,
        index,
        index,
        row_expert,
        index,
        counts=None,
        token_rows=index,
        token_offsets=None,
        identity=True,
    )


def plan_from_deepep(
    dispatched_indices_NK: Tensor,
    dispatched_probs_NK: Tensor,
    tokens_per_expert: Sequence[int] | Tensor,
    *,
    tile: int = 1,
    validate: bool = False,
) -> tuple[RoutingPlan, Tensor]:
    """Plan of rows received from a DeepEP dispatch; returns ``(plan, scores_S)``.

    Args:
        dispatched_indices_NK: (N_recv, K) integer local expert ids, -1 where the choice went to another rank; pairwise
            distinct in a row.
        dispatched_probs_NK: (N_recv, K) float; returned flattened as slot scores, so gradients flow back to it. Masked
            entries get exactly 0.
        tokens_per_expert: (E,) integers, rows of each local expert or more, as DeepEP's ``expert_alignment`` rounds
            them up. A host sequence (or CPU tensor) bounds the buffers; a device tensor leaves the upper bound
            N_recv * K in place. Counts on the host that are too small drop the last rows; ``validate=True`` raises
            instead.
        tile: pad each non-empty expert to a multiple of this many rows, with exactly zero gradient from padding.
        validate: cost a sync to check that ids are distinct and in [-1, E) and that no count is too small for them.

    The rows of a token are summed by ascending expert id. ``plan.scatter_index`` is DeepEP's ``row * K + col`` source
    of each score.
    """
    checks.ids("dispatched_indices", dispatched_indices_NK, 2)
    checks.same_shape("dispatched_indices", dispatched_indices_NK, "dispatched_probs", dispatched_probs_NK)
    checks.same_device("dispatched_indices", dispatched_indices_NK, "dispatched_probs", dispatched_probs_NK)
    checks.floating("dispatched_probs", dispatched_probs_NK)
    num_tokens, k = dispatched_indices_NK.shape
    checks.counts("tokens_per_expert", tokens_per_expert)
    on_device = isinstance(tokens_per_expert, Tensor) and tokens_per_expert.device.type != "cpu"
    num_experts = len(tokens_per_expert)
    _check_sizes(num_experts, tile)
    capacity = _capacity(num_tokens * k, num_experts, tile)
    if not on_device:
        capacity = min(capacity, sum(-(-int(n) // tile) * tile for n in tokens_per_expert))
    if validate:
        checks.valid_topk_ids(dispatched_indices_NK, num_experts, sentinel=False)
        checks.counts_suffice("tokens_per_expert", torch.as_tensor(tokens_per_expert), dispatched_indices_NK)
    slots = Slots(dispatched_indices_NK.reshape(-1), None, k, num_tokens, num_experts, tile, capacity)
    tensors = build(slots)
    rows_NK = tensors.reverse_index.view(num_tokens, k)
    by_expert_NK = torch.where(rows_NK < 0, MAX_INDEX, rows_NK).sort(dim=1).values  # experts own ascending row segments
    token_rows = torch.where(by_expert_NK == MAX_INDEX, -1, by_expert_NK).reshape(-1)
    return _plan(slots, tensors, token_rows), dispatched_probs_NK.reshape(-1)


def _plan(slots: Slots, tensors: PlanTensors, token_rows: Tensor, token_offsets: Tensor | None = None) -> RoutingPlan:
    capacity = tensors.gather_index.shape[0]
    sizes = slots.num_tokens, slots.num_experts, capacity, slots.tile
    return RoutingPlan(*sizes, *tensors, token_rows=token_rows, token_offsets=token_offsets)


def _capacity(slots: int, num_experts: int, tile: int) -> int:
    capacity = slots if tile == 1 else slots + min(num_experts, slots) * (tile - 1)
    checks.index_count("routed rows (slots plus tile padding)", capacity)
    return capacity


def _check_sizes(num_experts: int, tile: int) -> None:
    checks.positive("num_experts", num_experts)
    checks.positive("tile", tile)


# ---- the op: fields of Slots -> fields of PlanTensors ----------------------------------------------------------------

torch.library.define(
    "supersonic_moe::build_plan",
    "(Tensor ids, Tensor? slot_tokens, SymInt slots_per_token, SymInt num_tokens, SymInt num_experts, SymInt tile,"
    " SymInt capacity)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _build_plan(ids: Tensor, *rest: Any) -> PlanTensors:
    kernels = registry.kernels(registry.choose(ids.device).name).routing
    return kernels.build_plan(Slots(ids, *rest))


torch.library.impl("supersonic_moe::build_plan", ("cpu", "cuda"))(_build_plan)
_build_plan_op = caller(torch.ops.supersonic_moe.build_plan.default, _build_plan, differentiable=False)


@torch.library.register_fake("supersonic_moe::build_plan")  # type: ignore[untyped-decorator]
def _build_plan_fake(*arguments: Any) -> PlanTensors:
    slots = Slots(*arguments)

    def empty(n: int) -> Tensor:
        return slots.ids.new_empty(n, dtype=torch.int32)

    by_row = empty(slots.capacity), empty(slots.capacity), empty(slots.capacity)
    return PlanTensors(empty(slots.num_experts + 1), *by_row, empty(slots.ids.shape[0]), empty(slots.num_experts))


def build(slots: Slots) -> PlanTensors:
    ids, tokens, *sizes = slots
    return PlanTensors(*_build_plan_op(ids.contiguous(), None if tokens is None else tokens.contiguous(), *sizes))
