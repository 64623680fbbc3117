"""Tables of tokens that go to all ranks, of both backends against a loop over choices."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels import registry


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "places", "ranks", "experts", "k"), [(0, 3, 2, 4, 1), (5, 9, 4, 12, 3), (130, 130, 2, 6, 5)]
)
def test_all_tokens_to_all_ranks(
    tokens: int, places: int, ranks: int, experts: int, k: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, k), dtype=dtype)
    if dtype is torch.int64 and tokens:
        ids[0, 0] = 2**40
    want_ids, copy_TR, copy_TK = ids.tolist(), [[-1] * ranks for _ in range(tokens)], [[-1] * k for _ in range(tokens)]
    tokens_R, rows_E = [0] * ranks, [0] * experts
    for t in range(tokens):
        for j, expert in enumerate(ids[t].tolist()):
            if not 0 <= expert < experts:
                want_ids[t][j] = -1
                continue
            rank = expert // (experts // ranks)
            rows_E[expert] += 1
            tokens_R[rank] += copy_TR[t][rank] < 0
            copy_TR[t][rank] = copy_TK[t][j] = rank * places + t
    token_M = [*range(tokens), *[-1] * (places - tokens)] * ranks
    found = registry.kernels(backend).routing.departures_everywhere(ids.to(device), experts, ranks, places)
    assert all(t.dtype is torch.int32 for t in found)
    assert [t.tolist() for t in found] == [want_ids, token_M, copy_TR, copy_TK, tokens_R, rows_E]
