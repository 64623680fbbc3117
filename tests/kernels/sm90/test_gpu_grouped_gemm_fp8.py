"""The FP8 grouped GEMM against the fp64 product of the dequantized operands."""

from __future__ import annotations

import oracle
import pytest
import torch
from grouped_cases import CUDA, GROUPS, case, picked, rows_case, segments
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels.interface import Quantized, Rows
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows

pytestmark = pytest.mark.gpu

# Depths below, at and between whole laps of three stages of 128; columns that fill tiles of 256 and that do not.
SIZES = [(64, 256), (128, 8), (72, 264), (384, 512), (512, 520), (2880, 520), (1000, 1000)]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_rows(counts: list[int], depth: int, columns: int, gathered: bool, transposed: bool, positive: bool) -> None:
    """Rows as they lie or through an index, weights as they lie or transposed with transposed scales."""
    offsets, a, index = rows_case(counts, 5, depth, gathered, positive)
    a[:, : depth // 2] *= 100  # a scale in the wrong K block shows
    w = torch.randn(len(counts), columns, depth, device=CUDA, dtype=torch.bfloat16)
    w = w.abs() if positive else w
    if transposed:
        _, b, scale = quantize_blocks(w.mT.contiguous())
        b_scale = scale.mT
    else:
        b, _, b_scale = quantize_blocks(w)
    a_rows = Rows(quantize_rows(a, tma=not gathered), index)
    rows = sum(counts)
    # Tensor cores cut each e4m3 product at about 2^-13 of the running sum: sums of positive products come out low.
    tolerance = 5e-3 if positive else 3e-3
    operand = picked(dequantize(*a_rows.x), index)[:rows]
    got = grouped_mm_fp8(a_rows, Quantized(b, b_scale), offsets)
    for e, part in segments(offsets):
        if part.start < part.stop:
            want = operand[part] @ dequantize(b[e], b_scale[e]).T  # one expert at a time: all are 2.4 GB
            assert oracle.rel_fro(got[part], want) < tolerance, f"expert {e}"
    assert torch.equal(got[:rows], grouped_mm_fp8(a_rows, Quantized(b, b_scale), offsets)[:rows])


def test_scales_in_the_wrong_order_are_refused() -> None:
    offsets, (a,) = case([300], 0, 256)
    b, _, b_scale = quantize_blocks(torch.randn(1, 256, 256, device=CUDA, dtype=torch.bfloat16))
    index = torch.arange(300, device=CUDA, dtype=torch.int32)
    for gather_index, tma in ((None, False), (index, True)):
        a_rows = Rows(quantize_rows(a, tma=tma), gather_index)
        with pytest.raises(ValueError, match=f"tma={not tma}"):
            grouped_mm_fp8(a_rows, Quantized(b, b_scale), offsets)
