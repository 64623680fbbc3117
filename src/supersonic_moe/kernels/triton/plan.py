"""Routing metadata: a stable counting sort of slots by expert, in three launches or one and without a word to the host.

    1 count   program c: histogram of the expert ids in its chunk of slots -> counts (C + 1, E)
    2 scan    a program for 8 experts: exclusive sum of counts over chunks, in place, and the totals, row C of counts
    3 place   program c: offsets from totals; row = offsets[e] + counts[c, e] + rank among the slots of e in the chunk,
              for each of its slots; then its share of the padding and dead rows

Of at most ALONE slots each program of step 3 counts all by itself, which takes it less than two launches take.

The result is unique (slot order inside an expert), so how slots are cut into chunks cannot show in it. Ranks inside a
block of B slots come from a B x B comparison: B compares a slot, whatever E is (a one-hot cumulative sum costs E a
slot; a bitonic sort of the block about the same as this).

Index spaces and the six outputs: ``routing/plan.py``. All counts and outputs are int32; ids and tokens are compared
in their own width first, so any garbage in them is skipped. Row and slot arithmetic that may pass 2^31 is 64-bit.

Bytes: S ids twice, S + 3P written, C·E counts five times. Roofline on H200 at 4.26 TB/s, T 32768, K 8, E 128: 8 MB =
2 us, so three launches of about 3 us each are what it costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import PlanTensors, Slots
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, next_power_of_2

BLOCK_S = 128  # slots ranked at once, one a thread; twice that past 1024 experts, whose vectors need 8 warps' registers
SCAN_C = 512  # chunks per step of the scan
SCAN_E = 8  # experts of one scan program: 8 int32 counts are one 32-byte sector
MAX_COUNTS = 1 << 17  # C * E where E allows: 512 KB of counts stay in L2
MIN_CHUNKS = 256  # C may always reach this: two programs per SM
MIN_PLACERS = 128  # programs of step 3 where rows allow: about one per SM to fill padding and dead rows
ALONE = 1024  # slots that each program counts itself: 8 blocks at some 0.5 us, for two launches of 3 us; not tuned yet
MAX_INDEX = 2**31 - 1


@triton.jit
def _load_experts(ids_ptr, tokens_ptr, slot, num_slots, slots_per_token, num_tokens, E):
    """(expert or E where the slot is skipped, token), int32, of a block of slots."""
    in_slots = slot < num_slots
    id = tl.load(ids_ptr + slot, mask=in_slots, other=-1)
    if tokens_ptr is None:
        token = slot.to(tl.int32) // slots_per_token
    else:
        token = tl.load(tokens_ptr + slot, mask=in_slots, other=-1)
    routed = (id >= 0) & (id < E) & (token >= 0) & (token < num_tokens)
    return tl.where(routed, id, E).to(tl.int32), token.to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "slots_per_token", "num_tokens", "slots_per_chunk"])
def _count_kernel(
    ids_ptr, tokens_ptr, counts_ptr, num_slots, slots_per_token, num_tokens, slots_per_chunk, E,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK_E], dtype=tl.int32)
    first = chunk * slots_per_chunk
    last = tl.minimum(first + slots_per_chunk, num_slots)
    while first < last:
        slot = first + tl.arange(0, BLOCK_S)
        expert, _ = _load_experts(ids_ptr, tokens_ptr, slot, num_slots, slots_per_token, num_tokens, E)
        count += tl.histogram(expert, BLOCK_E, mask=expert < E)
        first += BLOCK_S
    e = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + chunk * E + e, count, mask=e < E)


@triton.jit(do_not_specialize=["num_chunks"])
def _scan_kernel(counts_ptr, num_chunks, E, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    first = 0
    while first < num_chunks:
        chunk = first + tl.arange(0, BLOCK_C)
        at = counts_ptr + chunk.to(tl.int64)[:, None] * E + e[None, :]
        mask = (chunk < num_chunks)[:, None] & (e < E)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + total[None, :], mask=mask)
        total += tl.sum(count, 0)
        first += BLOCK_C
    tl.store(counts_ptr + num_chunks.to(tl.int64) * E + e, total, mask=e < E)


@triton.jit
def _counts(
    ids_ptr, tokens_ptr, counts_ptr, chunk, num_slots, slots_per_token, num_tokens, slots_per_chunk, num_chunks, E,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Slots of every expert: in all, and in the chunks before this one. No chunks: counted here."""
    if num_chunks == 0:
        total = tl.zeros([BLOCK_E], dtype=tl.int32)
        before = tl.zeros([BLOCK_E], dtype=tl.int32)
        first = chunk * 0
        while first < num_slots:
            slot = first + tl.arange(0, BLOCK_S)
            expert, _ = _load_experts(ids_ptr, tokens_ptr, slot, num_slots, slots_per_token, num_tokens, E)
            found = tl.histogram(expert, BLOCK_E, mask=expert < E)
            total += found
            before += tl.where(first < chunk * slots_per_chunk, found, 0)
            first += BLOCK_S
    else:
        e = tl.arange(0, BLOCK_E)
        has_slots = chunk * slots_per_chunk < num_slots  # small batches get more programs than chunks, for the fills
        total = tl.load(counts_ptr + num_chunks.to(tl.int64) * E + e, mask=e < E, other=0)
        before = tl.load(counts_ptr + chunk * E + e, mask=(e < E) & has_slots, other=0)
    return total, before


@triton.jit
def _segments(total, tile):
    """(first row, real rows, end of the padded segment) of every expert."""
    padded = (total + tile - 1) // tile * tile
    end = tl.cumsum(padded, 0)
    return end - padded, total, end


@triton.jit(
    do_not_specialize=[
        "num_slots", "slots_per_token", "num_tokens", "slots_per_chunk", "num_chunks", "tile", "capacity"
    ]
)  # fmt: skip
def _place_kernel(
    ids_ptr, tokens_ptr, counts_ptr,
    expert_offsets_ptr, gather_ptr, scatter_ptr, row_expert_ptr, reverse_ptr, expert_counts_ptr,
    num_slots, slots_per_token, num_tokens, slots_per_chunk, num_chunks, tile, capacity, E,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    total, before = _counts(
        ids_ptr, tokens_ptr, counts_ptr, chunk, num_slots, slots_per_token, num_tokens, slots_per_chunk, num_chunks, E,
        BLOCK_E, BLOCK_S,
    )  # fmt: skip
    start, total, end = _segments(total, tile)
    num_live = tl.minimum(tl.max(end, 0), capacity)
    if chunk == 0:
        tl.store(expert_offsets_ptr + e, tl.minimum(start, capacity), mask=e < E)
        tl.store(expert_offsets_ptr + E, num_live)
        real = tl.minimum(start + total, capacity) - tl.minimum(start, capacity)
        tl.store(expert_counts_ptr + e, real, mask=e < E)

    next_row = start + before
    position = tl.arange(0, BLOCK_S)
    first = chunk * slots_per_chunk
    last = tl.minimum(first + slots_per_chunk, num_slots)
    while first < last:
        slot = first + position
        expert, token = _load_experts(ids_ptr, tokens_ptr, slot, num_slots, slots_per_token, num_tokens, E)
        routed = expert < E
        earlier = (expert[:, None] == expert[None, :]) & (position[:, None] < position[None, :])
        row = tl.gather(next_row, tl.where(routed, expert, 0), 0) + tl.sum(earlier.to(tl.int32), 0)
        next_row += tl.histogram(expert, BLOCK_E, mask=routed)
        placed = routed & (row < capacity)
        tl.store(reverse_ptr + slot, tl.where(placed, row, -1), mask=slot < num_slots)
        tl.store(gather_ptr + row, token, mask=placed)
        tl.store(scatter_ptr + row, slot.to(tl.int32), mask=placed)
        tl.store(row_expert_ptr + row, expert, mask=placed)
        first += BLOCK_S

    spread = tl.num_programs(0) * BLOCK_S
    unfilled = tl.full([BLOCK_S], -1, dtype=tl.int32)
    # Expert e leaves the rows start + total .. end, fewer than `tile`: all programs share E * (tile - 1) candidates.
    if tile > 1:
        gaps = tile - 1
        start, total, end = _segments(total, tile)
        first = chunk * BLOCK_S
        while first < E * gaps:
            candidate = (first + position).to(tl.int32)
            owner = tl.minimum(candidate // gaps, E - 1)
            row = tl.gather(start + total, owner, 0) + candidate - owner * gaps
            padding = (candidate < E * gaps) & (row < tl.minimum(tl.gather(end, owner, 0), capacity))
            tl.store(gather_ptr + row, unfilled, mask=padding)
            tl.store(scatter_ptr + row, unfilled, mask=padding)
            tl.store(row_expert_ptr + row, owner, mask=padding)
            first += spread

    first = num_live + chunk * BLOCK_S
    while first < capacity:
        row = first + position
        dead = row < capacity
        tl.store(gather_ptr + row, unfilled, mask=dead)
        tl.store(scatter_ptr + row, unfilled, mask=dead)
        tl.store(row_expert_ptr + row, tl.zeros([BLOCK_S], dtype=tl.int32) + E, mask=dead)
        first += spread


def build_plan(slots: Slots) -> PlanTensors:
    """See ``Routing.build_plan``."""
    ids_S, slot_tokens_S, slots_per_token, num_tokens, num_experts, tile, capacity = slots
    num_slots = ids_S.shape[0]
    if num_slots + num_experts * (tile - 1) > MAX_INDEX:
        raise ValueError(
            f"slots plus tile padding must stay below 2^31 rows; got {num_slots} slots, {num_experts} experts, "
            f"tile {tile}. Split the batch."
        )

    def empty(n: int) -> Tensor:
        return ids_S.new_empty(n, dtype=torch.int32)

    block_e = max(32, next_power_of_2(num_experts))
    block_s = BLOCK_S if block_e <= 1024 else 2 * BLOCK_S
    blocks = max(1, cdiv(num_slots, block_s))
    blocks_per_chunk = cdiv(blocks, max(MIN_CHUNKS, MAX_COUNTS // block_e))
    num_chunks = cdiv(blocks, blocks_per_chunk)
    by_row = empty(capacity), empty(capacity), empty(capacity)
    plan = PlanTensors(empty(num_experts + 1), *by_row, empty(num_slots), empty(num_experts))
    counted = num_slots, max(1, slots_per_token), num_tokens, blocks_per_chunk * block_s
    placers = max(num_chunks, min(MIN_PLACERS, cdiv(capacity, block_s)))
    num_chunks = 0 if num_slots <= ALONE else num_chunks
    counts_CE = empty((num_chunks + 1) * num_experts) if num_chunks else plan.counts
    inputs, sizes, num_warps = (ids_S, slot_tokens_S, counts_CE), (block_e, block_s), block_s // 32
    if num_chunks:
        launch(_count_kernel, (num_chunks,), (*inputs, *counted, num_experts), sizes, num_warps=num_warps)
        scanners = cdiv(num_experts, SCAN_E)
        launch(_scan_kernel, (scanners,), (counts_CE, num_chunks, num_experts), (SCAN_C, SCAN_E), num_warps=8)
    args = (*inputs, *plan, *counted, num_chunks, tile, capacity, num_experts)
    launch(_place_kernel, (placers,), args, sizes, num_warps=num_warps)
    return plan
