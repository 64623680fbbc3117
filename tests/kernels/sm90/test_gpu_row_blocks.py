"""Products over row blocks: the bits of whole ones, and rows that are read no earlier than their part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grouped_cases import CUDA, row_experts
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.activation import GateUpLayout, as_activation
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.interface import (
    RANGE_ROWS,
    Arrivals,
    DownBackward,
    Gate,
    Quantized,
    RowBlocks,
    Rows,
    UpProjection,
)
from supersonic_moe.kernels.sm90 import backend
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows

pytestmark = pytest.mark.gpu
COUNTS = [700, 0, 256, 1, 2049, 511]
ROWS, EXPERTS = sum(COUNTS), len(COUNTS)
MAX = 1000
"""Blocks of an expert: no limit."""
CUTS = [[1], [0, 1, 2], [1, 2, 4]]
LAYOUTS = [GateUpLayout.GATE_UP, GateUpLayout.INTERLEAVED]


def order_of(cuts: list[int]) -> list[tuple[int, int]]:
    """Blocks up to each cut, the last ones without a limit; the second part first."""
    pairs = [*zip([0, *cuts], [*cuts, MAX], strict=True)]
    return [*pairs[1:], pairs[0]]


def limits(order: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    begin, end = torch.tensor(order, dtype=torch.int32, device=CUDA).T[:, :, None].expand(2, -1, EXPERTS).contiguous()
    return begin, end


def offsets_and_blocks() -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.tensor(COUNTS)
    block = torch.cat([torch.arange(n) // RANGE_ROWS for n in COUNTS])
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32).to(CUDA), block.to(CUDA)


def late(x: torch.Tensor, token_block: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, Arrivals]:
    """NaN instead of x, but in the first part; others are copied one after the other by another stream, from 0.2 ms on,
    while the product runs and waits.
    """
    order, here = order_of(cuts), torch.full_like(x.view(torch.uint8), 0xFF)
    source = x.view(torch.uint8)
    # From the host: copies within a GPU need multiprocessors, and the product that waits holds them all.
    wholes = [torch.where(((token_block >= b) & (token_block < e))[:, None], source, here) for b, e in order]
    for whole in wholes:  # what is there when a part has come
        here = torch.where(whole != 0xFF, whole, here)
        whole.copy_(here)
    arriving, wholes = wholes[0].clone(), [whole.cpu().pin_memory() for whole in wholes]
    there_P = torch.zeros(len(order), dtype=torch.int32, device=CUDA)
    aside, one = torch.cuda.Stream(), torch.ones(1, dtype=torch.int32, pin_memory=True)
    aside.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(400_000)  # a kernel: only before the product holds all multiprocessors
        for part in range(1, len(order)):
            arriving.copy_(wholes[part], non_blocking=True)
            there_P[part : part + 1].copy_(one, non_blocking=True)

    def whole_wait() -> None:
        raise AssertionError("these kernels look at there")

    keep.append((wholes, one, aside))
    return arriving.view(x.dtype), Arrivals(*limits(order), there_P, whole_wait)


keep: list[object] = []
"""What the other stream reads."""


def same(whole: torch.Tensor, other: torch.Tensor, rows: int = ROWS) -> bool:
    return torch.equal(whole[:rows].contiguous().view(torch.uint8), other[:rows].contiguous().view(torch.uint8))


def index_and_token_block() -> tuple[torch.Tensor, torch.Tensor]:
    _, block = offsets_and_blocks()
    index = torch.randperm(ROWS, device=CUDA).to(torch.int32)
    token_block = torch.empty_like(block)
    token_block[index.long()] = block
    return index, token_block


def parts_of_a_product(product: Callable[..., torch.Tensor], a: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Rows of A are NaN until the part before theirs has been launched."""
    _, block = offsets_and_blocks()
    order, here, source = order_of(cuts), torch.full_like(a.view(torch.uint8), 0xFF), a.view(torch.uint8)

    def come(at: int) -> None:
        if at < len(order):
            rows = (block >= order[at][0]) & (block < order[at][1])
            here[rows] = source[rows]

    come(0)
    begin, end = limits(order)
    parts = [RowBlocks(begin[i], end[i], lambda _, i=i: come(i + 1)) for i in range(len(order))]  # type: ignore[misc]
    return product(here.view(a.dtype), parts)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("hidden", "width"), [(512, 256), (1024, 384)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_parts_have_the_bits_of_the_whole(cuts: list[int], hidden: int, width: int, layout: GateUpLayout) -> None:
    torch.manual_seed(0)
    (offsets, _), (index, token_block) = offsets_and_blocks(), index_and_token_block()
    x, scale = quantize_rows(torch.randn(ROWS, hidden, device=CUDA, dtype=torch.bfloat16))
    w1 = torch.randn(EXPERTS, 2 * width, hidden, device=CUDA, dtype=torch.bfloat16) / hidden**0.5
    w2 = torch.randn(EXPERTS, hidden, width, device=CUDA, dtype=torch.bfloat16)
    (w1_q, _, w1_scale), (w2_q, w2_t, w2_scale) = map(quantize_blocks, (w1, w2))
    gate, experts = Gate(as_activation("swiglu"), layout), row_experts(COUNTS, 0)
    up = UpProjection(Rows(Quantized(x, scale), index), Quantized(w1_q, w1_scale), None, offsets, experts, gate, True)
    z, a = backend.up_projection_fp8(up, Fp8Recipe())
    arriving, arrivals = late(x, token_block, cuts)
    z_parts, a_parts = backend.up_projection_fp8(
        up._replace(x=Rows(Quantized(arriving, scale), index)), Fp8Recipe(), arrivals
    )
    assert all(same(whole, other) for whole, other in zip((*z, *a), (*z_parts, *a_parts), strict=True))
    y = backend.grouped_mm_fp8(Rows(a), Quantized(w2_q, w2_scale), offsets)

    def product(codes: torch.Tensor, parts: list[RowBlocks]) -> torch.Tensor:
        return backend.grouped_mm_fp8(Rows(Quantized(codes, a.scale)), Quantized(w2_q, w2_scale), offsets, parts)

    assert torch.equal(y, parts_of_a_product(product, a.q, cuts))
    if layout is GateUpLayout.INTERLEAVED:
        capacity = ROWS + 128 * EXPERTS
        segments = backend.pad_segments(offsets, index, capacity // 128 * 128)
        down = DownBackward(
            up.x, Quantized(w2_t, w2_scale.mT), z, None, torch.rand(ROWS, device=CUDA), offsets, experts, gate
        )
        whole = backend.down_backward_fp8_quantize(down, segments, True)
        arriving, arrivals = late(x, token_block, cuts)
        down = down._replace(dout=Rows(Quantized(arriving, scale), index))
        other = backend.down_backward_fp8_quantize(down, segments, True, arrivals)
        for one, two in ((whole[0].rows, other[0].rows), (whole[2:], other[2:])):
            assert all(same(t, u) for t, u in zip(one, two, strict=True))
        used = int(segments.offsets[-1])
        for one, two in ((whole[0].columns, other[0].columns), (whole[1], other[1])):
            assert torch.equal(one.q[:, :used].view(torch.uint8), two.q[:, :used].view(torch.uint8))
            assert torch.equal(one.scale[:, : used // 128], two.scale[:, : used // 128])


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("hidden", "width"), [(512, 256), (1024, 384)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_parts_have_the_bits_of_the_whole(cuts: list[int], hidden: int, width: int, layout: GateUpLayout) -> None:
    torch.manual_seed(0)
    (offsets, _), (index, token_block) = offsets_and_blocks(), index_and_token_block()
    x = torch.randn(ROWS, hidden, device=CUDA, dtype=torch.bfloat16)
    w1 = torch.randn(EXPERTS, 2 * width, hidden, device=CUDA, dtype=torch.bfloat16) / hidden**0.5
    w2 = torch.randn(EXPERTS, hidden, width, device=CUDA, dtype=torch.bfloat16)
    gate, experts = Gate(as_activation("swiglu"), layout), row_experts(COUNTS, 0)
    up = UpProjection(Rows(x, index), w1, None, offsets, experts, gate, True)
    z, a = backend.up_projection(up)
    arriving, arrivals = late(x, token_block, cuts)
    z_parts, a_parts = backend.up_projection(up._replace(x=Rows(arriving, index)), arrivals)
    assert same(z, z_parts) and same(a, a_parts)

    def product(rows: torch.Tensor, parts: list[RowBlocks]) -> torch.Tensor:
        return backend.grouped_mm(Rows(rows), w2.mT, offsets, parts)

    assert torch.equal(product(a, []), parts_of_a_product(product, a, cuts))
    down = DownBackward(Rows(x, index), w2, z, None, torch.rand(ROWS, device=CUDA), offsets, experts, gate)
    whole = backend.down_backward(down)
    arriving, arrivals = late(x, token_block, cuts)
    other = backend.down_backward(down._replace(dout=Rows(arriving, index)), arrivals)
    assert all(same(t, u) for t, u in zip(whole, other, strict=True))
