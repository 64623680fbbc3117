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
Balance-f's z does not see it. The paper advises a mean load of at least 2 M tokens an expert; below M all experts may
end with no rows at all, of which every mode but UP warns (UserWarning). Group limits of the base router bind the top-K
choice, not the extra tokens. A correction bias needs no place in S': it is one constant for all the tokens that an
expert ranks. Tokens with NaN logits come last among their equals.

Everything runs on the device, with shapes known on the host (no synchronisation, CUDA-graph capturable) and without
floating-point atomics. ``kernels/reference/token_rounding.py`` is the definition, by one stable sort of T keys for each
expert; ``kernels/triton/token_rounding.py`` finds the same tokens without a sort, in four launches.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.autograd import apply
from supersonic_moe.config.router import SigmoidGroupedTopK, TokenRounding
from supersonic_moe.kernels.interface import KeptPairs, Rounding
from supersonic_moe.kernels.reference.token_rounding import token_rounding_backward as differentiable_backward
from supersonic_moe.routing.topk import route, router_kernels


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
    token_offsets: Tensor
    """(T+1,) int32: token t has the slots [token_offsets[t], token_offsets[t+1])."""


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
    if not torch.compiler.is_compiling():  # which would guard on T
        _warn_below_a_tile(logits_TE, k, config)
    with torch.no_grad():
        scores_TK, ids_TK = route(logits_TE, k, config.base, correction_bias=correction_bias, backend=backend)
    capacity = token_rounding_capacity(logits_TE.shape[0], k, logits_TE.shape[1], config)
    return TokenRoundingResult(*apply(_Round, logits_TE, scores_TK, ids_TK, config, step, capacity, backend))


def _warn_below_a_tile(logits_TE: Tensor, k: int, config: TokenRounding) -> None:
    num_tokens, num_experts = logits_TE.shape
    if config.mode != "UP" and 0 < num_tokens * k < num_experts * config.tile:
        needed = -(-num_experts * config.tile // k)
        warnings.warn(
            f"token rounding may leave every expert without rows where experts get less than a tile of tokens on "
            f"average (E tile / K = {needed} tokens in all); got {num_tokens} tokens with {num_experts} experts, "
            f"K = {k}, tile {config.tile}. Use a smaller tile or more tokens, or route by the base router.",
            stacklevel=3,
        )


def _check_step(step: object, logits_TE: Tensor) -> None:
    if not isinstance(step, Tensor):
        checks.non_negative("step", step)
        if isinstance(step, int) and step >= 2**63:
            raise ValueError(f"step must be below 2**63; got {step}. Take it modulo 2**63.")
        return
    if step.numel() != 1 or step.is_floating_point():
        raise ValueError(f"step must hold one integer; got {checks.describe(step)}. Use for example torch.tensor(0).")
    checks.same_device("logits", logits_TE, "step", step)


# ---- the ops: token_rounding_forward, token_rounding_backward --------------------------------------------------------

torch.library.define(
    "supersonic_moe::token_rounding_forward",
    "(Tensor logits, Tensor scores, Tensor ids, float? scale, str mode, SymInt tile, SymInt seed, SymInt step,"
    " Tensor? device_step, SymInt capacity, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "supersonic_moe::token_rounding_backward",
    "(Tensor dscores, Tensor logits, Tensor scores, Tensor experts, Tensor token_offsets, float? scale, str backend)"
    " -> Tensor",
)


@torch.library.impl("supersonic_moe::token_rounding_forward", ("cpu", "cuda"))
def _forward(
    logits: Tensor,
    scores: Tensor,
    ids: Tensor,
    scale: float | None,
    mode: str,
    tile: int,
    seed: int,
    step: int,
    device_step: Tensor | None,
    capacity: int,
    backend: str,
) -> tuple[Tensor, ...]:
    rounding = Rounding(scale, mode, tile, seed, step if device_step is None else device_step)
    kernels = router_kernels(logits, backend)
    return kernels.token_rounding_forward(logits.contiguous(), scores, ids, rounding, capacity)


@torch.library.impl("supersonic_moe::token_rounding_backward", ("cpu", "cuda"))
def _backward(
    dscores: Tensor,
    logits: Tensor,
    scores: Tensor,
    experts: Tensor,
    token_offsets: Tensor,
    scale: float | None,
    backend: str,
) -> Tensor:
    kernels = router_kernels(logits, backend)
    kept = KeptPairs(scores.contiguous(), experts.contiguous(), token_offsets.contiguous())
    return kernels.token_rounding_backward(dscores.contiguous(), logits.contiguous(), kept, scale)


@torch.library.register_fake("supersonic_moe::token_rounding_forward")  # type: ignore[untyped-decorator]
def _forward_fake(logits: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    def empty(n: int) -> Tensor:
        return logits.new_empty(n, dtype=torch.int32)

    (num_tokens, num_experts), (*_, capacity, _backend) = logits.shape, rest
    return empty(capacity), empty(capacity), scores.new_empty(capacity), empty(num_experts), empty(num_tokens + 1)


@torch.library.register_fake("supersonic_moe::token_rounding_backward")  # type: ignore[untyped-decorator]
def _backward_fake(dscores: Tensor, logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty(logits.shape)


class _Round(torch.autograd.Function):
    """Saves the logits (alive anyway as the router's output), the scores, their experts and the token offsets."""

    @staticmethod
    def forward(
        logits: Tensor,
        scores: Tensor,
        ids: Tensor,
        config: TokenRounding,
        step: Tensor | int,
        capacity: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        on_device = isinstance(step, Tensor)
        outputs: tuple[Tensor, ...] = torch.ops.supersonic_moe.token_rounding_forward.default(
            logits,
            scores,
            ids,
            _scale(config),
            config.mode,
            config.tile,
            config.seed,
            0 if on_device else step,
            step if on_device else None,
            capacity,
            backend,
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, _, _, config, _, _, ctx.backend = inputs
        _, experts, scores, _, token_offsets = output
        ctx.scale = _scale(config)
        ctx.mark_non_differentiable(*(t for t in output if t is not scores))
        ctx.save_for_backward(logits, scores, experts, token_offsets)

    @staticmethod
    def backward(ctx: Any, _tokens: Tensor, _experts: Tensor, dscores: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the op has no derivative, plain torch has
            logits, *kept = ctx.saved_tensors
            dlogits = differentiable_backward(dscores, logits, KeptPairs(*kept), ctx.scale)
        else:
            backward = torch.ops.supersonic_moe.token_rounding_backward.default
            dlogits = backward(dscores, *ctx.saved_tensors, ctx.scale, ctx.backend)
        return dlogits, *[None] * 6


def _scale(config: TokenRounding) -> float | None:
    """What tells the backends the two kinds of weights apart: a factor for sigmoids, None for a softmax."""
    return float(config.base.scaling_factor) if isinstance(config.base, SigmoidGroupedTopK) else None
