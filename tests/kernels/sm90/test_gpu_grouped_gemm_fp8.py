"""The FP8 grouped GEMM against the fp64 product of the dequantized operands."""

from __future__ import annotations

import oracle
import pytest
import torch
from grouped_cases import CUDA, GROUPS, case, picked, rows_case, segments
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels.interface import Quantized, Rows
from supersonic_moe.kernels.reference import quantize_saved
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.sm90.grouped_gemm_fp8_int8 import grouped_mm_fp8_int8
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows
from supersonic_moe.quantization.block_format import saved_steps

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


@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_int8_rows_of_exact_sums(counts: list[int], depth: int, columns: int) -> None:
    """Sums of small whole numbers are exact: every code and exponent is the reference's; no other row is written."""
    offsets, (a,) = case(counts, 5, depth)
    rows = sum(counts)
    a[:rows] = torch.randint(-3, 4, (rows, depth), device=CUDA) * 4.0 ** torch.arange(rows, device=CUDA)[:, None].fmod(
        9
    )
    a[:rows:7] = 0
    w = torch.randint(-3, 4, (len(counts), columns, depth), device=CUDA, dtype=torch.int8).bfloat16()
    b, _, b_scale = quantize_blocks(w, pow2=True)
    a_rows = quantize_rows(a, pow2=True, tma=True)
    q, words = grouped_mm_fp8_int8(a_rows, Quantized(b, b_scale), offsets)
    assert q.shape == (rows + 5, columns) and words.shape == (rows + 5, -(-columns // 128))
    operand = picked(dequantize(*a_rows), None)[:rows]
    for e, part in segments(offsets):
        want_q, want_words = quantize_saved((operand[part] @ dequantize(b[e], b_scale[e]).T).float())
        assert torch.equal(q[part], want_q) and torch.equal(words[part], want_words), f"expert {e}"
    assert (q[rows:] == 127).all() and (words[rows:] == torch.iinfo(torch.int32).max).all()  # as they were allocated


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_int8_rows_are_those_in_bf16(counts: list[int], depth: int, columns: int, transposed: bool) -> None:
    """Each number within half a step, and a rounding to bf16, of what the product in bf16 has."""
    offsets, (a,) = case(counts, 5, depth)
    a[:, : depth // 2] *= 100
    w = torch.randn(len(counts), columns, depth, device=CUDA, dtype=torch.bfloat16)
    _, b, scale = quantize_blocks(w.mT.contiguous())
    weight = Quantized(b, scale.mT) if transposed else Quantized(*quantize_blocks(w)[::2])
    a_rows, rows = quantize_rows(a, tma=True), sum(counts)
    want = grouped_mm_fp8(Rows(a_rows), weight, offsets)[:rows].double()
    q, words = (t[:rows] for t in grouped_mm_fp8_int8(a_rows, weight, offsets))
    steps = saved_steps(words, columns).double()
    assert ((q * steps - want).abs() <= 0.5 * steps + 2**-8 * want.abs()).all()
    ratio = steps / saved_steps(
        quantize_saved(want.float())[1], columns
    )  # bf16 rounds some maxima up to the next power
    assert ((ratio == 1) | (ratio == 0.5)).all()
    again = grouped_mm_fp8_int8(a_rows, weight, offsets)
    assert torch.equal(again.q[:rows], q) and torch.equal(again.scale[:rows], words)
