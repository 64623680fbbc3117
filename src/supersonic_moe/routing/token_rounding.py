"""Token rounding (SonicMoE, arXiv 2512.14080, Algorithms 4 and 6): expert loads that are multiples of the GEMM tile.

A grouped GEMM pads the f_e tokens of expert e up to a multiple of its M tile; with many small experts the padding is a
large share of the work. Token rounding changes the routing instead, by less than one tile an expert. It is meant for
training only: evaluate with the base router.

1. Top-K token choice with the base router; count f_e.
2. Choose the rounded count r_e in {floor_e, ceil_e}, the multiples of M = ``tile`` around f_e, by ``mode``:

   ==========  =========================================================================================================
   mode        r_e = ceil_e if and only if
   ==========  =========================================================================================================
   NR-f        ceil_e - f_e < f_e - floor_e (nearest; a tie goes down)
   SR-f        u_e < (f_e - floor_e) / M
   NR-s        u_e < (s(f_e) - s(floor_e)) / (s(ceil_e) - s(floor_e)), s(n) = sum of the n best scores of the expert
   Balance-f   abs(ceil_e - f_e + z) < abs(floor_e - f_e + z), z = sum of r - f over the experts before e; this keeps
               the sum of r within M/2 of the sum of f
   UP          always (real tokens take the place of padding)
   DOWN        never (tokens are dropped)
   ==========  =========================================================================================================

   u_e is uniform on [0, 1), a hash of (seed, step, e). Where f_e is a multiple of M, r_e = f_e.
3. Rank the tokens of each expert by S': its normalised top-K score for a token that chose the expert, its probability
   minus 1 for any other. So every token that chose the expert comes before every token that did not; equal scores come
   in token order. Keep the first r_e. (The scores s of NR-s are S' without the minus 1.)
4. Renormalise each token's weights over the experts that keep it. A token may end with none (its MoE output is 0) or
   with more than K.

Limits. An expert cannot take a token twice, so r_e is capped at T, and is then not a multiple of M: this needs
ceil_e > T, hence T not a multiple of M. With T < M the choice is between r_e = T and r_e = 0. The cap comes last:
Balance-f's z does not see it. The paper advises a mean load of at least 2 M tokens an expert. Group limits of the base
router bind the top-K choice, not the extra tokens. A correction bias needs no place in S': it is one constant for all
the tokens that an expert ranks. Tokens with NaN logits come last among their equals.

Everything runs on the device, with shapes known on the host (no synchronisation, CUDA-graph capturable) and without
floating-point atomics. The main cost is one stable sort of T keys of 4 bytes for each of E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.routing.topk import (
    SUM_EPS,
    SigmoidGroupedTopK,
    SoftmaxAfterTopK,
    SoftmaxBeforeTopK,
    TopKRouter,
    route,
)

MODES = ("NR-f", "SR-f", "NR-s", "Balance-f", "UP", "DOWN")


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

    base: TopKRouter = field(default_factory=SoftmaxAfterTopK)
    mode: str = "NR-f"
    tile: int = 128
    seed: int = 0
    kind: ClassVar[str] = "token_rounding"

    def __post_init__(self) -> None:
        if not isinstance(self.base, SoftmaxAfterTopK | SoftmaxBeforeTopK | SigmoidGroupedTopK):
            raise TypeError(
                f"base must be a top-K router config; got {self.base!r}. Use SoftmaxAfterTopK() or the like."
            )
        if not isinstance(self.base, SoftmaxAfterTopK) and not self.base.renormalize:
            raise ValueError(
                "token rounding renormalises the weights of each token, so its base router must too; "
                f"got {self.base!r}. Set renormalize=True."
            )
        if self.mode not in MODES:
            raise ValueError(f"unknown token rounding mode {self.mode!r}; choose one of {', '.join(MODES)}.")
        checks.positive("tile", self.tile)
        checks.non_negative("seed", self.seed)
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32; got {self.seed}. Take it modulo 2**32.")


class TokenRoundingResult(NamedTuple):
    """C = ``token_rounding_capacity(...)`` slots, sorted by (token, expert); the first ``counts.sum()`` are in use."""

    token_indices: Tensor
    """(C,) int32; T in unused slots, so that the whole list is sorted."""
    expert_indices: Tensor
    """(C,) int32; -1 in unused slots."""
    scores: Tensor
    """(C,) float32 (float64 for float64 logits), differentiable; 0 in unused slots."""
    counts: Tensor
    """(E,) int32 rounded counts r_e."""


def token_rounding_capacity(num_tokens: int, k: int, num_experts: int, config: TokenRounding) -> int:
    """C, an upper bound of sum_e r_e that is known on the host.

    Only the at most min(E, T K) experts that some token chose are rounded. Each gains at most M - 1 tokens (UP, SR-f,
    NR-s) or (M - 1) // 2 (NR-f); Balance-f gains (M - 1) // 2 in total, DOWN nothing. No routing exceeds T E.
    """
    slots = num_tokens * k
    experts = min(num_experts, slots)
    nearest = (config.tile - 1) // 2
    gain = {"DOWN": 0, "Balance-f": nearest, "NR-f": experts * nearest}.get(config.mode, experts * (config.tile - 1))
    return min(slots + gain, num_tokens * num_experts)


def token_rounding(
    logits_TE: Tensor,
    k: int,
    config: TokenRounding,
    *,
    step: Tensor | int = 0,
    correction_bias: Tensor | None = None,
    backend: str = "auto",
) -> TokenRoundingResult:
    """Round the load of every expert; see the module docstring. Differentiable from the scores to the logits.

    Args:
        logits_TE: (T, E) router logits.
        k: experts a token before rounding.
        config: base router, mode, tile and seed.
        step: which draw of the sampled modes SR-f and NR-s: an int, or an integer tensor of one element on the device
            of the logits, which a CUDA graph reads anew at each replay. The result is a pure function of (logits,
            config, step), so a recomputed forward must get the same step; a training loop must advance it, or every
            iteration rounds with the same draw.
        correction_bias, backend: as in ``route``.
    """
    if not isinstance(config, TokenRounding):
        raise TypeError(f"config must be a TokenRounding; got {config!r}. Call route(...) for a top-K router.")
    _check_step(step, logits_TE)
    with torch.no_grad():
        scores_TK, ids_TK = route(logits_TE, k, config.base, correction_bias=correction_bias, backend=backend)
        kept_TE, counts_E = _keep(logits_TE, scores_TK, ids_TK.long(), config, step)
    num_tokens, num_experts = logits_TE.shape
    capacity = token_rounding_capacity(num_tokens, k, num_experts, config)
    # The j-th kept pair in (token, expert) order is where the running count of kept pairs reaches j, or T * E.
    nth_C = torch.arange(1, capacity + 1, dtype=torch.int32, device=logits_TE.device)
    pair_C = torch.searchsorted(_running_count(kept_TE), nth_C, out_int32=True)
    expert_C = torch.where(pair_C < kept_TE.numel(), pair_C % num_experts, -1)
    scale = config.base.scaling_factor if isinstance(config.base, SigmoidGroupedTopK) else None
    kept_scores: Callable[..., Tensor] = _KeptScores.apply
    return TokenRoundingResult(
        pair_C // num_experts, expert_C, kept_scores(logits_TE, kept_TE, pair_C, scale), counts_E
    )


def _check_step(step: object, logits_TE: Tensor) -> None:
    if not isinstance(step, Tensor):
        checks.non_negative("step", step)
        return
    if step.numel() != 1 or step.is_floating_point():
        raise ValueError(f"step must hold one integer; got {checks.describe(step)}. Use for example torch.tensor(0).")
    checks.same_device("logits", logits_TE, "step", step)


def _running_count(kept_TE: Tensor) -> Tensor:
    return kept_TE.flatten().cumsum(0, dtype=torch.int32)


def _keep(
    logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, config: TokenRounding, step: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3: (which tokens each expert keeps (T, E) bool, counts (E,) int32)."""
    num_tokens = logits_TE.shape[0]
    logits_TE = logits_TE.to(scores_TK.dtype)
    score_TE = logits_TE.sigmoid() if isinstance(config.base, SigmoidGroupedTopK) else logits_TE.softmax(1)
    score_TE.scatter_(1, ids_TK, scores_TK / scores_TK.sum(1, keepdim=True))
    score_TE = torch.where(score_TE.isnan(), 0.0, score_TE)  # tokens with NaN logits come last among their equals
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter_(1, ids_TK, True)

    # Computing score - 1 would round small scores to ties. Non-negative floats, their bits read as integers, keep their
    # order; subtracting 2^31 (2^63 for fp64) from those integers puts the others below every chosen token, exactly.
    bits = torch.int64 if score_TE.dtype == torch.float64 else torch.int32
    key_TE = score_TE.view(bits)
    key_TE = torch.where(chosen_TE, key_TE, key_TE + torch.iinfo(bits).min)
    token_by_rank_TE = key_TE.sort(dim=0, descending=True, stable=True).indices

    counts_E = _round_counts(chosen_TE.sum(0), score_TE, token_by_rank_TE, config, step).clamp(max=num_tokens)
    rank_T1 = torch.arange(num_tokens, device=counts_E.device)[:, None]
    kept_TE = torch.zeros_like(chosen_TE).scatter_(0, token_by_rank_TE, rank_T1 < counts_E)
    return kept_TE, counts_E.to(torch.int32)


def _round_counts(
    f_E: Tensor, score_TE: Tensor, token_by_rank_TE: Tensor, config: TokenRounding, step: Tensor | int
) -> Tensor:
    """Step 2, before the cap: r_e in {floor_e, ceil_e}, int64."""
    tile = config.tile
    over_E = f_E % tile
    floor_E = f_E - over_E
    if config.mode == "DOWN":
        return floor_E
    if config.mode == "Balance-f":
        # The choice keeps z in [-M/2, M/2), and sum(r) = sum(f) + z is a multiple of M: that fixes z. So the running
        # sum of r is the running sum of f rounded to the nearest multiple of M, ties down, and no sweep is needed.
        return torch.diff(_ceil_to(f_E.cumsum(0) - tile // 2, tile), prepend=f_E.new_zeros(1))
    if config.mode == "UP":
        up_E = over_E > 0
    elif config.mode == "NR-f":
        up_E = 2 * over_E > tile
    elif config.mode == "SR-f":
        up_E = _uniform(f_E, config.seed, step) * tile < over_E
    else:
        up_E = _uniform(f_E, config.seed, step) < _score_share(floor_E, over_E, score_TE, token_by_rank_TE, tile)
    return floor_E + tile * up_E


def _ceil_to(value: Tensor, multiple: int) -> Tensor:
    return -(-value // multiple) * multiple


def _score_share(floor_E: Tensor, over_E: Tensor, score_TE: Tensor, token_by_rank_TE: Tensor, tile: int) -> Tensor:
    """NR-s: what share of the scores between floor_e and ceil_e is of chosen tokens; 0 with nothing to round."""
    num_tokens = score_TE.shape[0]
    within_M1 = torch.arange(min(tile, num_tokens), device=floor_E.device)[:, None]
    rank_ME = floor_E + within_M1
    token_ME = token_by_rank_TE.gather(0, rank_ME.clamp(max=num_tokens - 1))
    score_ME = torch.where(rank_ME < num_tokens, score_TE.gather(0, token_ME), 0.0)
    chosen_E = torch.where(within_M1 < over_E, score_ME, 0.0).sum(0)
    return torch.where(chosen_E > 0, chosen_E / score_ME.sum(0), 0.0)


def _uniform(like_E: Tensor, seed: int, step: Tensor | int) -> Tensor:
    """(E,) floats of 24 bits in [0, 1), each a function of (seed, step, expert) and nothing else."""
    key = _mix(_mix(seed) + step.reshape(()).long()) if isinstance(step, Tensor) else _mix(_mix(seed) + step)
    expert_E = torch.arange(like_E.shape[0], device=like_E.device)
    return (_mix(key + expert_E) >> 8).float() * 2.0**-24


Word = TypeVar("Word", int, Tensor)


def _mix(x: Word) -> Word:
    """A bijection of 32-bit words where an input bit flips each output bit half of the time (C. Wellons' lowbias32).

    Tensors hold the words in int64: products wrap modulo 2^64, which leaves their low 32 bits exact.
    """
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


class _KeptScores(torch.autograd.Function):
    """Step 4: w = softmax of the kept logits (scale None) or scale * a / (sum a + 1e-20), a = sigmoid of the kept ones.

    Backward, with g = dL/dw gathered back to (T, E) and 0 where not kept:
        softmax: dx = w (g - <g, w>)            sigmoid: dx = (scale g - <g, w>) / (sum a + 1e-20) * a (1 - a)
    Saves the logits and one byte for each (token, expert). Both directions gather, so nothing needs an atomic sum.
    """

    @staticmethod
    def forward(logits_TE: Tensor, kept_TE: Tensor, pair_C: Tensor, scale: float | None) -> Tensor:
        weight_TE = _kept_weights(logits_TE, kept_TE, scale)
        used_C = pair_C < weight_TE.numel()
        picked_C = weight_TE.flatten().index_select(0, torch.where(used_C, pair_C, 0))
        return torch.where(used_C, picked_C, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits_TE, kept_TE, _, ctx.scale = inputs
        ctx.save_for_backward(logits_TE, kept_TE)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dscores_C: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, kept_TE = ctx.saved_tensors
        weight_TE = _kept_weights(logits_TE, kept_TE, ctx.scale)
        slot = (_running_count(kept_TE) - 1).clamp(min=0)
        g_TE = torch.where(kept_TE, dscores_C.index_select(0, slot).view_as(kept_TE), 0.0)
        g_dot_w_T1 = (g_TE * weight_TE).sum(1, keepdim=True)
        if ctx.scale is None:
            dlogits_TE = weight_TE * (g_TE - g_dot_w_T1)
        else:
            x_TE = logits_TE.to(weight_TE.dtype)
            a_TE = torch.where(kept_TE, x_TE.sigmoid(), 0.0)
            da_TE = (ctx.scale * g_TE - g_dot_w_T1) / (a_TE.sum(1, keepdim=True) + SUM_EPS)
            dlogits_TE = torch.where(kept_TE, da_TE * a_TE * (-x_TE).sigmoid(), 0.0)
        return dlogits_TE.to(logits_TE.dtype), None, None, None


def _kept_weights(logits_TE: Tensor, kept_TE: Tensor, scale: float | None) -> Tensor:
    """(T, E) weights over the kept experts of each token, 0 elsewhere; a token that no expert keeps has zeros only."""
    x_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if scale is None:
        return torch.where(kept_TE, x_TE.masked_fill(~kept_TE, float("-inf")).softmax(1), 0.0)
    a_TE = torch.where(kept_TE, x_TE.sigmoid(), 0.0)
    return scale * a_TE / (a_TE.sum(1, keepdim=True) + SUM_EPS)
