"""Token rounding in plain torch; the rules are in ``routing/token_rounding.py``.

Three steps, of which the second is integer work but for one comparison of NR-s:

1. ``ranking_keys``: one integer for each (token, expert), in the order of S'. Computing "probability minus 1" in
   floating point would merge small probabilities. Instead: non-negative floats, their bits read as integers, keep their
   order, and adding -2^31 (-2^63 for fp64) puts every extra token below every chosen one, exactly. So a key also says
   whether the token chose the expert (key >= 0), and holds its score.
2. ``keep``: counts, rounded counts, and which tokens each expert keeps, by one stable sort of T keys for each expert.
3. The kept pairs in (token, expert) order, with the weights

       softmax base:   w = softmax of the token's kept logits                          dx = w (g - <g, w>)
       sigmoid base:   w = scale a / D, a = sigmoid(kept logits), D = sum a + 1e-20    dx = (scale g - <g, w>) / D
                                                                                            * a (1 - a)
   where g = dL/dw. The choice has no derivative.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from supersonic_moe.config.router import SUM_EPS
from supersonic_moe.kernels.interface import KeptPairs, Rounding


def token_rounding_forward(
    logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, rounding: Rounding, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (tokens (C), experts (C), scores (C), counts (E), token_offsets (T+1)): the fields of
    ``TokenRoundingResult``, C = ``capacity``. Scores have the dtype of ``scores_TK``, the others are int32.
    """
    num_experts = logits_TE.shape[1]
    scale, mode, tile, seed, step = rounding
    kept_TE, counts_E = keep(ranking_keys(logits_TE, scores_TK, ids_TK, scale), mode, tile, seed, step)
    # The j-th kept pair in (token, expert) order is where the running count of kept pairs reaches j, or T * E.
    running = kept_TE.flatten().cumsum(0, dtype=torch.int32)
    nth_C = torch.arange(1, capacity + 1, dtype=torch.int32, device=running.device)
    pair_C = torch.searchsorted(running, nth_C, out_int32=True)
    used_C = pair_C < kept_TE.numel()
    weight_TE = _kept_weights(logits_TE.to(scores_TK.dtype), kept_TE, scale)
    scores_C = weight_TE.flatten().index_select(0, torch.where(used_C, pair_C, 0))
    return (
        pair_C // num_experts,
        torch.where(used_C, pair_C % num_experts, -1),
        torch.where(used_C, scores_C, 0.0),
        counts_E.to(torch.int32),
        torch.nn.functional.pad(kept_TE.sum(1).cumsum(0), (1, 0)).to(torch.int32),
    )


def token_rounding_backward(dscores_C: Tensor, logits_TE: Tensor, kept: KeptPairs, scale: float | None) -> Tensor:
    """dlogits (T, E) in the dtype of the logits."""
    (num_tokens, num_experts), (scores_C, experts_C, token_offsets_T1) = logits_TE.shape, kept
    slot_C = torch.arange(experts_C.shape[0], device=experts_C.device)
    token_C = torch.searchsorted(token_offsets_T1[1:].contiguous(), slot_C, right=True)
    pair_C = torch.where(experts_C < 0, num_tokens * num_experts, token_C * num_experts + experts_C)

    def spread(value_C: Tensor) -> Tensor:
        """To (T, E), 0 where not kept. Unused slots go to a spare element, which is cut off."""
        flat = value_C.new_zeros(num_tokens * num_experts + 1).scatter_(0, pair_C, value_C)
        return flat[:-1].view(num_tokens, num_experts)

    g_TE, weight_TE = spread(dscores_C.to(scores_C.dtype)), spread(scores_C)
    g_dot_w_T1 = (g_TE * weight_TE).sum(1, keepdim=True)
    if scale is None:
        return (weight_TE * (g_TE - g_dot_w_T1)).to(logits_TE.dtype)
    kept_TE = spread(torch.ones_like(scores_C)) > 0
    x_TE = logits_TE.to(scores_C.dtype)
    a_TE = torch.where(kept_TE, x_TE.sigmoid(), 0.0)
    da_TE = (scale * g_TE - g_dot_w_T1) / (a_TE.sum(1, keepdim=True) + SUM_EPS)
    return torch.where(kept_TE, da_TE * a_TE * (-x_TE).sigmoid(), 0.0).to(logits_TE.dtype)


def ranking_keys(logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, scale: float | None) -> Tensor:
    """(T, E) int32 (int64 for fp64): bits of the score of a token that chose the expert, those of its probability plus
    the smallest integer for any other. Tokens with NaN have score 0.
    """
    ids_TK = ids_TK.long()
    x_TE = logits_TE.to(scores_TK.dtype)
    score_TE = x_TE.softmax(1) if scale is None else x_TE.sigmoid()
    score_TE.scatter_(1, ids_TK, scores_TK / scores_TK.sum(1, keepdim=True))
    bits = torch.int64 if score_TE.dtype == torch.float64 else torch.int32
    key_TE = torch.where(score_TE.isnan(), 0.0, score_TE).view(bits)
    chosen_TE = torch.zeros_like(key_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
    return torch.where(chosen_TE, key_TE, key_TE + torch.iinfo(bits).min)


def keep(key_TE: Tensor, mode: str, tile: int, seed: int, step: Tensor | int) -> tuple[Tensor, Tensor]:
    """(which tokens each expert keeps (T, E) bool, counts (E,) int64)."""
    num_tokens = key_TE.shape[0]
    token_by_rank_TE = key_TE.sort(dim=0, descending=True, stable=True).indices
    counts_E = _round_counts(key_TE, token_by_rank_TE, mode, tile, seed, step).clamp(max=num_tokens)
    rank_T1 = torch.arange(num_tokens, device=key_TE.device)[:, None]
    kept_TE = torch.zeros_like(key_TE, dtype=torch.bool).scatter_(0, token_by_rank_TE, rank_T1 < counts_E)
    return kept_TE, counts_E


def _round_counts(
    key_TE: Tensor, token_by_rank_TE: Tensor, mode: str, tile: int, seed: int, step: Tensor | int
) -> Tensor:
    """r_e in {floor_e, ceil_e}, before the cap at T."""
    f_E = (key_TE >= 0).sum(0)
    over_E = f_E % tile
    floor_E = f_E - over_E
    if mode == "DOWN":
        return floor_E
    if mode == "Balance-f":
        # The choice keeps z in [-M/2, M/2), and sum(r) = sum(f) + z is a multiple of M: that fixes z. So the running
        # sum of r is the running sum of f rounded to the nearest multiple of M, ties down, and no sweep is needed.
        return torch.diff(_ceil_to(f_E.cumsum(0) - tile // 2, tile), prepend=f_E.new_zeros(1))
    if mode == "UP":
        up_E = over_E > 0
    elif mode == "NR-f":
        up_E = 2 * over_E > tile
    elif mode == "SR-f":
        up_E = uniform(f_E, seed, step) * tile < over_E
    else:
        up_E = uniform(f_E, seed, step) < _score_share(floor_E, over_E, key_TE, token_by_rank_TE, tile)
    return floor_E + tile * up_E


def _ceil_to(value: Tensor, multiple: int) -> Tensor:
    return -(-value // multiple) * multiple


def _score_share(floor_E: Tensor, over_E: Tensor, key_TE: Tensor, token_by_rank_TE: Tensor, tile: int) -> Tensor:
    """NR-s: what share of the scores between floor_e and ceil_e is of chosen tokens; 0 with nothing to round."""
    num_tokens = key_TE.shape[0]
    within_M1 = torch.arange(min(tile, num_tokens), device=key_TE.device)[:, None]
    rank_ME = floor_E + within_M1
    key_ME = key_TE.gather(0, token_by_rank_TE.gather(0, rank_ME.clamp(max=num_tokens - 1)))
    score_ME = (key_ME & torch.iinfo(key_ME.dtype).max).view(torch.float32 if key_ME.itemsize == 4 else torch.float64)
    score_ME = torch.where(rank_ME < num_tokens, score_ME, 0.0)
    chosen_E = torch.where(within_M1 < over_E, score_ME, 0.0).sum(0)
    return torch.where(chosen_E > 0, chosen_E / score_ME.sum(0), 0.0)


def uniform(like_E: Tensor, seed: int, step: Tensor | int) -> Tensor:
    """(E,) floats of 24 bits in [0, 1), each a function of (seed, step, expert) and nothing else."""
    key = mix(mix(seed) + step.reshape(()).long()) if isinstance(step, Tensor) else mix(mix(seed) + step)
    expert_E = torch.arange(like_E.shape[0], device=like_E.device)
    return (mix(key + expert_E) >> 8).float() * 2.0**-24


Word = TypeVar("Word", int, Tensor)


def mix(x: Word) -> Word:
    """A bijection of 32-bit words where an input bit flips each output bit half of the time (C. Wellons' lowbias32).

    Tensors hold the words in int64: products wrap modulo 2^64, which leaves their low 32 bits exact.
    """
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _kept_weights(x_TE: Tensor, kept_TE: Tensor, scale: float | None) -> Tensor:
    """(T, E) weights over the kept experts of each token, 0 elsewhere; a token that no expert keeps has zeros only."""
    if scale is None:
        return torch.where(kept_TE, x_TE.masked_fill(~kept_TE, float("-inf")).softmax(1), 0.0)
    a_TE = torch.where(kept_TE, x_TE.sigmoid(), 0.0)
    return scale * a_TE / (a_TE.sum(1, keepdim=True) + SUM_EPS)
