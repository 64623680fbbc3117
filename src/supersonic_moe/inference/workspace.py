"""Device memory of one call, known on the host from shapes alone.

A serving stack allocates once, at its largest batch, and passes the buffer to every call: the size never falls when T
grows. Rows are bounded by T * K because only the device knows how many choices have a local expert. With R = T * K and
R' = min(R, 128 * E_local), the rows of experts that the streaming kernel takes:

| region | bytes |
|---|---|
| counters | 4 for each local expert and block of 128 channels, 16 for each local expert, 1024 more |
| row -> slot, slot -> row, slot -> weight | 12 R |
| x codes and scales, where x comes in bf16 | T H (1 + 4/128) |
| c in fp32 before it is quantised | 4 R' I |
| c codes and scales | R I + 4 R ceil(I / 128) |
| y of each row: fp32 where streamed, else bf16 | the larger of 4 R' H and 2 R H |

The last region is most of it: 1.6 GB at T 14107, K 8, H 7168. ``max_tokens_per_chunk`` of the operators bounds T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.quantization.block_format import blocks

ALIGNMENT = 256  # of the buffer and of each region: TMA wants 16 bytes, a DRAM burst of L2 is at most 256
STREAMED_ROWS = 128  # of an expert: beyond, the tile kernels take it


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
    rows = num_tokens * top_k
    streamed = min(rows, STREAMED_ROWS * num_local_experts)
    regions = (
        num_local_experts * (16 + 4 * blocks(intermediate)) + 1024,
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
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in regions)


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
