"""Routers, described: how logits (T, E) become the experts of each token and the weights of their outputs.

Three rules cover the routers of today's models; ``x`` is a token's row of logits, ``I`` its K chosen experts:

========================================  ===================================  =========================================
config                                    weight of expert i in I              models
========================================  ===================================  =========================================
``SoftmaxAfterTopK()``                    softmax over ``x[I]``                Mixtral, gpt-oss; SonicMoE's default
``SoftmaxBeforeTopK()``                   softmax over all of ``x``, entry i   OLMoE, Qwen2-MoE
``SoftmaxBeforeTopK(renormalize=True)``   the same divided by its sum over I   Qwen3-MoE (equals softmax over ``x[I]``)
``SigmoidGroupedTopK(...)``               c * sigmoid(x_i) / sum over I        DeepSeek-V3, GLM-4.5, Kimi-K2
========================================  ===================================  =========================================

How experts are chosen: ``routing/topk.py``. ``TokenRounding`` on top of one of them: ``routing/token_rounding.py``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from supersonic_moe import checks

MODES = ("NR-f", "SR-f", "NR-s", "Balance-f", "UP", "DOWN")


@dataclass(frozen=True, kw_only=True)
class SoftmaxAfterTopK:
    """softmax(topk(logits)): the weights of a token sum to 1."""

    kind: ClassVar[str] = "softmax_after_topk"


@dataclass(frozen=True, kw_only=True)
class SoftmaxBeforeTopK:
    """topk(softmax(logits)); ``renormalize`` divides the chosen probabilities by their sum (``norm_topk_prob``)."""

    renormalize: bool = False
    kind: ClassVar[str] = "softmax_before_topk"

    def __post_init__(self) -> None:
        checks.flag("renormalize", self.renormalize)


@dataclass(frozen=True, kw_only=True)
class SigmoidGroupedTopK:
    """DeepSeek-V3's router: sigmoid affinities, choice by affinity + correction bias inside the best groups of experts.

    Args:
        num_groups: runs of E / num_groups consecutive experts; 1 turns the group limit off.
        topk_groups: groups of which a token may use experts.
        scaling_factor: c, multiplies the weights after normalisation (``routed_scaling_factor``).
        renormalize: divide the chosen affinities by their sum + 1e-20 (``norm_topk_prob``). Not at K = 1, where that
            would leave the constant c: DeepSeek's and Megatron's routers do not do it either.
    """

    num_groups: int = 1
    topk_groups: int = 1
    scaling_factor: float = 1.0
    renormalize: bool = True
    kind: ClassVar[str] = "sigmoid_grouped_topk"

    def __post_init__(self) -> None:
        checks.positive("num_groups", self.num_groups)
        checks.positive("topk_groups", self.topk_groups)
        checks.flag("renormalize", self.renormalize)
        checks.number("scaling_factor", self.scaling_factor)
        if self.topk_groups > self.num_groups:
            raise ValueError(
                f"topk_groups must not exceed num_groups; got {self.topk_groups} of {self.num_groups}. "
                "Lower topk_groups."
            )
        if self.scaling_factor <= 0:
            raise ValueError(
                f"scaling_factor must be a positive finite number; got {self.scaling_factor}. Use 1.0 for no scaling."
            )


TopKRouter: TypeAlias = SoftmaxAfterTopK | SoftmaxBeforeTopK | SigmoidGroupedTopK


@dataclass(frozen=True, kw_only=True)
class TokenRounding:
    """Token rounding on top of a base router.

    Args:
        base: the top-K router of step 1, and the router of evaluation. Its weights must be normalised, as token
            rounding's are: otherwise training and evaluation would see outputs of different scale.
        mode: one of NR-f, SR-f, NR-s, Balance-f, UP, DOWN; see the module docstring.
        tile: M, the row tile of the expert GEMM.
        seed: of the sampled modes SR-f and NR-s; give each layer its own.
    """

    base: TopKRouter = SoftmaxAfterTopK()
    mode: str = "NR-f"
    tile: int = 128
    seed: int = 0
    kind: ClassVar[str] = "token_rounding"

    def __post_init__(self) -> None:
        if not isinstance(self.base, TopKRouter):
            raise TypeError(
                f"base must be a top-K router config; got {checks.short(self.base)}. "
                "Use SoftmaxAfterTopK() or the like."
            )
        if not isinstance(self.base, SoftmaxAfterTopK) and not self.base.renormalize:
            raise ValueError(
                "token rounding renormalises the weights of each token, so its base router must too; "
                f"got {self.base!r}. Set renormalize=True."
            )
        if self.mode not in MODES:
            raise ValueError(
                f"unknown token rounding mode {checks.short(self.mode)}; choose one of {', '.join(MODES)}."
            )
        checks.positive("tile", self.tile)
        if self.tile >= 2**31:
            raise ValueError(f"tile must be below 2**31; got {self.tile}. Use the row tile of the expert GEMM.")
        checks.non_negative("seed", self.seed)
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32; got {self.seed}. Take it modulo 2**32.")


SUM_EPS = 1e-20
"""Added to the sum of the chosen affinities before dividing by it (DeepSeek-V3's published code)."""

_NAMES: dict[str, TopKRouter | TokenRounding] = {
    "softmax_after_topk": SoftmaxAfterTopK(),
    "softmax_before_topk": SoftmaxBeforeTopK(),
    "softmax_before_topk_renormalized": SoftmaxBeforeTopK(renormalize=True),
    "sigmoid_grouped_topk": SigmoidGroupedTopK(),
    "token_rounding": TokenRounding(),
}


_CONFIGS = (SoftmaxAfterTopK, SoftmaxBeforeTopK, SigmoidGroupedTopK, TokenRounding)


def as_router(value: str | TopKRouter | TokenRounding) -> TopKRouter | TokenRounding:
    """The config that a name stands for; a config passes through."""
    if isinstance(value, _CONFIGS):
        return value
    if isinstance(value, str) and value in _NAMES:
        return _NAMES[value]
    choices = ", ".join(_NAMES)
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"unknown router {checks.short(value)}; choose one of {choices}, "
        "or pass a router config such as SoftmaxAfterTopK()."
    )


# ---- a router and the sizes of its layer -----------------------------------------------------------------------------


def check_router(router: TopKRouter | TokenRounding, num_experts: int, k: int) -> None:
    """What a layer of E experts, K a token, asks of its router when it is made.

    Raises ValueError where the router cannot choose K of E, or where token rounding would train with other weights than
    it evaluates with. Warns (UserWarning) where the weights are constant: the output then teaches the router nothing.
    """
    checks.choices_fit(k, num_experts)
    base = router.base if isinstance(router, TokenRounding) else router
    check_groups(base, num_experts, k)
    if k > 1 or num_experts == 1:
        return
    if isinstance(router, TokenRounding) and isinstance(base, SigmoidGroupedTopK):
        raise ValueError(
            "token rounding renormalises the weights of each token, and a sigmoid router with one expert a token does "
            "not; got num_experts_per_tok (K) = 1. Use a larger K, or the router without token rounding."
        )
    if isinstance(base, SoftmaxAfterTopK) or (isinstance(base, SoftmaxBeforeTopK) and base.renormalize):
        warnings.warn(
            f"the weight of a token's only expert is 1 whatever its logits, so the router learns from auxiliary losses "
            f"alone; got num_experts_per_tok (K) = 1 with {router}. Use SoftmaxBeforeTopK() or SigmoidGroupedTopK().",
            stacklevel=3,
        )


def check_groups(router: TopKRouter, num_experts: int, k: int) -> None:
    """Raises ValueError where the groups of a sigmoid router do not divide E, or hold fewer than K experts."""
    if not isinstance(router, SigmoidGroupedTopK):
        return
    if num_experts % router.num_groups:
        raise ValueError(
            f"the number of experts must be a multiple of num_groups; got {num_experts} experts in "
            f"{router.num_groups} groups. Use a num_groups that divides it."
        )
    reachable = num_experts // router.num_groups * router.topk_groups
    if k > reachable:
        raise ValueError(
            f"k must not exceed the experts of the chosen groups; got k = {k} with {router.topk_groups} of "
            f"{router.num_groups} groups, which hold {reachable} experts. Raise topk_groups or lower k."
        )
