"""Zeros in the rows of no expert: y[row] = 0 for the rows at and past offsets[E], in place.

Where the dead rows start is known on the device only, so a fixed number of programs share them, however many there are;
without any, each reads one offset and leaves.

Layout: y (P, N) contiguous. Bytes: N for each dead row, nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.triton.launch import launch

PROGRAMS = 264  # two for each SM of an H200: enough stores in flight to fill its memory system
BLOCK = 4096


@triton.jit(do_not_specialize=["num_rows"])
def _zero_dead_rows_kernel(y_ptr, expert_offsets_ptr, num_rows, E, N: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.load(expert_offsets_ptr + E).to(tl.int64) * N
    end = num_rows.to(tl.int64) * N
    at = first + tl.program_id(0).to(tl.int64) * BLOCK
    while at < end:
        element = at + tl.arange(0, BLOCK)
        tl.store(y_ptr + element, tl.zeros([BLOCK], dtype=y_ptr.dtype.element_ty), mask=element < end)
        at += tl.num_programs(0) * BLOCK


def zero_dead_rows(y_PN: Tensor, expert_offsets: Tensor) -> None:
    """In place."""
    num_rows, columns = y_PN.shape
    if y_PN.numel():
        args = (y_PN, expert_offsets, num_rows, expert_offsets.shape[0] - 1)
        launch(_zero_dead_rows_kernel, (PROGRAMS,), args, (columns, BLOCK))
