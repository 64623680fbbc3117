"""Each token's sum of weight * y over its rows on sm_90a, in fp32 and in ascending order of the choices: (T, H) bf16.

Layout (row-major)
    y (P, H): bf16 of the tile kernels. Slots and weights as in route_rows.py. A token without rows gets +0 and nothing
    is read for it. A token of one row, a shared expert's included, is left alone: down_projection_fp8.py writes it.
Blocks
    128 threads take 4096 channels of a token, four times 8 each, then those of another token: a thread waits for four
    loads at once, and for the rows of a token's choices once. 16 blocks a multiprocessor.
Cost
    Bytes: 2 H for each row and token, but for tokens of one row.
"""

from __future__ import annotations

import functools

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.kernels.sm90.gemm_config import multiprocessors
from supersonic_moe.kernels.sm90.route_rows import RowTables

THREADS = 128
CHANNELS = 4 * 8 * THREADS  # of a block
BLOCKS = 16  # of a multiprocessor
SPECS = (KernelSpec("combine_rows", "combine_rows.cu", threads=THREADS, opcodes=("LDG.E.128", "F2FP.BF16"), pdl=True),)


@functools.cache
def _kernel() -> Kernel:
    return kernel_of(SPECS[0])


def combine_rows(
    y_PH: Tensor,
    y_shared_TH: Tensor | None,
    tables: RowTables,
    choices: int,
    out_TH: Tensor,
) -> None:
    """Writes ``out_TH``, but for the tokens of one row.

    Args:
        y_PH: bf16.
        y_shared_TH: (T, H) bf16: beside ``y_PH``, the rows of a shared expert; None if ``y_PH`` has them all.
        choices: C, slots of a token.
    """
    tokens, hidden = out_TH.shape
    parts = -(-hidden // CHANNELS)
    grid = min(tokens * parts, BLOCKS * multiprocessors(out_TH.get_device())), 1, 1
    with on_device(out_TH):
        _kernel().launch(
            grid, y=y_PH, y_shared=y_shared_TH, slot_row=tables.slot_row, weights=tables.weights,
            choices=choices, hidden=hidden, parts=parts, tokens=tokens, out=out_TH,
        )  # fmt: skip
