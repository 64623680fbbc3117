"""The routing rule of the inference operator: how fp32 logits (T, E) become K experts and weights a token.

Three scoring functions cover today's served models; every one is followed by the same choice and the same weights:

    s   = score(logits)                      sigmoid(x) | softmax(x) over all E | sqrt(softplus(x)), in fp32
    b   = s + bias                           the bias moves the choice and never enters the weights
    groups: n_group runs of E / n_group experts; a group is worth the sum of its two largest b (of its only b where it
            has one expert); the topk_group best groups take part
    choice: the top_k largest b among the experts of those groups, best first
    w_i = s_i / (sum of the chosen s + 1e-20) * factor

| scoring | models |
|---|---|
| ``sigmoid`` | DeepSeek-V3, R1, V3.2 (8 groups, 4 kept); Kimi-K2, GLM-4.5 to 5, MiniMax-M2 (one group) |
| ``softmax`` | Qwen3-MoE, Qwen3-Next (one group, weights renormalised) |
| ``sqrt_softplus`` | DeepSeek-V4 |

Equal values, of groups as of experts, come in order of index. NaN counts as minus infinity, in experts and in groups,
so that ids are distinct and in [0, E) whatever the logits hold; a NaN that is chosen makes the weights of its own token
NaN. This differs from ``config/router.py``, whose routers rank NaN first because a training step should show it: a
serving stack routes padding tokens with undefined logits beside real ones.

Source: DeepSeek-V3 (arXiv 2412.19437, eq. 13-16); the operator definition
``moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048`` of FlashInfer-Bench.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from supersonic_moe import checks

MAX_EXPERTS = 1024
MAX_TOP_K = 16
MAX_GROUPS = 16


class Scoring(StrEnum):
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"
    SQRT_SOFTPLUS = "sqrt_softplus"


@dataclass(frozen=True, kw_only=True)
class GroupedRouting:
    """One routing rule; see the module docstring."""

    num_experts: int
    """E, of the whole model: the columns of the logits."""
    top_k: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring: Scoring = Scoring.SIGMOID
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        _in_range("the number of experts (columns of routing_logits)", self.num_experts, MAX_EXPERTS)
        _in_range("top_k", self.top_k, MAX_TOP_K)
        _in_range("n_group", self.n_group, MAX_GROUPS)
        _in_range("topk_group", self.topk_group, MAX_GROUPS)
        if self.num_experts % self.n_group:
            raise ValueError(
                f"the number of experts must be a multiple of n_group; got {self.num_experts} experts in "
                f"{self.n_group} groups. Use an n_group that divides it, or 1 for no groups."
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group must not exceed n_group; got {self.topk_group} of {self.n_group}. Lower topk_group."
            )
        reachable = self.num_experts // self.n_group * self.topk_group
        if self.top_k > reachable:
            raise ValueError(
                f"top_k must not exceed the experts of the kept groups; got top_k = {self.top_k} with "
                f"{self.topk_group} of {self.n_group} groups, which hold {reachable} experts. Raise topk_group or "
                "lower top_k."
            )
        if not -math.inf < self.scaling_factor < math.inf:  # isfinite does not trace
            raise ValueError(
                f"routed_scaling_factor must be a finite number; got {self.scaling_factor}. Use 1.0 for no scaling."
            )


def as_scoring(value: Scoring | str) -> Scoring:
    return value if isinstance(value, Scoring) else checks.member("scoring", value, Scoring)


def _in_range(name: str, value: int, largest: int) -> None:
    checks.positive(name, value)
    if value > largest:
        raise ValueError(f"{name} must be at most {largest}; got {value}.")
