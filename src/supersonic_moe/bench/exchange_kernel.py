"""Bytes copied by a few blocks that stay on the GPU: what pushes to a peer, or pulls, beside products.

    copy_bytes_by(to, source, blocks, times)      ``times`` over

A tile of 64 KiB is in flight on each multiprocessor: 8 accesses of 16 bytes for each of 512 threads. Bytes: each once
read and once written, over NVLink where one side is the memory of a peer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.triton.launch import launch

TILE_WORDS = 16 * 1024
TILE_BYTES = 4 * TILE_WORDS


@triton.jit(do_not_specialize=["tiles", "times"])
def _copy_kernel(to_ptr, source_ptr, tiles, times, BLOCK: tl.constexpr):
    while times > 0:
        tile = tl.program_id(0).to(tl.int64)
        while tile < tiles:
            at = tile * BLOCK + tl.arange(0, BLOCK)
            tl.store(to_ptr + at, tl.load(source_ptr + at))
            tile += tl.num_programs(0)
        times -= 1


def copy_bytes_by(to: Tensor, source: Tensor, blocks: int, times: int = 1) -> None:
    """Both uint8, contiguous, of the same whole number of tiles."""
    tiles, rest = divmod(source.numel(), TILE_BYTES)
    if rest or to.numel() != source.numel():
        raise ValueError(
            f"both sides must have the same whole number of {TILE_BYTES} bytes; got {source.numel()} and {to.numel()}."
        )
    words = [t.view(torch.int32) for t in (to, source)]
    launch(_copy_kernel, (min(blocks, tiles),), (*words, tiles, times), (TILE_WORDS,), num_warps=16)
