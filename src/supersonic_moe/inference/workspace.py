"""Device memory of one call, known on the host from shapes alone.

A serving stack allocates once, at its largest batch, and passes the buffer to every call: the size never falls when T
grows. Rows are bounded by T * K because only the device knows how many choices have a local expert. With R = T * K and
R' = min(R, 128 * E_local), the rows of experts that the streaming kernel takes:

| region | bytes |
|---|---|
| counters and items | 20 + 4 ceil(I / 128) for each item |
| tables of experts | 536 E_local |
| row -> slot, slot -> row, slot -> weight | 12 R |
| x codes and scales, where x comes in bf16 | T H (1 + 4/128) |
| c in fp32 before it is quantised | 4 R' I |
| c codes and scales | R I + 4 R ceil(I / 128) |
| y of each row: fp32 where streamed, else bf16 | the larger of 4 R' H and 2 R H |

An item is up to 128 rows of an expert: E_local + R' / 128 at most. The last region is most of it: 1.6 GB at T 14107, K
8, H 7168. ``max_tokens_per_chunk`` of the operators bounds T. Where I is not a multiple of 128 every row is streamed:
R' = R. The tile kernels, which take over where rows are many, do not use their part of it yet: their c and y (the R
terms of the last two regions) come from torch's allocator.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.quantization.block_format import BLOCK, blocks

ALIGNMENT = 256  # of the buffer and of each region: TMA wants 16 bytes, a DRAM burst of L2 is at most 256
STREAMED_ROWS = 128  # of an expert, on average: beyond, the tile kernels take them
COUNTING_BLOCKS = 132  # of the routing kernel for many tokens


class Regions(NamedTuple):
    """Where each region starts, in bytes from the start of a workspace; ``kernels/sm90`` says what they hold."""

    counters: int
    offsets: int
    tile_offsets: int
    items: int
    counts: int
    row_slot: int
    slot_row: int
    weights: int
    x: int
    x_scale: int
    c: int
    codes: int
    c_scale: int
    y: int
    end: int


def workspace_bytes(num_tokens: int, top_k: int, hidden: int, intermediate: int, num_local_experts: int) -> int:
    """Bytes of the ``workspace`` of one call of at most ``num_tokens`` tokens (T, or ``max_tokens_per_chunk``).

    Args:
        top_k, num_local_experts: a shared expert counts as one more of both.
        intermediate: I of this rank.
    """
    checks.non_negative("num_tokens", num_tokens)
    for name, value in (
        ("top_k", top_k),
        ("hidden", hidden),
        ("intermediate", intermediate),
        ("num_local_experts", num_local_experts),
    ):
        checks.positive(name, value)
    return regions(num_tokens, top_k, hidden, intermediate, num_local_experts).end


def streamed_rows(rows: int, intermediate: int, num_local: int) -> int:
    """R': as many of ``rows`` as the streaming kernel may get."""
    return rows if intermediate % BLOCK else min(rows, STREAMED_ROWS * num_local)


@functools.lru_cache(maxsize=256)
def regions(num_tokens: int, top_k: int, hidden: int, intermediate: int, num_local: int) -> Regions:
    rows = num_tokens * top_k
    streamed = streamed_rows(rows, intermediate, num_local)
    items = num_local + streamed // STREAMED_ROWS
    sizes = (
        4 * (4 + items * (1 + blocks(intermediate))),
        4 * (num_local + 1),
        4 * (num_local + 1),
        16 * (items + 1),
        4 * COUNTING_BLOCKS * num_local,
        4 * rows,
        4 * rows,
        4 * rows,
        num_tokens * hidden,
        4 * num_tokens * blocks(hidden),
        4 * streamed * intermediate,
        rows * intermediate,
        4 * rows * blocks(intermediate),
        max(4 * streamed, 2 * rows) * hidden,
    )
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return Regions(*starts)


def check_workspace(workspace: Tensor, x: Tensor, needed: int) -> None:
    """``workspace`` can hold ``needed`` bytes for a call on ``x``."""
    checks.tensor("workspace", workspace, 1, "(bytes,)")
    if workspace.dtype is not torch.uint8:
        raise TypeError(
            f"workspace must be uint8; got {checks.describe(workspace)}. Use torch.empty(n, dtype=torch.uint8)."
        )
    checks.same_device("workspace", workspace, "x", x)
    if not workspace.is_contiguous():
        raise ValueError(f"workspace must be contiguous; got strides {workspace.stride()}. Pass a whole buffer.")
    if workspace.numel() < needed:
        raise ValueError(
            f"workspace must hold {needed} bytes for this call; got {workspace.numel()}. Allocate "
            "workspace_bytes(largest T, ...), or set max_tokens_per_chunk to the T that it was allocated for."
        )
