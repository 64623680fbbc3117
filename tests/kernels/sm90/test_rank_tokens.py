"""Tokens of several ranks: what the kernels are told, and when other GPUs are told."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import sass
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.nvrtc")

from recorded_launches import recorded_launches  # noqa: F401

from supersonic_moe.kernels.sm90 import exchange_flags, rank_tokens
from supersonic_moe.kernels.sm90.rank_tokens import Layout, RankTokens
from supersonic_moe.quantization.block_format import E4M3

M, H, K, E, T = 24, 256, 3, 8, 5


def test_regions_of_a_bank_lie_apart_and_hold_what_they_should() -> None:
    at = Layout.of(4, M, H, K)
    sizes = [4 * M * H, 4 * 4 * M * 2, 4 * 4 * M * K, 4 * 4 * M * K, 2 * 4 * M * H]
    ends = [end - start for start, end in itertools.pairwise(at)]
    assert all(size <= end < size + 256 for size, end in zip(sizes, ends, strict=True))
    assert all(start % 256 == 0 for start in at)


def test_a_block_tells_only_after_all_have_written() -> None:
    """In the order of the code: what a block has written for the whole system, its arrival, then the flag."""
    (post,) = sass.compiled(rank_tokens.SPECS[0])
    order = re.findall(r"MEMBAR\.SC\.SYS|MEMBAR\.ALL\.SYS|ATOMG\.E\.INC|STG\.E\.64\.STRONG\.SYS", post.listing)
    arrivals = [i for i, opcode in enumerate(order) if opcode == "ATOMG.E.INC"]
    assert len(arrivals) == 2, order
    for arrival, until in zip(arrivals, [*arrivals[1:], len(order)], strict=True):
        assert "MEMBAR" in order[arrival - 1] and "MEMBAR" in order[arrival + 1], order
        assert "STG.E.64.STRONG.SYS" in order[arrival + 1 : until], order


@pytest.fixture(name="tokens")
def tokens_of_a_rank(monkeypatch: pytest.MonkeyPatch, launches: list[Any]) -> RankTokens:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **kwargs: zeros(*size, **kwargs))
    monkeypatch.setattr(rank_tokens, "multiprocessors", lambda device: 131)
    blocks = [torch.zeros(1024, dtype=torch.uint8) for _ in range(4)]
    at = Layout(*(4096 + start for start in Layout.of(4, M, H, K)))
    return RankTokens(exchange_flags.ExchangeFlags(blocks, 1, 2.5), at, M, 7)


@pytest.mark.parametrize("wide", [False, True])
def test_launches_have_what_the_kernels_take(wide: bool, tokens: RankTokens, launches: list[Any]) -> None:
    ids = torch.zeros(T, K, dtype=torch.int64 if wide else torch.int32)
    x, out = torch.zeros(T, H, dtype=torch.bfloat16), torch.zeros(T, H, dtype=torch.bfloat16)
    scale_BT = torch.zeros(2, T)
    arrived, weights = torch.zeros(2, dtype=torch.int32), torch.zeros(T, K)
    rank_tokens.post_tokens(tokens, 0, arrived, x.to(E4M3), scale_BT.t(), ids, weights, E, pow2=False).run()
    rank_tokens.post_tokens(tokens, 0, arrived, x, None, ids, weights, E, pow2=True).run()
    rank_tokens.post_tokens(tokens, 0, arrived, x[:0], None, ids[:0], weights[:0], E, pow2=True).run()
    rank_tokens.sum_parts(tokens, 1, ids, E, out, accumulate=True).run()
    rank_tokens.sum_parts(tokens, 1, ids[:0], E, out[:0], accumulate=False).run()
    (_, grid, codes), (_, _, bf16), (_, empty_grid, _), (_, sum_grid, summed), (_, least, _) = launches
    assert (grid, empty_grid, sum_grid, least) == ((2 + 1, 1, 1), (2, 1, 1), (T, 1, 1), (1, 1, 1))
    assert (codes["x_bf16"], codes["x_scale_row"], codes["x_scale_k"], codes["pow2"]) == (0, 1, T, 0)
    assert (bf16["x_bf16"], bf16["x_scale"], bf16["pow2"], bf16["wide"]) == (1, 0, 1, wide)
    assert (
        codes["phase"] == 0 and codes["choice_blocks"] == 2 and codes["arrived"] == arrived.data_ptr()
    )  # 4·24·3 words, 256 a block
    for name in ("codes", "scales", "ids", "weights"):
        assert codes[f"{name}_at"] == getattr(tokens.at, name)
    same = {"rank": 1, "ranks": 4, "call": 7, "phase": 1, "limit_ns": 2_500_000_000, "experts_here": 2, "accumulate": 1}
    assert {name: summed[name] for name in same} == same
    assert summed["out"] == out.data_ptr() and summed["parts_at"] == tokens.at.parts and summed["wide"] == wide
