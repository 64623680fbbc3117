"""Top-k routing: logits (T, E) -> scores (T, K) fp32 and ids (T, K) int32, and its backward.

The rules are in ``routing/topk.py``.

Forward. A program holds a [tokens, E] tile in registers and takes K maxima from it. Floats are mapped to int32 keys
of the same order (NaN above all, -0 equal to +0), because an integer maximum over a warp's row is one ``redux.sync``
and an integer key can mark "taken" below every float. Each round is two reductions: the largest key, then the lowest
column that holds it; so ties go to the lower expert and K distinct ids come out of any bits. The scores are then made
from the K logits, read again (they are in L1).

Grouped routing lays the same tile out as [tokens, groups, experts per group], sums the two best of each group, keeps
the best groups by the same rounds, and marks all other groups as taken.

Backward. Every rule is a dense part (zero, or -p_j <g, s> for the full softmax) plus K values at the chosen columns.
A program owns whole rows: it stores the dense part, meets itself at a barrier, and overwrites the chosen columns. No
atomics, one writer per row.

    softmax over the chosen, or renormalised:   dx_i = s_i (g_i - <g, s>)
    softmax over all, p:                        dx_j = p_j ([j chosen] g_j - <g, s>)
    sigmoid a, D = sum of the chosen a + eps:   dx_i = (c g_i - <g, s>) / D * a_i (1 - a_i)
    sigmoid a, not renormalised:                dx_i = c g_i a_i (1 - a_i)

Bytes: forward T·E read + 8·T·K written, backward 2·T·E + 12·T·K. Roofline on H200 at 4.26 TB/s, T 32768, E 128, K 8,
bf16: 2.5 us and 5 us. The forward is bound by issue instead: 294 warp instructions a row, 10 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.config.router import SUM_EPS, SigmoidGroupedTopK, SoftmaxBeforeTopK, TopKRouter
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, next_power_of_2, warps, whole_rows

TILE = 2048  # logits of one program: 16 for each of 128 threads, 16 tokens at E = 128
MAX_TOKENS = 64  # per program at small E

_TAKEN = tl.constexpr(-(2**31))  # below the key of every float
_LARGEST = tl.constexpr(2**31 - 1)
_EPS = tl.constexpr(SUM_EPS)


@triton.jit
def _key(x):
    """int32 in the order of fp32 ``x``, NaN the largest, -0 equal to +0: negatives get their magnitude bits flipped."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _LARGEST, bits ^ ((bits >> 31) & _LARGEST))


@triton.jit
def _value(key):
    """The float of a key; the key of NaN gives a NaN."""
    return (key ^ ((key >> 31) & _LARGEST)).to(tl.float32, bitcast=True)


@triton.jit
def _first_largest(key, position, axis: tl.constexpr):
    """(largest key, lowest position that holds it) along ``axis``, kept as size 1."""
    largest = tl.max(key, axis, keep_dims=True)
    return largest, tl.min(tl.where(key == largest, position, _LARGEST), axis, keep_dims=True)


@triton.jit
def _keep_best_groups(
    key,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Marks as taken all columns outside the TOPK_GROUPS groups whose two best values have the largest sums."""
    key = tl.reshape(key, [TOKENS, BLOCK_G, BLOCK_M])
    member = tl.arange(0, BLOCK_M)[None, None, :]
    best, at = _first_largest(key, member, 2)
    second = tl.max(tl.where(member == at, _TAKEN, key), 2, keep_dims=True)
    group = tl.arange(0, BLOCK_G)[None, :, None]
    score = _value(best) + tl.where(second == _TAKEN, 0.0, _value(second))
    score_key = tl.where(group < GROUPS, _key(score), _TAKEN)
    kept = tl.zeros([TOKENS, BLOCK_G, 1], dtype=tl.int32)
    for _ in range(TOPK_GROUPS):
        _, chosen = _first_largest(score_key, group, 1)
        kept = tl.where(group == chosen, 1, kept)
        score_key = tl.where(group == chosen, _TAKEN, score_key)
    return tl.reshape(tl.where(kept != 0, key, _TAKEN), [TOKENS, BLOCK_G * BLOCK_M])


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    logits_ptr, bias_ptr, scores_ptr, ids_ptr, num_tokens, logits_stride,
    E: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    in_tokens = token < num_tokens
    lane = tl.arange(0, BLOCK_G * BLOCK_M)[None, :]
    MEMBERS: tl.constexpr = E // GROUPS
    if BLOCK_G == 1:
        column = lane
        in_columns = lane < E
    else:
        column = lane // BLOCK_M * MEMBERS + lane % BLOCK_M
        in_columns = (lane // BLOCK_M < GROUPS) & (lane % BLOCK_M < MEMBERS)
    x = tl.load(logits_ptr + token * logits_stride + column, mask=in_tokens & in_columns, other=0.0).to(tl.float32)
    if RULE == "sigmoid_grouped_topk":
        preference = tl.sigmoid(x)
        if bias_ptr is not None:
            preference += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    else:
        preference = x
    key = tl.where(in_columns, _key(preference), _TAKEN)
    if GROUPS > 1:
        key = _keep_best_groups(key, TOKENS, GROUPS, TOPK_GROUPS, BLOCK_G, BLOCK_M)

    choice = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros([TOKENS, BLOCK_K], dtype=tl.int32)
    for k in range(K):
        _, best = _first_largest(key, column, 1)
        ids = tl.where(choice == k, best, ids)
        key = tl.where(column == best, _TAKEN, key)

    in_choices = in_tokens & (choice < K)
    chosen = tl.load(logits_ptr + token * logits_stride + ids, mask=in_choices, other=0.0).to(tl.float32)
    if RULE == "sigmoid_grouped_topk":
        scores = tl.where(in_choices, tl.sigmoid(chosen), 0.0)
        if RENORMALIZE:
            scores /= tl.sum(scores, 1, keep_dims=True) + _EPS
        scores *= SCALE
    else:
        largest = tl.max(tl.where(choice < K, chosen, -float("inf")), 1, keep_dims=True)
        scores = tl.where(choice < K, tl.exp(chosen - largest), 0.0)
        if RULE == "softmax_before_topk" and not RENORMALIZE:
            scores /= tl.sum(tl.where(in_columns, tl.exp(x - largest), 0.0), 1, keep_dims=True)
        else:
            scores /= tl.sum(scores, 1, keep_dims=True)
    tl.store(scores_ptr + token * K + choice, scores, mask=in_choices)
    tl.store(ids_ptr + token * K + choice, ids, mask=in_choices)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    dscores_ptr, logits_ptr, scores_ptr, ids_ptr, dlogits_ptr, num_tokens, logits_stride,
    E: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    in_tokens = token < num_tokens
    choice = tl.arange(0, BLOCK_K)[None, :]
    in_choices = in_tokens & (choice < K)
    g = tl.load(dscores_ptr + token * K + choice, mask=in_choices, other=0.0).to(tl.float32)
    s = tl.load(scores_ptr + token * K + choice, mask=in_choices, other=0.0)
    id = tl.load(ids_ptr + token * K + choice, mask=in_choices, other=-1)
    in_choices = in_choices & (id >= 0) & (id < E)
    g_dot_s = tl.sum(g * s, 1, keep_dims=True)

    column = tl.arange(0, BLOCK_E)[None, :]
    in_columns = in_tokens & (column < E)
    if RULE == "softmax_before_topk" and not RENORMALIZE:
        x = tl.load(logits_ptr + token * logits_stride + column, mask=in_columns, other=0.0).to(tl.float32)
        x = tl.where(column < E, x, -float("inf"))
        unnormalized = tl.exp(x - tl.max(x, 1, keep_dims=True))
        dense = -g_dot_s * (unnormalized / tl.sum(unnormalized, 1, keep_dims=True))
    else:
        dense = tl.zeros([TOKENS, BLOCK_E], dtype=tl.float32)
    if RULE == "sigmoid_grouped_topk":
        chosen = tl.load(logits_ptr + token * logits_stride + id, mask=in_choices, other=0.0).to(tl.float32)
        affinity = tl.where(in_choices, tl.sigmoid(chosen), 0.0)
        daffinity = g * SCALE
        if RENORMALIZE:
            daffinity = (daffinity - g_dot_s) / (tl.sum(affinity, 1, keep_dims=True) + _EPS)
        dchosen = daffinity * affinity * tl.sigmoid(-chosen)  # 1 - sigmoid(x), exact where sigmoid(x) rounds to 1
    else:
        dchosen = s * (g - g_dot_s)

    row_ptr = dlogits_ptr + token * E
    tl.store(row_ptr + column, dense.to(dlogits_ptr.dtype.element_ty), mask=in_columns)
    tl.debug_barrier()  # the same elements are written below, by other threads of this program
    tl.store(row_ptr + id, dchosen.to(dlogits_ptr.dtype.element_ty), mask=in_choices)


def _rule(router: TopKRouter) -> tuple[str, bool, float]:
    """RULE, RENORMALIZE and SCALE of the kernels."""
    renormalize = isinstance(router, SigmoidGroupedTopK | SoftmaxBeforeTopK) and router.renormalize
    return router.kind, renormalize, router.scaling_factor if isinstance(router, SigmoidGroupedTopK) else 1.0


def _check(logits_TE: Tensor) -> None:
    if logits_TE.dtype is torch.float64:
        raise TypeError(
            "the Triton router computes in fp32 and takes bfloat16, float16 or float32 logits; got float64. "
            "Use backend='reference'."
        )


def route_forward(
    logits_TE: Tensor, k: int, router: TopKRouter, correction_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scores (T, K) fp32, ids (T, K) int32), best first."""
    _check(logits_TE)
    num_tokens, num_experts = logits_TE.shape
    scores_TK = logits_TE.new_empty(num_tokens, k, dtype=torch.float32)
    ids_TK = logits_TE.new_empty(num_tokens, k, dtype=torch.int32)
    if num_tokens == 0:
        return scores_TK, ids_TK
    groups = topk_groups = 1
    if isinstance(router, SigmoidGroupedTopK) and router.topk_groups < router.num_groups:
        groups, topk_groups = router.num_groups, router.topk_groups
    block_g, block_m = next_power_of_2(groups), next_power_of_2(num_experts // groups)
    tokens, width = whole_rows(block_g * block_m, TILE, MAX_TOKENS)
    launch(
        _forward_kernel,
        (cdiv(num_tokens, tokens),),
        (logits_TE, correction_bias_E, scores_TK, ids_TK, num_tokens, logits_TE.stride(0)),
        (num_experts, k, *_rule(router), groups, topk_groups, tokens, block_g, block_m, next_power_of_2(k)),
        num_warps=warps(tokens * width),
    )
    return scores_TK, ids_TK


def route_backward(
    dscores_TK: Tensor, logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, router: TopKRouter
) -> Tensor:
    """dlogits (T, E) in the dtype of the logits. dscores, scores and ids are contiguous."""
    _check(logits_TE)
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = logits_TE.new_empty(num_tokens, num_experts)
    if num_tokens == 0:
        return dlogits_TE
    tokens, block_e = whole_rows(num_experts, TILE, MAX_TOKENS)
    k = ids_TK.shape[1]
    launch(
        _backward_kernel,
        (cdiv(num_tokens, tokens),),
        (dscores_TK, logits_TE, scores_TK, ids_TK, dlogits_TE, num_tokens, logits_TE.stride(0)),
        (num_experts, k, *_rule(router), tokens, block_e, next_power_of_2(k)),
        num_warps=warps(tokens * block_e),
    )
    return dlogits_TE
