"""The routing rule of the inference operator in plain torch; ``config/grouped_routing.py`` says what it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.config.router import SUM_EPS


def route_grouped(logits_TE: Tensor, bias_E: Tensor | None, rule: GroupedRouting) -> tuple[Tensor, Tensor]:
    """(weights (T, K) in the dtype of the logits, scaling factor included; ids (T, K) int32), best first.

    Args:
        logits_TE: float32; float64 computes in float64.
        bias_E: (E,) of any float dtype, converted before the addition; None adds nothing.
    """
    score_TE = _SCORE[rule.scoring](logits_TE)
    biased_TE = score_TE if bias_E is None else score_TE + bias_E.to(score_TE.dtype)
    biased_TE = biased_TE.masked_fill(biased_TE.isnan(), -math.inf)

    num_tokens, per_group = biased_TE.shape[0], rule.num_experts // rule.n_group
    biased_TGM = biased_TE.reshape(num_tokens, rule.n_group, per_group)  # M experts a group
    best_TG = biased_TGM.sort(dim=2, descending=True).values[:, :, :2].sum(2)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, _best_first(best_TG, rule.topk_group), True)
    allowed_TE = kept_TG.repeat_interleave(per_group, dim=1)

    order_TE = _best_first(biased_TE, rule.num_experts)
    outside_last_TE = (~allowed_TE).gather(1, order_TE).to(torch.int8).sort(dim=1, stable=True).indices
    ids_TK = order_TE.gather(1, outside_last_TE)[:, : rule.top_k]

    chosen_TK = score_TE.gather(1, ids_TK)
    weights_TK = chosen_TK / (chosen_TK.sum(1, keepdim=True) + SUM_EPS) * rule.scaling_factor
    return weights_TK, ids_TK.to(torch.int32)


def _best_first(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of each row; among equals the lower index first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _sqrt_softplus(x: Tensor) -> Tensor:
    """softplus(x) = max(x, 0) + log1p(exp(-|x|)), which neither overflows nor loses small values."""
    return (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).sqrt()


_SCORE: dict[Scoring, Callable[[Tensor], Tensor]] = {
    Scoring.SIGMOID: torch.sigmoid,
    Scoring.SOFTMAX: lambda x: x.softmax(1),
    Scoring.SQRT_SOFTPLUS: _sqrt_softplus,
}
