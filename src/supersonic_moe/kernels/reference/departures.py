"""Where all tokens go when they go to all ranks: see ``parallel/departures.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from supersonic_moe.kernels.interface import Departures


def departures_everywhere(ids_TK: Tensor, num_experts: int, ranks: int, places: int) -> Departures:
    real_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    ids = torch.where(real_TK, ids_TK, -1)
    rank_TK = torch.where(real_TK, ids // (num_experts // ranks), -1)
    token_T1 = torch.arange(ids.shape[0], device=ids.device)[:, None]
    rank_R = torch.arange(ranks, device=ids.device)
    needed_TR = (rank_TK[:, :, None] == rank_R).any(1)
    token_M = F.pad(token_T1[:, 0], (0, places - ids.shape[0]), value=-1).repeat(ranks)
    copy_TR = torch.where(needed_TR, token_T1 + rank_R * places, -1)
    copy_TK = torch.where(real_TK, token_T1 + rank_TK * places, -1)
    rows = ids.new_zeros(num_experts + 1, dtype=torch.int64)
    rows.scatter_add_(0, torch.where(real_TK, ids, num_experts).view(-1).long(), rows.new_ones(ids.numel()))
    tables = ids, token_M, copy_TR, copy_TK, needed_TR.sum(0), rows[:num_experts]
    return Departures(*(t.to(torch.int32) for t in tables))
