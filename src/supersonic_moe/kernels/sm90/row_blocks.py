"""Products over row blocks of every expert (``RowBlocks`` of gemm/schedule.cuh): in one launch whose rows arrive while
it runs, or in a launch for each part, whose results leave while the next one runs.

Others cost nothing for it: they walk all tiles, and read none of these arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from supersonic_moe.kernels.interface import RANGE_ROWS, Arrivals, RowBlocks

IN_PARTS = {"ROW_BLOCKS": RANGE_ROWS}
"""Constants of a kernel that walks row blocks."""
ALL_TILES: dict[str, Any] = {"begin_block": None, "end_block": None, "arrived": None, "parts": 1}


def arrivals(arriving: Arrivals | None, possible: bool) -> dict[str, Any]:
    """Arguments of a launch whose rows arrive. Where no kernel for it is ``possible``, its stream waits for them, and
    all tiles are walked.
    """
    if arriving is None:
        return ALL_TILES
    begin_PE, end_PE, there_P, wait = arriving
    if there_P is None or not possible:
        wait()
    if not possible:
        return ALL_TILES
    return {"begin_block": begin_PE, "end_block": end_PE, "arrived": there_P, "parts": begin_PE.shape[0]}


Walk = tuple[dict[str, Any], Callable[[Tensor], None]]
"""Arguments of a launch, and what is called with the result once it is launched."""


def _nothing(_: Tensor) -> None: ...


WHOLE: Sequence[Walk] = ((ALL_TILES, _nothing),)


def walks(parts: Sequence[RowBlocks], possible: bool) -> Sequence[Walk]:
    """What to launch: each part, or the whole where there are none, or no kernel for them is ``possible``."""
    if not parts:
        return WHOLE
    if possible:
        return [({**ALL_TILES, "begin_block": part.begin_E, "end_block": part.end_E}, part.after) for part in parts]

    def after(result: Tensor) -> None:
        for part in parts:
            part.after(result)

    return ((ALL_TILES, after),)
