"""Device memory of one call, known on the host from shapes alone.

A serving stack allocates once, at its largest batch, and passes the buffer to every call: the size never falls when T
grows. Rows are bounded by T * K because only the device knows how many choices have a local expert. With R = T * K,
F = ``few_rows(H, E_local)``, R' = min(R, 256 * E_local) the rows that the streaming kernel may get, and
P = R' + 7 min(R', E_local) + 24 of them padded:

| region | bytes |
|---|---|
| counters and items | 32 + 4 H / 128 + P / 16, and 20 + 4 ceil(I / 128) for each item |
| tables of experts | 1060 E_local |
| row -> slot, row -> token and weight, slot -> row, slot -> weight | 24 R |
| streaming kernel: x of each row | P H (1 + 4/128) |
| c in fp32, then in e4m3 | 4 P I + P I (1 + 4/128) |
| y in fp32 | 4 P H |
| or tile kernels, where R > F E_local: y, and before it x of each row | 2 R H |
| scales of x; c | R H 4/128 + R I (1 + 4/128) |

An item is up to 128 rows of an expert: E_local + R' / 128 at most. So the streaming kernel needs no more than 0.4 GB at
E_local 32, H 7168, I 2048. The tile kernels get calls of many rows (``streams``) and use the same memory; they need
17 KB a row there, 2 GB for 14107 tokens of 8 choices, because only the device knows that few of these are local.
``max_tokens_per_chunk`` of the operators bounds T. Where I is not a multiple of 128 every row is streamed: R' = R. What
a shared expert needs on the tile kernels (T (3 H + I) bytes, and scales) comes from torch's allocator.
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
STREAMED_ROWS = 256  # of an expert, on average: more are never streamed, wherever they may be
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
    tile_y: int
    tile_x_scale: int
    tile_c: int
    tile_c_scale: int
    end: int


def workspace_bytes(num_tokens: int, top_k: int, hidden: int, intermediate: int, num_local_experts: int) -> int:
    """Bytes of the ``workspace`` of one call of at most ``num_tokens`` tokens (T, or ``max_tokens_per_chunk``).

    Args:
        top_k, num_local_experts: a shared expert counts as one more of both.
        intermediate: I of this rank.
    """
    checks.non_negative("num_tokens", num_tokens)
    checks.positive_sizes(top_k=top_k, hidden=hidden, intermediate=intermediate, num_local_experts=num_local_experts)
    of = regions.__wrapped__ if torch.compiler.is_compiling() else regions  # the compiler warns of caches
    return of(num_tokens, top_k, hidden, intermediate, num_local_experts).end


MOST_FEW_ROWS = 64


def few_rows(hidden: int, num_local: int) -> float:
    """F: rows of an expert, on average, up to which they are streamed rather than multiplied in tiles of 128 rows.
    Streaming costs more for each row (y in fp32), tiles for each expert and for three launches. On an H200, with I from
    128 to 3072, both take the same time at 60 rows (16 experts, H 4096), 38 (32, 3072), 42 (32, 4096), 33 (32, 7168),
    24 (48, 7168), 28 (128, 2048), 20 (128, 4096), 13 (160, 5120), 14 (256, 3072), 7 (256, 7168) and 20 (512, 2048):
    880 / E + 35000 / H, within a fourth. F is three quarters of that, because routing is seldom uniform: with a skewed
    batch of 28 rows (32, 7168) streaming takes 1.17 times as long as tiles, with a uniform one 0.98 times. More rows
    than ``MOST_FEW_ROWS`` were not measured.
    """
    return min(MOST_FEW_ROWS, 26e3 / hidden + 660 / num_local)


def streams(rows: int, expected: float, hidden: int, intermediate: int, num_local: int) -> bool:
    """Whether a call of up to ``rows`` rows, ``expected`` if all experts are chosen alike, is streamed. Sizes alone
    decide, so nothing is launched in vain. More rows than expected are streamed up to ``STREAMED_ROWS`` an expert at
    up to 1.5 times the time of tiles; fewer in tiles cost up to 1.1 times that of streaming.
    """
    if intermediate % BLOCK:
        return True
    return rows <= STREAMED_ROWS * num_local and expected <= few_rows(hidden, num_local) * num_local


PAIRED_ROWS = (104, 480)
"""From how many rows of an expert, on average, and below how many two blocks of 128 of them share what they load of its
weight: with fewer most have one block, with many more products are bound by power (docs/log.md has both sides).
"""


def pairs(expected: float, num_local: int) -> bool:
    """Whether tiles of a call with so many rows, if all experts are chosen alike, are multiplied two at a time."""
    fewest, most = PAIRED_ROWS
    return fewest * num_local <= expected < most * num_local


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
    many = 0 if streams(rows, rows, hidden, intermediate, num_local) else rows
    common = _starts(
        0,
        4 * (4 + blocks(hidden) + items * (1 + blocks(intermediate)) + -(-padded // GATHER_ROWS)),
        4 * (num_local + 1),
        16 * (items + 1),
        4 * COUNTING_BLOCKS * num_local,
        4 * max(rows, padded),
        4 * many,
        8 * many,
        4 * rows,
        4 * rows,
    )
    of_streamed = _starts(
        common[-1],
        padded * hidden,
        4 * padded * blocks(hidden),
        4 * padded * intermediate,
        padded * blocks(intermediate) * BLOCK,
        4 * padded * blocks(intermediate),
        4 * padded * hidden,
    )
    of_tiles = _starts(
        common[-1],
        2 * many * hidden,
        4 * scale_rows(many) * blocks(hidden),
        many * intermediate,
        4 * scale_rows(many) * blocks(intermediate),
    )
    end = max(of_streamed[-1], of_tiles[-1])
    return Regions._make([*common[:-1], *of_streamed[:-1], *of_tiles[:-1], end])


def scale_rows(rows: int) -> int:
    """Rows of scales stored transposed, which start at multiples of 16 bytes (``empty_scales``)."""
    return -(-rows // 4) * 4


def _starts(first: int, *sizes: int) -> list[int]:
    """Where each region starts, and where the last one ends."""
    starts = [first]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return starts


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
