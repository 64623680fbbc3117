"""Problems for the grouped GEMMs on a GPU: rows of experts, an index into fewer rows, and what must not be read."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

CUDA = torch.device("cuda")
GROUPS = {
    "ragged": [0, 300, 1, 0, 255, 513, 128, 64, 0],
    "tiny": [1, 2, 3, 0, 5, 7, 8, 9],
    "one hot": [0, 0, 1999, 0],
    "single": [1],
    "even": [256, 256, 256, 256],
    "many": [17] * 200,
}


def case(counts: list[int], dead: int, *widths: int, positive: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Offsets and one operand of each width; dead rows at the end are NaN and must not be read into a result."""
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=CUDA)
    rows = sum(counts)
    operands = []
    for width in widths:
        x = torch.randn(rows + dead, width, device=CUDA, dtype=torch.bfloat16)
        x = x.abs() if positive else x
        x[rows:] = float("nan")
        operands.append(x)
    return offsets, operands


def indexed(counts: list[int], dead: int, width: int, positive: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, a matrix of fewer rows than the problem, and an index into it: repeats, a few zero rows (-1), and dead
    rows at the end that name a row of NaN.
    """
    offsets, (x,) = case([max(1, sum(counts) // 3)], 1, width, positive=positive)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=CUDA)
    rows, tokens = sum(counts), x.shape[0] - 1
    index = torch.randint(0, tokens, (rows + dead,), device=CUDA, dtype=torch.int32)
    index[torch.rand(rows + dead, device=CUDA) < 0.05] = -1
    index[rows:] = tokens
    return offsets, x, index


def rows_case(
    counts: list[int], dead: int, width: int, gathered: bool, positive: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``indexed`` gives; or rows as they lie, without an index."""
    if gathered:
        return indexed(counts, dead, width, positive=positive)
    offsets, (x,) = case(counts, dead, width, positive=positive)
    return offsets, x, None


def row_experts(counts: list[int], dead: int) -> Tensor:
    """(P,) row -> expert; E for dead rows."""
    repeats = torch.tensor([*counts, dead], device=CUDA)
    return torch.repeat_interleave(torch.arange(len(counts) + 1, device=CUDA), repeats).int()


def picked(x: Tensor, index: Tensor | None) -> Tensor:
    """fp64 rows that the index names, or all as they lie."""
    if index is None:
        return x.double()
    return torch.where(index[:, None] >= 0, x[index.clamp(min=0).long()], 0).double()


def segments(offsets: Tensor) -> list[tuple[int, slice]]:
    return [(e, slice(a, b)) for e, (a, b) in enumerate(itertools.pairwise(offsets.tolist()))]
