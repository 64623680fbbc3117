"""Which tokens each expert keeps, without a sort: a program for each expert finds one threshold in its row of keys.

Step 2 of ``token_rounding.py``. Input: keys (E, N), int32, N a multiple of 64. A token that chose the expert has the
bits of its score, >= 0; any other, an *extra* token, has the bits of its probability plus -2^31. Larger is better;
equal keys are in token order. Padding at the end of a row has the smallest key.

f counts the chosen tokens, r is what the mode rounds it to. What changes is the ``rank`` = |r - f| < M worst of the
chosen tokens (they go) or best of the extra ones (they come). ``key ^ base``, with base 2^31 - 1 or -2^31, makes those
the largest of non-negative integers, and the keys of the other class negative. Then

    a  one pass over the row: f, and the largest value of either class in each of 1024 lanes (token mod 1024)
    b  bound = rank-th largest of the lane maxima: at least ``rank`` tokens reach it, and hardly more, because rank is
       small against 1024 lanes
    c  one pass over the row: values that reach the bound go to SCRATCH words of the expert
    d  threshold = rank-th largest of those

b and d search bit by bit for the largest v that at least ``rank`` values reach, and stop when exactly ``rank`` do.
Where the bits run out before, tokens tie at the threshold: one more pass finds the last of them to keep in token order.
Where more than SCRATCH values reach the bound (mass ties, M near 1024 or above), d searches the row itself. So the row
is read twice, and the searches, some 20 dependent steps each, work on words in L1.

NR-s and Balance-f need one launch more, before: sums of scores, by the same search, or the f of the experts before.
Bytes: the E N keys twice, mostly from L2 (33 MB at T 16384, E 256).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import next_power_of_2

ROW_MULTIPLE = 64  # N is a multiple of it, so that accesses to a row are wide whatever T is
LANES = 1024  # 4 keys for each of 256 threads
ROWS = 2  # rows of lanes that are read at once
SCRATCH = 4096  # words of an expert, at least LANES

EXTRA = tl.constexpr(-(2**31))  # xor: extra tokens become >= 0, best first; also the key of an extra token of score 0
CHOSEN = tl.constexpr(2**31 - 1)  # xor: chosen tokens become >= 0, worst first
_SCORE = tl.constexpr(2**31 - 1)  # and: the bits of the score
_ROW_MULTIPLE = tl.constexpr(ROW_MULTIPLE)


@triton.jit
def _count(keys_ptr, length, base, value, LANES: tl.constexpr):
    """How many of ``length`` keys have key ^ base >= value, for a value >= 0."""
    lane = tl.arange(0, LANES)
    count = tl.zeros([LANES], dtype=tl.int32)
    first = 0
    while first < length:
        key = tl.load(keys_ptr + first + lane, mask=first + lane < length, other=0)
        count += ((first + lane < length) & ((key ^ base) >= value)).to(tl.int32)
        first += LANES
    return tl.sum(count)


@triton.jit
def _search(keys_ptr, length, base, rank, LANES: tl.constexpr):
    """(v, number of keys with key ^ base >= v): v is the largest value that at least ``rank`` keys reach, or any other
    that exactly ``rank`` reach; 0 if fewer than ``rank`` do.
    """
    value = 0
    count = _count(keys_ptr, length, base, 0, LANES)
    bit = 30
    while (bit >= 0) & (count != rank):
        trial = value | (1 << bit)
        reached = _count(keys_ptr, length, base, trial, LANES)
        value = tl.where(reached >= rank, trial, value)
        count = tl.where(reached >= rank, reached, count)
        bit -= 1
    return value, count


@triton.jit
def _rank_largest(
    row_ptr, length, scratch_ptr, best, base, rank, LANES: tl.constexpr, ROWS: tl.constexpr, SCRATCH: tl.constexpr
):
    """``_search`` of a whole row, given the lane maxima of key ^ base: steps b, c and d."""
    tl.store(scratch_ptr + tl.arange(0, LANES), best)
    tl.debug_barrier()
    bound, _ = _search(scratch_ptr, LANES, 0, rank, LANES)
    tl.debug_barrier()
    found = 0
    first = 0
    position = tl.arange(0, ROWS * LANES)
    while first < length:
        value = tl.load(row_ptr + first + position, mask=first + position < length, other=0) ^ base
        reaches = (first + position < length) & (value >= bound)
        at = found + tl.cumsum(reaches.to(tl.int32), 0) - 1
        tl.store(scratch_ptr + at, value, mask=reaches & (at < SCRATCH))
        found += tl.sum(reaches.to(tl.int32))
        first += ROWS * LANES
    tl.debug_barrier()
    fits = found <= SCRATCH
    candidates_ptr = tl.where(fits, scratch_ptr, row_ptr)
    value, count = _search(candidates_ptr, tl.where(fits, found, length), tl.where(fits, 0, base), rank, LANES)
    return tl.maximum(value, bound), count  # as many reach the bound as any value below it that d returns


@triton.jit
def _mix(x):
    """The reference's ``mix`` of a 32-bit word."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _uniform(seed, step, step_ptr, expert):
    """The reference's ``uniform``; int32 seed and step hold words modulo 2^32."""
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.int32)
    key = _mix(_mix(seed.to(tl.uint32, bitcast=True)) + step.to(tl.uint32, bitcast=True))
    return (_mix(key + expert.to(tl.uint32)) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _lanes(row_ptr, length, LANES: tl.constexpr, ROWS: tl.constexpr):
    """(f, largest value of a chosen token in each lane, of an extra token; -1 in lanes without): step a."""
    at = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    count = tl.zeros([LANES], dtype=tl.int32)
    best_chosen = count - 1
    best_extra = count - 1
    first = 0
    while first < length:
        key = tl.load(row_ptr + first + at, mask=first + at < length, other=EXTRA)
        count += tl.sum((key >= 0).to(tl.int32), 0)
        best_chosen = tl.maximum(best_chosen, tl.max(key ^ CHOSEN, 0))
        best_extra = tl.maximum(best_extra, tl.max(key ^ EXTRA, 0))
        first += ROWS * LANES
    return tl.sum(count), best_chosen, best_extra


@triton.jit(do_not_specialize=["row_blocks"])
def _chosen_kernel(keys_ptr, chosen_ptr, row_blocks, LANES: tl.constexpr):
    """f_e, for Balance-f, whose r_e depends on the experts before e."""
    length = row_blocks * _ROW_MULTIPLE
    expert = tl.program_id(0)
    row_ptr = keys_ptr + expert.to(tl.int64) * length
    tl.store(chosen_ptr + expert, _count(row_ptr, length, 0, 0, LANES))


@triton.jit(do_not_specialize=["num_tokens", "row_blocks", "tile"])
def _sums_kernel(
    keys_ptr, scratch_ptr, sums_ptr, num_tokens, row_blocks, tile,
    LANES: tl.constexpr, ROWS: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """For NR-s: program (e, 0) sums the scores of the tokens that go if e rounds down, (e, 1) of those that come if
    it rounds up.
    """
    length = row_blocks * _ROW_MULTIPLE
    row_ptr = keys_ptr + tl.program_id(0).to(tl.int64) * length
    program = tl.program_id(0) * 2 + tl.program_id(1)
    up = tl.program_id(1) == 1
    chosen, best_chosen, best_extra = _lanes(row_ptr, length, LANES, ROWS)
    go = chosen % tile
    come = tl.where(go > 0, tl.minimum(tile - go, num_tokens - chosen), 0)
    rank = tl.where(up, come, go)
    base = tl.where(up, EXTRA, CHOSEN)
    best = tl.where(up, best_extra, best_chosen)
    scratch_ptr += program.to(tl.int64) * SCRATCH
    value, _ = _rank_largest(row_ptr, length, scratch_ptr, best, base, rank, LANES, ROWS, SCRATCH)

    lane = tl.arange(0, LANES)
    lane_sum = tl.zeros([LANES], dtype=tl.float32)
    lane_count = tl.zeros([LANES], dtype=tl.int32)
    first = 0
    while first < length:
        key = tl.load(row_ptr + first + lane, mask=first + lane < length, other=0)
        above = (first + lane < length) & ((key ^ base) > value)
        lane_sum += tl.where(above, (key & _SCORE).to(tl.float32, bitcast=True), 0.0)
        lane_count += above.to(tl.int32)
        first += LANES
    ties = rank - tl.sum(lane_count)  # if 0, the value may not be that of a score
    at_value = ((value ^ base) & _SCORE).to(tl.float32, bitcast=True)
    tl.store(sums_ptr + program, tl.sum(lane_sum) + tl.where(ties > 0, ties * at_value, 0.0))


@triton.jit(do_not_specialize=["num_tokens", "row_blocks", "tile", "seed", "step"])
def _select_kernel(
    keys_ptr, scratch_ptr, chosen_ptr, sums_ptr, step_ptr, threshold_ptr, last_ptr, counts_ptr,
    num_tokens, row_blocks, tile, seed, step,
    MODE: tl.constexpr, BLOCK_E: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    length = row_blocks * _ROW_MULTIPLE
    expert = tl.program_id(0).to(tl.int64)
    row_ptr = keys_ptr + expert * length
    chosen, best_chosen, best_extra = _lanes(row_ptr, length, LANES, ROWS)
    over = chosen % tile
    floor = chosen - over
    ceil = floor.to(tl.int64) + tl.where(over > 0, tile, 0)
    if MODE == "DOWN":
        rounded = floor
    elif MODE == "UP":
        rounded = ceil
    elif MODE == "Balance-f":  # the running sum of f, rounded to the nearest multiple of the tile, ties down
        other = tl.arange(0, BLOCK_E)
        before = tl.sum(tl.load(chosen_ptr + other, mask=other < expert, other=0))
        gap = (tile - 1 - tile // 2).to(tl.uint32)
        through = (gap + before.to(tl.uint32) + chosen.to(tl.uint32)) // tile.to(tl.uint32)
        rounded = (through - (gap + before.to(tl.uint32)) // tile.to(tl.uint32)).to(tl.int64) * tile
    elif MODE == "NR-f":
        rounded = tl.where(over > tile // 2, ceil, floor)
    elif MODE == "SR-f":
        rounded = tl.where(_uniform(seed, step, step_ptr, expert) * tile < over.to(tl.float32), ceil, floor)
    else:
        go = tl.load(sums_ptr + expert * 2)
        both = go + tl.load(sums_ptr + expert * 2 + 1)
        share = tl.where(go > 0, go / tl.where(go > 0, both, 1.0), 0.0)
        rounded = tl.where(_uniform(seed, step, step_ptr, expert) < share, ceil, floor)
    count = tl.minimum(rounded, num_tokens).to(tl.int32)

    up = count > chosen
    base = tl.where(up, EXTRA, CHOSEN)
    rank = tl.where(up, count - chosen, chosen - count)
    best = tl.where(up, best_extra, best_chosen)
    value, reached = _rank_largest(
        row_ptr, length, scratch_ptr + expert * SCRATCH, best, base, rank, LANES, ROWS, SCRATCH
    )
    last = tl.where(up, length, -1)  # all that reach the value come, or all go
    if reached != rank:  # tokens tie at the value: which of them is the last to keep?
        wanted = tl.where(up, rank - _count(row_ptr, length, base, value + 1, LANES), reached - rank)
        last = -1
        seen = 0
        first = 0
        position = tl.arange(0, ROWS * LANES)
        while (seen < wanted) & (first < length):
            token = first + position
            key = tl.load(row_ptr + token, mask=token < length, other=0)
            ties = (token < length) & ((key ^ base) == value)
            order = seen + tl.cumsum(ties.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(ties & (order <= wanted), token, -1)))
            seen += tl.sum(ties.to(tl.int32))
            first += ROWS * LANES
    tl.store(threshold_ptr + expert, value ^ base)
    tl.store(last_ptr + expert, last)
    tl.store(counts_ptr + expert, count)


def select(
    keys_EN: Tensor, num_tokens: int, mode: str, tile: int, seed: int, step: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    """(threshold (E), last (E), counts (E)), int32: expert e keeps token t if its key is above the threshold, or equal
    to it with t <= last.
    """
    num_experts = keys_EN.shape[0]
    row_blocks = keys_EN.shape[1] // ROW_MULTIPLE
    threshold_E, last_E, counts_E = (keys_EN.new_empty(num_experts) for _ in range(3))
    scratch = keys_EN.new_empty((2 if mode == "NR-s" else 1) * num_experts * SCRATCH)
    chosen_E = sums_E2 = None
    device_step, host_step = (step, 0) if isinstance(step, Tensor) else (None, step)
    search, num_warps, counts = (LANES, ROWS, SCRATCH), LANES // 128, (num_tokens, row_blocks, tile)
    if mode == "Balance-f":
        chosen_E = torch.empty_like(counts_E)
        launch(_chosen_kernel, (num_experts,), (keys_EN, chosen_E, row_blocks), (LANES,), num_warps=num_warps)
    if mode == "NR-s":
        sums_E2 = keys_EN.new_empty(num_experts, 2, dtype=torch.float32)
        launch(_sums_kernel, (num_experts, 2), (keys_EN, scratch, sums_E2, *counts), search, num_warps=num_warps)
    tensors = keys_EN, scratch, chosen_E, sums_E2, device_step, threshold_E, last_E, counts_E
    launch(
        _select_kernel,
        (num_experts,),
        (*tensors, *counts, _word(seed), _word(host_step)),
        (mode, next_power_of_2(num_experts), *search),
        num_warps=num_warps,
    )
    return threshold_E, last_E, counts_E


def _word(x: int) -> int:
    """x modulo 2^32 as an int32."""
    return (x + 2**31) % 2**32 - 2**31
