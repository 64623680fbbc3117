"""Rows that some rank needs, to where it reads them: both backends against a loop over tokens and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Banks

K, HERE, SPARE = 3, 2, 64
CASES = [
    (2, 5, 5, 0, 5, 36, torch.int32),
    (4, 9, 3, 3, 3, 260, torch.int32),
    (3, 300, 290, 0, 300, 6, torch.int32),
    (8, 2, 0, 0, 2, 5, torch.int16),
    (2, 70, 33, 64, 6, 2100, torch.int32),
    (2, 40, 40, 0, 40, 7, torch.uint8),
]


def numbers(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randint(0, 200, (rows, columns), dtype=dtype).to(device)


def of_ranks(ranks: int, size: int, device: torch.device) -> list[Tensor]:
    """Banks that hold 0xFF, with bytes behind them that belong to nobody."""
    return [torch.full((size + SPARE,), 0xFF, dtype=torch.uint8, device=device) for _ in range(ranks)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("ranks", "places", "tokens", "first", "count", "columns", "dtype"), CASES)
def test_rows_that_are_needed_arrive_and_nothing_else_is_touched(
    ranks: int, places: int, tokens: int, first: int, count: int, columns: int, dtype: torch.dtype, backend: str,
    device: torch.device,
) -> None:  # fmt: skip
    """``tokens`` of this rank are in this exchange, whose places are ``count`` of a rank, from ``first`` on."""
    kernels = registry.kernels(backend).routing
    size, rank = ranks * count * columns * dtype.itemsize, ranks - 1
    size = -(-size // 16) * 16
    tokens = min(tokens, count)

    def banks() -> tuple[list[Tensor], Any]:
        of = of_ranks(ranks, size, device)
        table = torch.tensor([bank.data_ptr() for bank in of], dtype=torch.int64, device=device)
        return of, Banks([bank[:size] for bank in of], table, rank, places, first, count)

    def rows_of(bank: Tensor) -> Tensor:
        return bank[: ranks * count * columns * dtype.itemsize].view(dtype).view(ranks, count, columns)

    def same(found: list[Tensor], want: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    rows, copies = numbers(tokens, columns, dtype, device), torch.randint(-1, 2, (tokens, ranks), dtype=torch.int32)
    own, want_own = (torch.full((tokens, columns), 7, dtype=dtype, device=device) for _ in range(2))
    (found, to), want = banks(), of_ranks(ranks, size, device)
    kernels.push_rows(rows, copies.to(device), own, to)
    for t in range(tokens):
        for r in range(ranks):
            if copies[t, r] >= 0:
                (want_own if r == rank else rows_of(want[r])[rank])[t] = rows[t]
    assert same([*found, own], [*want, want_own])

    ids = torch.randint(-1, 2 * HERE, (ranks * places, K), dtype=torch.int32)
    here = ((ids >= 0) & (ids < HERE)).any(1).view(ranks, places)
    needed = kernels.needed_rows(ids.to(device), HERE, ranks)
    named = needed[1 : 1 + int(needed[0])].cpu()
    assert needed.shape == (1 + ranks * places,) and needed.dtype is torch.int32
    assert torch.equal(named.sort()[0], here.view(-1).nonzero()[:, 0].int())
    here = here[:, first : first + count]
    parts = numbers(ranks * places, columns, dtype, device)
    (found, to), want = banks(), of_ranks(ranks, size, device)
    kernels.push_back(parts, needed, to)
    for r in range(ranks):
        for t in range(count):
            if here[r, t]:
                rows_of(want[r])[rank, t] = parts[r * places + first + t]
    assert same(found, want)

    found, of = banks()
    found[rank].copy_(torch.randint(0, 200, found[rank].shape, dtype=torch.uint8))
    out, want_out = (torch.full((ranks * places, columns), 7, dtype=dtype, device=device) for _ in range(2))
    kernels.take_rows(out, needed, of)
    for r in range(ranks):
        for t in range(count):
            if here[r, t] and r != rank:
                want_out[r * places + first + t] = rows_of(found[rank])[r, t]
    assert torch.equal(out, want_out)
