"""Auxiliary losses of the router; scalars in fp32 (fp64 for fp64 logits), differentiable with respect to the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from supersonic_moe import checks


def switch_load_balancing_loss(router_logits_TE: Tensor, expert_counts_E: Tensor) -> Tensor:
    """The Switch Transformer's load-balancing loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6, without its alpha).

        loss = E * sum_e f_e P_e      f_e = counts_e / sum(counts)       P_e = (1/T) sum_t softmax(logits_t)_e

    f_e is the share of the routed (token, expert) pairs that expert e received (a constant: counting has no
    derivative), P_e the share of probability that the router gave it. Uniform routing gives 1, everything on one expert
    gives E. With K choices a token f still sums to 1, as in SonicMoE; implementations that divide the counts by T give
    K times this value. T = 0, or no routed pair, gives 0.

    Args:
        router_logits_TE: (T, E).
        expert_counts_E: (E,) tokens routed to each expert, integer or float.
    """
    _check_logits(router_logits_TE)
    checks.tensor("expert_counts", expert_counts_E, 1, "(E,)")
    num_experts = router_logits_TE.shape[1]
    checks.size("expert_counts", "length", expert_counts_E.shape[0], num_experts, "the number of experts")
    checks.same_device("router_logits", router_logits_TE, "expert_counts", expert_counts_E)
    acc = torch.promote_types(router_logits_TE.dtype, torch.float32)
    probability_E = router_logits_TE.softmax(1, dtype=acc).sum(0)
    return num_experts * torch.dot(normalize(probability_E, p=1, dim=0), normalize(expert_counts_E.to(acc), p=1, dim=0))


def router_z_loss(router_logits_TE: Tensor) -> Tensor:
    """ST-MoE's router z-loss (Zoph et al. 2022, arXiv 2202.08906, eq. 5): mean over tokens of logsumexp(logits_t)^2.

    Keeps logits small, so that the softmax stays accurate in low precision. T = 0 gives 0.
    """
    _check_logits(router_logits_TE)
    acc = torch.promote_types(router_logits_TE.dtype, torch.float32)
    return router_logits_TE.to(acc).logsumexp(1).square().sum() / max(router_logits_TE.shape[0], 1)


def _check_logits(logits: Tensor) -> None:
    checks.tensor("router_logits", logits, 2, "(T, E)")
    checks.floating("router_logits", logits)
