"""FP8 products launched in parts: the bits of one launch, and rows that are read no earlier than their part."""

from __future__ import annotations

import pytest
import torch
from grouped_cases import CUDA, row_experts
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.activation import GateUpLayout, as_activation
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.interface import RANGE_ROWS, Gate, Quantized, RowBlocks, Rows, UpProjection
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows

pytestmark = pytest.mark.gpu
COUNTS = [700, 0, 256, 1, 2049, 511]
NAN = 0x7F


def parts(cuts: list[int], before: object) -> list[RowBlocks]:
    """Blocks up to each cut, the last one without a limit; the second part first."""
    starts = [0, *cuts]
    ends = [*cuts, 1000]
    pairs = [*zip(starts, ends, strict=True)]
    order = [*pairs[1:], pairs[0]]
    blocks = [[torch.full((len(COUNTS),), at, dtype=torch.int32, device=CUDA) for at in pair] for pair in order]
    return [
        RowBlocks(begin, end, lambda pair=pair: before(*pair))  # type: ignore[operator,misc]
        for (begin, end), pair in zip(blocks, order, strict=True)
    ]


def offsets_and_blocks() -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.tensor(COUNTS)
    block = torch.cat([torch.arange(n) // RANGE_ROWS for n in COUNTS])
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32).to(CUDA), block.to(CUDA)


def arriving(q: torch.Tensor, token_block: torch.Tensor) -> tuple[torch.Tensor, object]:
    """NaN instead of q, until a part needs its rows."""
    late = torch.full_like(q.view(torch.uint8), NAN)

    def come(begin: int, end: int) -> None:
        here = (token_block >= begin) & (token_block < end)
        late[here] = q.view(torch.uint8)[here]

    return late.view(q.dtype), come


@pytest.mark.parametrize("cuts", [[1], [0, 1, 2], [1, 2, 4]])
@pytest.mark.parametrize(("hidden", "width"), [(512, 256), (1024, 384)])
@pytest.mark.parametrize("layout", [GateUpLayout.GATE_UP, GateUpLayout.INTERLEAVED])
def test_parts_have_the_bits_of_the_whole(cuts: list[int], hidden: int, width: int, layout: GateUpLayout) -> None:
    torch.manual_seed(0)
    (offsets, block), rows, experts = offsets_and_blocks(), sum(COUNTS), len(COUNTS)
    index = torch.randperm(rows, device=CUDA).to(torch.int32)
    x, scale = quantize_rows(torch.randn(rows, hidden, device=CUDA, dtype=torch.bfloat16))
    w1 = torch.randn(experts, 2 * width, hidden, device=CUDA, dtype=torch.bfloat16) / hidden**0.5
    w2 = torch.randn(experts, hidden, width, device=CUDA, dtype=torch.bfloat16)
    (w1_q, _, w1_scale), (w2_q, _, w2_scale) = map(quantize_blocks, (w1, w2))
    gate = Gate(as_activation("swiglu"), layout)
    step = UpProjection(
        Rows(Quantized(x, scale), index), Quantized(w1_q, w1_scale), None, offsets, row_experts(COUNTS, 0), gate, True
    )
    z, a = up_projection_fp8(step, Fp8Recipe())
    token_block = torch.empty_like(block)
    token_block[index.long()] = block
    late, come = arriving(x, token_block)
    in_parts = step._replace(x=Rows(Quantized(late, scale), index))
    z_parts, a_parts = up_projection_fp8(in_parts, Fp8Recipe(), parts(cuts, come))
    for whole, other in zip((*z, *a), (*z_parts, *a_parts), strict=True):
        assert torch.equal(whole[:rows].contiguous().view(torch.uint8), other[:rows].contiguous().view(torch.uint8))
    y = grouped_mm_fp8(Rows(a), Quantized(w2_q, w2_scale), offsets)
    late, come = arriving(a.q, block)
    y_parts = grouped_mm_fp8(Rows(Quantized(late, a.scale)), Quantized(w2_q, w2_scale), offsets, parts(cuts, come))
    assert torch.equal(y, y_parts)
