"""Routing metadata by a stable sort on the expert id; ``routing/plan.py`` defines the index spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels.interface import PlanTensors, Slots


def build_plan(slots: Slots) -> PlanTensors:
    """See ``Routing.build_plan``."""
    ids_S, slot_tokens_S, slots_per_token, num_tokens, num_experts, tile, capacity = slots
    device = ids_S.device
    slot_S = torch.arange(ids_S.shape[0], device=device)
    token_S = slot_S // max(slots_per_token, 1) if slot_tokens_S is None else slot_tokens_S.long()
    routed = (ids_S >= 0) & (ids_S < num_experts) & (token_S >= 0) & (token_S < num_tokens)
    expert_S = torch.where(routed, ids_S.long(), num_experts)

    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).index_add_(
        0, expert_S, torch.ones_like(expert_S)
    )
    starts = counts.cumsum(0) - counts
    padded = (counts[:-1] + tile - 1) // tile * tile
    offsets = torch.nn.functional.pad(padded.cumsum(0), (1, 0)).clamp(max=capacity)

    order = torch.sort(expert_S, stable=True).indices
    expert = expert_S[order]
    row = offsets[expert] + slot_S - starts[expert]
    kept = (expert < num_experts) & (row < capacity)
    row, order = row[kept], order[kept]

    def filled(n: int, index: Tensor, value: Tensor) -> Tensor:
        return torch.full((n,), -1, dtype=torch.int32, device=device).index_copy_(0, index, value.to(torch.int32))

    row_expert = torch.searchsorted(offsets[1:].contiguous(), torch.arange(capacity, device=device), right=True)
    return PlanTensors(
        offsets.to(torch.int32),
        filled(capacity, row, token_S[order]),
        filled(capacity, row, order),
        row_expert.to(torch.int32),
        filled(ids_S.shape[0], order, row),
        torch.bincount(expert[kept], minlength=num_experts).to(torch.int32),
    )
