"""The FP8 weight gradient against the fp64 product of the dequantized operands."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from fp8_products import exact_grouped_mm_wgrad
from grouped_cases import CUDA, GROUPS, case, segments
from poison import poisoned_allocations  # noqa: F401
from torch import Tensor

from supersonic_moe.kernels.interface import Into, Quantized
from supersonic_moe.kernels.sm90.grouped_wgrad_fp8 import grouped_mm_wgrad_fp8
from supersonic_moe.kernels.sm90.quantize_columns import quantize_columns as columns_in_cuda
from supersonic_moe.kernels.triton.pad_segments import pad_segments
from supersonic_moe.kernels.triton.quantize import quantize_columns
from supersonic_moe.quantization.block_format import padded_capacity

pytestmark = pytest.mark.gpu

SIZES = [(64, 256), (128, 512), (72, 8), (8, 264), (264, 72), (520, 1000), (1000, 520)]


def operands(counts: list[int], m: int, n: int, positive: bool = False) -> tuple[Quantized, Quantized, Tensor]:
    """a, b, padded offsets. Magnitudes differ from row to row and from block to block of columns, so
    a scale of another block shows; codes and scales past the last expert's positions are NaN.
    """
    offsets, (x, y) = case(counts, 0, m, n, positive=positive)
    rows = sum(counts)
    for t in (x, y):
        t *= torch.exp(torch.randn(rows, 1, device=CUDA))
        t[:, : t.shape[1] // 2] *= 100
    every_row = torch.arange(rows, device=CUDA, dtype=torch.int32)
    positions, row_index, *_ = pad_segments(offsets, every_row, padded_capacity(rows, len(counts)))
    a, b = quantize_columns(x, row_index), quantize_columns(y, row_index, tiled=True)
    end = int(positions[-1])
    for q, scale in (a, b):
        q.view(torch.uint8)[:, end:] = 0x7F
        scale[:, end // 128 :] = float("nan")
    return a, b, positions


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_every_output(counts: list[int], m: int, n: int, positive: bool) -> None:
    """fp32 against fp64; bf16 is its rounding, a transpose its transpose, and += one addition to each element."""
    arguments, shape = operands(counts, m, n, positive), (len(counts), m, n)
    want = exact_grouped_mm_wgrad(*arguments)
    exact = grouped_mm_wgrad_fp8(*arguments, Into(torch.full(shape, float("nan"), device=CUDA)))
    for e, part in segments(arguments[-1]):
        if part.start == part.stop:
            assert (exact[e] == 0).all()
        else:
            # The tensor core cuts each product at about 2^-13 of the running sum: positive sums come out low.
            assert oracle.rel_fro(exact[e], want[e]) < (5e-3 if positive else 1e-3), f"expert {e}"
    start = torch.randn(shape, device=CUDA) * want.std().float()
    del want  # in fp64 as large as two of the results below
    for transposed in (False, True):
        expected, base = (exact.mT, start.mT) if transposed else (exact, start)
        fresh = torch.full_like(expected.contiguous(), float("nan"))
        assert torch.equal(grouped_mm_wgrad_fp8(*arguments, Into(fresh, transposed)), expected)
        assert torch.equal(grouped_mm_wgrad_fp8(*arguments, Into(None, transposed)), expected.bfloat16())
        total = base.contiguous().clone()
        for times in (1, 2):
            assert grouped_mm_wgrad_fp8(*arguments, Into(total, transposed, accumulate=True)) is total
            assert torch.equal(total, base + expected if times == 1 else (base + expected) + expected)


def test_tiles_with_scales_in_any_strides() -> None:
    a, b, positions = operands(GROUPS["ragged"], 136, 520)
    want = grouped_mm_wgrad_fp8(a, b, positions)
    assert torch.equal(grouped_mm_wgrad_fp8(a, b._replace(scale=b.scale.contiguous()), positions), want)


def test_blocks_that_other_experts_hold() -> None:
    """Experts of the same tokens: what is not its own source is NaN and never read. More than 32 K blocks a tile."""
    counts = [5000, 5000, 300, 5000]
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=CUDA)
    tokens = [torch.arange(n, dtype=torch.int32, device=CUDA) for n in counts]
    tokens[3][130] = 7  # its second block has tokens of its own
    padded = pad_segments(offsets, torch.cat(tokens), padded_capacity(sum(counts), len(counts)))
    positions, row_index, token_index, source = padded
    x, y = torch.randn(5000, 200, device=CUDA).bfloat16(), torch.randn(sum(counts), 264, device=CUDA).bfloat16()
    b = quantize_columns(y, row_index, tiled=True)
    want = grouped_mm_wgrad_fp8(quantize_columns(x, token_index), b, positions)
    own = source == torch.arange(len(source), device=CUDA, dtype=torch.int32)
    assert own.sum() == 40 + 1 + 1 and own[80 + 2] and own[83 + 1], "the first expert's, a ragged end, and two tokens"
    shared = columns_in_cuda(x, token_index, source=source)
    shared.q.view(torch.uint8).view(200, -1, 128)[:, ~own] = 0x7F
    shared.scale[:, ~own] = float("nan")
    assert torch.equal(grouped_mm_wgrad_fp8(shared, b, positions, source=source), want)


def test_many_laps_and_tiles_with_empty_experts_between() -> None:
    """Several tiles a block, of 0 to 33 K blocks, so that tiles wait in registers while empty ones pass."""
    counts = list(itertools.islice(itertools.cycle([4097, 0, 130, 0, 0, 1, 640, 257]), 24))
    arguments = operands(counts, 520, 776)
    exact = grouped_mm_wgrad_fp8(*arguments, Into(torch.full((24, 520, 776), float("nan"), device=CUDA)))
    want = exact_grouped_mm_wgrad(*arguments)
    for e, count in enumerate(counts):
        assert oracle.rel_fro(exact[e], want[e]) < 1e-3 if count else (exact[e] == 0).all(), f"expert {e}"
    for _ in range(20):
        repeated = grouped_mm_wgrad_fp8(*arguments, Into(torch.full_like(exact, float("nan"))))
        assert torch.equal(repeated, exact)


def test_no_positions() -> None:
    arguments = operands([0, 0], 72, 264)
    assert (grouped_mm_wgrad_fp8(*arguments) == 0).all()
    start = torch.randn(2, 264, 72, device=CUDA)
    assert torch.equal(grouped_mm_wgrad_fp8(*arguments, Into(start.clone(), transposed=True, accumulate=True)), start)


def test_operands_that_it_cannot_take_are_refused() -> None:
    (a, a_scale), (b, b_scale), positions = operands([300], 136, 264)
    for arguments, words in (
        ((a, a_scale.contiguous(), b, b_scale), r"a\.scale must be stored transposed"),
        ((a, a_scale, b, a_scale), r"b\.scale \(3, 3\), one for 128 rows"),
        ((a[:, :320], a_scale, b[:, :320], b_scale), "multiple of 128"),
        ((a, a_scale, b[:, :256], b_scale[:, :2]), "the same G"),
    ):
        with pytest.raises(ValueError, match=words):
            grouped_mm_wgrad_fp8(Quantized(*arguments[:2]), Quantized(*arguments[2:]), positions)
    with pytest.raises(TypeError, match=r"b must be torch\.float8_e4m3fn"):
        grouped_mm_wgrad_fp8(Quantized(a, a_scale), Quantized(b.bfloat16(), b_scale), positions)
    with pytest.raises(TypeError, match="accumulate adds to an fp32 out"):
        grouped_mm_wgrad_fp8(Quantized(a, a_scale), Quantized(b, b_scale), positions, Into(accumulate=True))
