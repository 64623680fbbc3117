"""Device memory of one call, known on the host from shapes alone.

A serving stack allocates once, at its largest batch, and passes the buffer to every call: the size never falls when T
grows. Rows are bounded by T * K because only the device knows how many choices have a local expert. With R = T * K,
R' = min(R, 256 * E_local) the rows of experts that the streaming kernel takes, and P = R' + 7 min(R', E_local) + 24 of
them padded:

| region | bytes |
|---|---|
| counters and items | 32 + 4 H / 128 + P / 16, and 20 + 4 ceil(I / 128) for each item |
| tables of experts | 1060 E_local |
| row -> slot, row -> token and weight, slot -> row, slot -> weight | 24 R |
| x of each streamed row | P H (1 + 4/128) |
| c in fp32, then in e4m3 | 4 P I + P I (1 + 4/128) |
| y of each streamed row in fp32 | 4 P H |
| x in e4m3, where R > R' | T H (1 + 4/128) |

An item is up to 128 rows of an expert: E_local + R' / 128 at most. So no more than 0.4 GB at E_local 32, H 7168,
I 2048, and T H beyond T = 32 E_local. Where I is not a multiple of 128 every row is streamed: R' = R;
``max_tokens_per_chunk`` of the operators bounds T. The tile kernels, which take over where rows are many, get their c,
y (R I and 2 R H bytes; x of each row lies in y before) and scales (R (I + H) / 32) from torch's allocator.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.quantization.block_format import BLOCK, blocks

ALIGNMENT = 256  # of the buffer and of each region: TMA wants 16 bytes, a DRAM burst of L2 is at most 256
ITEM_ROWS = 128  # kernels/sm90/route_rows.py
SURE_ROWS = 128  # of an expert, on average: as many are always streamed
STREAMED_ROWS = 256  # of an expert, on average: more are never streamed
ROW_GROUP, COLUMNS_BEHIND, GATHER_ROWS = 8, 24, 64  # kernels/sm90/route_rows.py, stream_experts.py
COUNTING_BLOCKS = 264  # of the routing kernel for many tokens


class Regions(NamedTuple):
    """Where each region starts, in bytes from the start of a workspace; ``kernels/sm90`` says what they hold."""

    counters: int
    offsets: int
    items: int
    counts: int
    row_slot: int
    row_token: int
    row_out: int
    slot_row: int
    weights: int
    x_rows: int
    x_rows_scale: int
    c: int
    c_codes: int
    c_scale: int
    y: int
    x: int
    x_scale: int
    end: int


def workspace_bytes(num_tokens: int, top_k: int, hidden: int, intermediate: int, num_local_experts: int) -> int:
    """Bytes of the ``workspace`` of one call of at most ``num_tokens`` tokens (T, or ``max_tokens_per_chunk``).

    Args:
        top_k, num_local_experts: a shared expert counts as one more of both.
        intermediate: I of this rank.
    """
    checks.non_negative("num_tokens", num_tokens)
    checks.positive_sizes(top_k=top_k, hidden=hidden, intermediate=intermediate, num_local_experts=num_local_experts)
    return regions(num_tokens, top_k, hidden, intermediate, num_local_experts).end


def streamed_rows(rows: int, intermediate: int, num_local: int) -> int:
    """R': as many of ``rows`` as the streaming kernel may get."""
    return rows if intermediate % BLOCK else min(rows, STREAMED_ROWS * num_local)


def padding(rows: int, num_local: int) -> int:
    """P: rows as the streaming kernel numbers them, and those that it reads behind the last."""
    return (rows + (ROW_GROUP - 1) * min(rows, num_local)) // ROW_GROUP * ROW_GROUP + COLUMNS_BEHIND


@functools.lru_cache(maxsize=256)
def regions(num_tokens: int, top_k: int, hidden: int, intermediate: int, num_local: int) -> Regions:
    rows = num_tokens * top_k
    streamed = streamed_rows(rows, intermediate, num_local)
    items = num_local + streamed // ITEM_ROWS
    padded = padding(streamed, num_local)
    token_major = num_tokens if rows > ITEM_ROWS * num_local else 0
    sizes = (
        4 * (4 + blocks(hidden) + items * (1 + blocks(intermediate)) + -(-padded // GATHER_ROWS)),
        4 * (num_local + 1),
        16 * (items + 1),
        4 * COUNTING_BLOCKS * num_local,
        4 * max(rows, padded),
        4 * rows if token_major else 0,
        8 * rows if token_major else 0,
        4 * rows,
        4 * rows,
        padded * hidden,
        4 * padded * blocks(hidden),
        4 * padded * intermediate,
        padded * blocks(intermediate) * BLOCK,
        4 * padded * blocks(intermediate),
        4 * padded * hidden,
        token_major * hidden,
        4 * token_major * blocks(hidden),
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
