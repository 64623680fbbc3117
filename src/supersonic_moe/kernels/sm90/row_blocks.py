"""Launches of a product in parts, each over some row blocks of every expert (``RowBlocks``, gemm/schedule.cuh)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from supersonic_moe.kernels.interface import RANGE_ROWS, RowBlocks

IN_PARTS = {"ROW_BLOCKS": RANGE_ROWS}
"""Constants of a kernel that is launched in parts. Others cost nothing for it: they walk all tiles."""
WHOLE = (RowBlocks(None, None),)


def launches(parts: Sequence[RowBlocks], possible: bool) -> Sequence[RowBlocks]:
    """What to launch: each part, or the whole where there are none, or no kernel for them is ``possible``."""
    if not parts:
        return WHOLE
    if possible:
        return parts

    def before() -> None:
        for part in parts:
            part.before()

    def after(result: Tensor) -> None:
        for part in parts:
            part.after(result)

    return (RowBlocks(None, None, before, after),)
