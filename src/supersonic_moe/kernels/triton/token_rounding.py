"""Token rounding without a sort. Rules: ``routing/token_rounding.py``; definition: ``kernels/reference``, same steps.

Rounding drops or adds less than one tile of tokens at each expert, so no expert needs an order of all T: it needs one
threshold, below or above which lie the few that change. Four launches (five with NR-s and Balance-f):

    1 keys     a program: some tokens, all experts.   Logits and top-k -> ranking keys (E, N), transposed
    2 select   a program: one expert.                 Threshold and count; ``select_tokens.py``
    3 count    a program: some tokens, all experts.   Number of kept pairs
    4 place    a program: some tokens, all experts.   Kept pairs in (token, expert) order, and their weights

Keys are the reference's: int32, the bits of the score of a token that chose the expert (>= 0), the bits of the
probability plus -2^31 of any other. Row e has the keys of expert e, N = T rounded up to 64, so that accesses are wide
whatever T is. Padding has the smallest key and comes after every token, so it is never kept.

Counts and choices are integers; float decisions are only the draws of SR-f and NR-s and the sums of NR-s. One writer
for each element and sums in a fixed order: same inputs, same bits.

Bytes: T·E logits once, and again where kept; T·E keys of 4 bytes written once and read four times, mostly from L2; 12
bytes a slot. Backward: T·E logit gradients written, 12 bytes a slot read. At T 16384, E 256, bf16 on H200 that is 8 MB
from and 17 MB to memory and 67 MB from L2, some 20 us of traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.config.router import SUM_EPS
from supersonic_moe.kernels.interface import KeptPairs, Rounding
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.select_tokens import CHOSEN, EXTRA, ROW_MULTIPLE, select
from supersonic_moe.kernels.triton.tiling import cdiv, next_power_of_2, whole_rows

TILE = 4096  # (token, expert) pairs of one program: 16 tokens, or 64 bytes of a key row, at E = 256
MAX_TOKENS = ROW_MULTIPLE  # per program at small E
WARPS = 8  # of 1, 3 and backward; 4 takes twice that, or 128 registers a thread
MAX_CHUNKS = 1024  # programs of 3: those of 4 sum all their counts
SLOTS = 16  # of a token, taken at once by 4 and by backward

_ROW_MULTIPLE = tl.constexpr(ROW_MULTIPLE)
_EPS = tl.constexpr(SUM_EPS)


# ---- 1 keys ----------------------------------------------------------------------------------------------------------


@triton.jit
def _score_bits(score):
    return tl.where(score != score, 0.0, score).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["num_tokens", "row_blocks"])
def _keys_kernel(
    logits_ptr, scores_ptr, ids_ptr, keys_ptr, num_tokens, row_blocks,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_stride = (row_blocks * _ROW_MULTIPLE).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    real = token < num_tokens
    x = tl.load(logits_ptr + token.to(tl.int64) * E + expert, mask=real & (expert < E), other=0.0)
    x = tl.where(expert < E, x.to(tl.float32), -float("inf"))
    if SIGMOID:
        probability = tl.sigmoid(x)
    else:
        unnormalized = tl.exp(x - tl.max(x, 1, keep_dims=True))
        probability = unnormalized / tl.sum(unnormalized, 1, keep_dims=True)
    key = tl.where(real, _score_bits(probability) | EXTRA, EXTRA)
    tl.store(keys_ptr + expert * row_stride + token, key, mask=expert < E)
    tl.debug_barrier()  # the keys of chosen tokens are overwritten below, by other threads of this program
    choice = tl.arange(0, BLOCK_K)[None, :]
    in_choices = real & (choice < K)
    score = tl.load(scores_ptr + token.to(tl.int64) * K + choice, mask=in_choices, other=0.0)
    id = tl.load(ids_ptr + token.to(tl.int64) * K + choice, mask=in_choices, other=0)
    total = tl.where(real, tl.sum(score, 1, keep_dims=True), 1.0)
    tl.store(keys_ptr + id * row_stride + token, _score_bits(score / total), mask=in_choices)


# ---- 3 count, 4 place ------------------------------------------------------------------------------------------------


@triton.jit
def _kept(keys_ptr, threshold_ptr, last_ptr, token, expert, num_tokens, row_blocks, E: tl.constexpr):
    """Whether each expert keeps each token."""
    row_stride = (row_blocks * _ROW_MULTIPLE).to(tl.int64)
    key = tl.load(keys_ptr + expert * row_stride + token, mask=expert < E, other=EXTRA)
    threshold = tl.load(threshold_ptr + expert, mask=expert < E, other=CHOSEN)
    last = tl.load(last_ptr + expert, mask=expert < E, other=-1)
    return (token < num_tokens) & ((key > threshold) | ((key == threshold) & (token <= last)))


@triton.jit(do_not_specialize=["num_tokens", "row_blocks", "blocks_per_chunk"])
def _count_kernel(
    keys_ptr, threshold_ptr, last_ptr, starts_ptr, totals_ptr, num_tokens, row_blocks, blocks_per_chunk,
    E: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)[None, :]
    block = chunk * blocks_per_chunk
    end = tl.minimum(block + blocks_per_chunk, (num_tokens + TOKENS - 1) // TOKENS)
    total = 0
    while block < end:
        tl.store(starts_ptr + block, total)
        token = block * TOKENS + tl.arange(0, TOKENS)[:, None]
        kept = _kept(keys_ptr, threshold_ptr, last_ptr, token, expert, num_tokens, row_blocks, E)
        total += tl.sum(kept.to(tl.int32))
        block += 1
    tl.store(totals_ptr + chunk, total)


@triton.jit
def _kept_logits(x_ptr, experts_ptr, start, nth, mask):
    """Logits of the nth slots of each token, -inf (sigmoid 0) where there are none."""
    expert = tl.load(experts_ptr + start + nth, mask=mask, other=0)
    return tl.load(x_ptr + expert, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "row_blocks", "blocks_per_chunk", "num_chunks", "capacity"])
def _place_kernel(
    keys_ptr, threshold_ptr, last_ptr, starts_ptr, totals_ptr, logits_ptr,
    tokens_ptr, experts_ptr, scores_ptr, offsets_ptr,
    num_tokens, row_blocks, blocks_per_chunk, num_chunks, capacity, scale,
    E: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, MAX_CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    chunk = tl.arange(0, MAX_CHUNKS)
    totals = tl.load(totals_ptr + chunk, mask=chunk < num_chunks, other=0)
    used = tl.sum(totals)
    first_slot = tl.load(starts_ptr + block) + tl.sum(tl.where(chunk < block // blocks_per_chunk, totals, 0))

    token = block * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    kept = _kept(keys_ptr, threshold_ptr, last_ptr, token, expert, num_tokens, row_blocks, E)
    flag = tl.reshape(kept.to(tl.int32), [TOKENS * BLOCK_E])  # row-major: the order of the slots
    slot = tl.reshape(first_slot + tl.cumsum(flag, 0) - flag, [TOKENS, BLOCK_E])
    tl.store(experts_ptr + slot, expert + token * 0, mask=kept)
    start = tl.min(slot, 1, keep_dims=True)
    length = tl.sum(kept.to(tl.int32), 1, keep_dims=True)
    tl.store(offsets_ptr + token, start, mask=token < num_tokens)
    tl.debug_barrier()  # the experts of a token are read below by other threads than wrote them

    longest = tl.max(length)
    x_ptr = logits_ptr + token.to(tl.int64) * E
    largest = tl.full([TOKENS, 1], -float("inf"), dtype=tl.float32)
    total = tl.zeros([TOKENS, 1], dtype=tl.float32)
    first = 0
    while first < longest:
        nth = first + tl.arange(0, SLOTS)[None, :]
        x = _kept_logits(x_ptr, experts_ptr, start, nth, nth < length)
        if scale is None:
            new = tl.maximum(largest, tl.max(x, 1, keep_dims=True))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 1, keep_dims=True)
            largest = new
        else:
            total += tl.sum(tl.sigmoid(x), 1, keep_dims=True)
        first += SLOTS
    first = 0
    while first < longest:
        nth = first + tl.arange(0, SLOTS)[None, :]
        x = _kept_logits(x_ptr, experts_ptr, start, nth, nth < length)
        weight = tl.exp(x - largest) / total if scale is None else scale * tl.sigmoid(x) / (total + _EPS)
        tl.store(scores_ptr + start + nth, weight, mask=nth < length)
        tl.store(tokens_ptr + start + nth, token + nth * 0, mask=nth < length)
        first += SLOTS

    if block == 0:
        tl.store(offsets_ptr + num_tokens, used)
    nth = tl.arange(0, TOKENS * SLOTS)
    first = used + block.to(tl.int64) * (TOKENS * SLOTS)
    while first < capacity:
        unused = first + nth < capacity
        tl.store(tokens_ptr + first + nth, nth * 0 + num_tokens, mask=unused)
        tl.store(experts_ptr + first + nth, nth * 0 - 1, mask=unused)
        tl.store(scores_ptr + first + nth, nth.to(tl.float32) * 0, mask=unused)
        first += tl.num_programs(0) * (TOKENS * SLOTS)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    dscores_ptr, logits_ptr, scores_ptr, experts_ptr, offsets_ptr, dlogits_ptr, num_tokens, scale,
    E: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    real = token < num_tokens
    start = tl.load(offsets_ptr + token, mask=real, other=0)
    length = tl.load(offsets_ptr + token + 1, mask=real, other=0) - start
    longest = tl.max(length)
    x_ptr = logits_ptr + token * E
    g_dot_w = tl.zeros([TOKENS, 1], dtype=tl.float32)
    denominator = tl.zeros([TOKENS, 1], dtype=tl.float32) + _EPS
    first = 0
    while first < longest:
        nth = first + tl.arange(0, SLOTS)[None, :]
        g = tl.load(dscores_ptr + start + nth, mask=nth < length, other=0.0)
        g_dot_w += tl.sum(g * tl.load(scores_ptr + start + nth, mask=nth < length, other=0.0), 1, keep_dims=True)
        if scale is not None:
            expert = tl.load(experts_ptr + start + nth, mask=nth < length, other=0)
            a = tl.sigmoid(tl.load(x_ptr + expert, mask=nth < length, other=0.0).to(tl.float32))
            denominator += tl.sum(tl.where(nth < length, a, 0.0), 1, keep_dims=True)
        first += SLOTS

    row_ptr = dlogits_ptr + token * E
    column = tl.arange(0, BLOCK_E)[None, :]
    zero = tl.zeros([TOKENS, BLOCK_E], dtype=dlogits_ptr.dtype.element_ty)
    tl.store(row_ptr + column, zero, mask=real & (column < E))
    tl.debug_barrier()  # the same elements are written below, by other threads of this program
    first = 0
    while first < longest:
        nth = first + tl.arange(0, SLOTS)[None, :]
        g = tl.load(dscores_ptr + start + nth, mask=nth < length, other=0.0)
        expert = tl.load(experts_ptr + start + nth, mask=nth < length, other=0)
        if scale is None:
            dx = tl.load(scores_ptr + start + nth, mask=nth < length, other=0.0) * (g - g_dot_w)
        else:
            x = tl.load(x_ptr + expert, mask=nth < length, other=0.0).to(tl.float32)
            dx = (scale * g - g_dot_w) / denominator * tl.sigmoid(x) * tl.sigmoid(-x)
        tl.store(row_ptr + expert, dx.to(dlogits_ptr.dtype.element_ty), mask=nth < length)
        first += SLOTS


# ---- host ------------------------------------------------------------------------------------------------------------


def ranking_keys(logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, scale: float | None) -> Tensor:
    """(E, N) int32, N = T rounded up to 64. Logits, scores and ids are contiguous."""
    num_tokens, num_experts = logits_TE.shape
    k = ids_TK.shape[1]
    row_blocks = cdiv(num_tokens, MAX_TOKENS)
    keys_EN = logits_TE.new_empty(num_experts, row_blocks * MAX_TOKENS, dtype=torch.int32)
    tokens, block_e = whole_rows(num_experts, TILE, MAX_TOKENS)
    launch(
        _keys_kernel,
        (row_blocks * MAX_TOKENS // tokens,),
        (logits_TE, scores_TK, ids_TK, keys_EN, num_tokens, row_blocks),
        (num_experts, k, scale is not None, tokens, block_e, next_power_of_2(k)),
        num_warps=WARPS,
    )
    return keys_EN


def token_rounding_forward(
    logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, rounding: Rounding, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(tokens (C), experts (C), scores (C) fp32, counts (E), token_offsets (T+1)), C = ``capacity``; see reference.

    Logits, scores and ids are contiguous.
    """
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        zeros = ids_TK.new_zeros
        return zeros(0), zeros(0), scores_TK.new_zeros(0), zeros(num_experts), zeros(1)
    scale, mode, tile, seed, step = rounding
    keys_EN = ranking_keys(logits_TE, scores_TK, ids_TK, scale)
    threshold_E, last_E, counts_E = select(keys_EN, num_tokens, mode, tile, seed, step)
    row_blocks = cdiv(num_tokens, MAX_TOKENS)
    tokens, block_e = whole_rows(num_experts, TILE, MAX_TOKENS)
    blocks = cdiv(num_tokens, tokens)
    blocks_per_chunk = cdiv(blocks, MAX_CHUNKS)
    num_chunks = cdiv(blocks, blocks_per_chunk)
    starts, totals = ids_TK.new_empty(blocks), ids_TK.new_empty(num_chunks)
    tokens_C, experts_C, offsets_T1 = (ids_TK.new_empty(n) for n in (capacity, capacity, num_tokens + 1))
    scores_C = scores_TK.new_empty(capacity)
    inputs = keys_EN, threshold_E, last_E, starts, totals
    counts, shape = (num_tokens, row_blocks, blocks_per_chunk), (num_experts, tokens, block_e)
    launch(_count_kernel, (num_chunks,), (*inputs, *counts), shape, num_warps=WARPS)
    args = (*inputs, logits_TE, tokens_C, experts_C, scores_C, offsets_T1, *counts, num_chunks, capacity, scale)
    launch(_place_kernel, (blocks,), args, (*shape, MAX_CHUNKS, SLOTS), num_warps=2 * WARPS)
    return tokens_C, experts_C, scores_C, counts_E, offsets_T1


def token_rounding_backward(dscores_C: Tensor, logits_TE: Tensor, kept: KeptPairs, scale: float | None) -> Tensor:
    """dlogits (T, E) in the dtype of the logits. All tensors are contiguous."""
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = logits_TE.new_empty(num_tokens, num_experts)
    if num_tokens == 0:
        return dlogits_TE
    tokens, block_e = whole_rows(num_experts, TILE, MAX_TOKENS)
    launch(
        _backward_kernel,
        (cdiv(num_tokens, tokens),),
        (dscores_C, logits_TE, *kept, dlogits_TE, num_tokens, scale),
        (num_experts, tokens, block_e, SLOTS),
        num_warps=WARPS,
    )
    return dlogits_TE
