"""Where all tokens go when they go to all ranks (``parallel/departures.py``): its tables, in one launch.

A program has a block of tokens. Choices of experts and tokens for ranks are counted by integer atomics, whose order
cannot show. Bytes: 8 to 16 a choice, 4·R a token and place. Roofline on H200: launch latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import Departures
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, next_power_of_2

BLOCK_T = 64


@triton.jit(do_not_specialize=["num_tokens", "places"])
def _departures_kernel(
    ids_ptr, real_ids_ptr, token_ptr, copy_of_rank_ptr, copy_of_choice_ptr, tokens_ptr, rows_ptr, num_tokens, places,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    at = t[:, None].to(tl.int64) * K + k[None, :]
    given = (t < num_tokens)[:, None] & (k < K)[None, :]
    id = tl.load(ids_ptr + at, mask=given, other=-1)
    real = (id >= 0) & (id < E)
    id = tl.where(real, id, -1).to(tl.int32)
    rank = tl.where(real, id // (E // R), -1)
    tl.store(real_ids_ptr + at, id, mask=given)
    tl.store(copy_of_choice_ptr + at, tl.where(real, t[:, None] + rank * places, -1), mask=given)
    tl.atomic_add(rows_ptr + id, 1, mask=real, sem="relaxed")
    for r in range(R):
        needed = tl.max((rank == r).to(tl.int32), 1)
        copy = r * places + t
        tl.store(copy_of_rank_ptr + t * R + r, tl.where(needed > 0, copy, -1), mask=t < num_tokens)
        tl.store(token_ptr + copy, tl.where(t < num_tokens, t, -1), mask=t < places)
        tl.atomic_add(tokens_ptr + r, tl.sum(needed, 0), sem="relaxed")


def departures_everywhere(ids_TK: Tensor, num_experts: int, ranks: int, places: int) -> Departures:
    tokens, k = ids_TK.shape
    ids_TK = ids_TK.contiguous()
    real_ids, copy_TK = (torch.empty_like(ids_TK, dtype=torch.int32) for _ in range(2))
    token_M, copy_TR = real_ids.new_empty(ranks * places), real_ids.new_empty(tokens, ranks)
    counts = real_ids.new_zeros(ranks + num_experts)
    tokens_R, rows_E = counts[:ranks], counts[ranks:]
    launch(
        _departures_kernel,
        (cdiv(places, BLOCK_T),),
        (ids_TK, real_ids, token_M, copy_TR, copy_TK, tokens_R, rows_E, tokens, places),
        (num_experts, k, ranks, BLOCK_T, next_power_of_2(k)),
    )
    return Departures(real_ids, token_M, copy_TR, copy_TK, tokens_R, rows_E)
