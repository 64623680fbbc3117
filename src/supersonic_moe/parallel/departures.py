"""Where each token goes: one copy for each (token, rank) pair, however many of its experts live there.

Expert e lives on rank e // (E / R). A token with K choices needs at most min(K, R) ranks: at R = 2 and K = 8 a quarter
of what one copy for each choice would be, at R = 8 two thirds. *A routing plan whose experts are ranks* puts the copies
in order, by rank and then by token: the builder of plans finds the positions, ``gather_index`` is what is sent, and
``reverse_index`` says where a token's partial sums come back.

Everything is computed on the device, without a host synchronization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Departures as Departures
from supersonic_moe.routing.plan import plan_from_topk


def departures(ids_TK: Tensor, num_experts: int, ranks: int) -> Departures:
    """``ids_TK``: int32 or int64; outside [0, E) a choice has no expert."""
    ids, rank_TK, needed_TR, rows_E = _needed(ids_TK, num_experts, ranks)
    plan = plan_from_topk(needed_TR.contiguous(), ranks)
    copy_TR = plan.reverse_index.view(-1, ranks)
    copy_TK = F.pad(copy_TR, (0, 1), value=-1).gather(1, rank_TK)
    return Departures(ids, plan.gather_index, copy_TR, copy_TK, plan.expert_counts, rows_E)


def departures_everywhere(ids_TK: Tensor, num_experts: int, ranks: int, max_tokens: int) -> Departures:
    """The same where all tokens go to all ranks: the copy of token t for rank r is r·max_tokens + t. Copies that a rank
    does not need come back unread.
    """
    routing = registry.kernels(registry.choose(ids_TK.device).name).routing
    return routing.departures_everywhere(ids_TK, num_experts, ranks, max_tokens)


def _needed(ids_TK: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids of Departures, rank of each choice (T, K), R where it has none; (T, R) the rank itself where a token needs
    it, else -1; rows_E of Departures).
    """
    real = (ids_TK >= 0) & (ids_TK < num_experts)
    ids = ids_TK.long()
    rank_TK = torch.where(real, ids // (num_experts // ranks), ranks)
    needed = ids.new_full((ids.shape[0], ranks + 1), -1).scatter_(1, rank_TK, rank_TK)
    rows = ids.new_zeros(num_experts + 1)
    rows.scatter_add_(0, torch.where(real, ids, num_experts).view(-1), ids.new_ones(ids.numel()))
    return torch.where(real, ids, -1).to(torch.int32), rank_TK, needed[:, :ranks], rows[:num_experts]


def in_fixed_places(found: Departures, capacity: int) -> Departures:
    """The same with ``capacity`` places for each rank, R·capacity in all: those for rank d start at d·capacity. A copy
    that finds no place is not sent. Its token gets back what the copy in the last place does: NaN (``overflow.py``).
    """
    tokens_R, ranks = found.tokens_R, found.tokens_R.shape[0]
    copies_R = tokens_R.cumsum(0)  # of each rank and those before it
    first_R = torch.arange(ranks, device=tokens_R.device, dtype=torch.int32) * capacity
    place_TR = found.copy_TR + (first_R - (copies_R - tokens_R)).to(torch.int32)
    end_R = first_R + capacity
    needed_TR = found.copy_TR >= 0
    sent_TR = needed_TR & (place_TR < end_R)
    token_TR = torch.arange(sent_TR.shape[0], device=tokens_R.device, dtype=torch.int32)[:, None].expand_as(sent_TR)
    places = token_TR.new_full((ranks * capacity + 1,), -1)
    places.scatter_(0, torch.where(sent_TR, place_TR, ranks * capacity).view(-1).long(), token_TR.reshape(-1))
    copy_TR = torch.where(needed_TR, torch.minimum(place_TR, end_R - 1), -1)
    rank_TK = torch.searchsorted(copies_R, found.copy_TK.long(), right=True)
    rank_TK = torch.where(found.copy_TK >= 0, rank_TK, ranks)
    copy_TK = F.pad(copy_TR, (0, 1), value=-1).gather(1, rank_TK)
    return found._replace(token_M=places[:-1], copy_TR=copy_TR, copy_TK=copy_TK)
