"""The CUDA columns quantizer against the Triton one, which is tested against the format: the same bytes."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels import triton
from supersonic_moe.kernels.interface import Segments
from supersonic_moe.kernels.sm90.quantize_columns import quantize_columns

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def same_bytes(x: torch.Tensor, index: torch.Tensor, pow2: bool) -> None:
    got, want = quantize_columns(x, index, pow2), triton.quantize_columns(x, index, pow2)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype is b.dtype
        assert torch.equal(words(a), words(b))


def words(t: torch.Tensor) -> torch.Tensor:
    """Bits, so that NaN equals itself. A copy: a view needs a last stride of 1, whatever the length."""
    return t.clone(memory_format=torch.contiguous_format).view(torch.uint8 if t.element_size() == 1 else torch.int32)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("columns", [8, 104, 128, 136, 384, 1000])
@pytest.mark.parametrize("positions", [128, 384, 4096])
def test_same_bytes_as_triton(positions: int, columns: int, pow2: bool) -> None:
    x = (
        torch.randn(300, columns, device=CUDA, dtype=torch.bfloat16)
        * torch.randn(columns, device=CUDA).exp().bfloat16()
    )
    index = torch.randint(-30, 300, (positions,), device=CUDA, dtype=torch.int32).clamp(min=-1)
    index[:128] = -1 if positions > 128 else index[:128]  # a block of padding
    same_bytes(x, index, pow2)


@pytest.mark.parametrize("value", [0.0, float("inf"), -float("inf"), float("nan"), 1e-38, 3e38])
def test_special_values(value: float) -> None:
    x = torch.randn(128, 128, device=CUDA, dtype=torch.bfloat16)
    x[5, 7], x[9, 8], x[:, 100] = value, -value, value
    same_bytes(x, torch.arange(128, device=CUDA, dtype=torch.int32), False)


def test_strided_and_unaligned_rows() -> None:
    index = torch.arange(256, device=CUDA, dtype=torch.int32) % 200
    wide = torch.randn(200, 512, device=CUDA, dtype=torch.bfloat16)
    same_bytes(wide[:, 128:256], index, False)
    same_bytes(wide[:, 4:132], index, False)  # left to Triton, as is the next
    same_bytes(wide, index[1:129], False)


def test_blocks_of_another_source_stay_as_they_are() -> None:
    x = torch.randn(300, 136, device=CUDA, dtype=torch.bfloat16)
    index = torch.arange(300, device=CUDA, dtype=torch.int32).repeat(2)[:512]
    want = quantize_columns(x, index)
    source = torch.tensor([0, 1, 2, 1], device=CUDA, dtype=torch.int32)
    offsets = torch.tensor([0, 512], device=CUDA, dtype=torch.int32)
    got = quantize_columns(x, index, segments=Segments(offsets, index, index, source))  # of memory that poison fills
    for a, b in zip(got, want, strict=True):
        each = a.shape[1] // 4
        assert torch.equal(words(a)[:, : 3 * each], words(b)[:, : 3 * each])
        assert not torch.equal(words(a)[:, 3 * each :], words(b)[:, 3 * each :])


@pytest.mark.parametrize("used", [0, 1, 5])
def test_positions_of_no_segment_stay_as_they_are(used: int) -> None:
    x = torch.randn(300, 136, device=CUDA, dtype=torch.bfloat16)
    index = torch.randint(-30, 300, (8 * 128,), device=CUDA, dtype=torch.int32).clamp(min=-1)
    offsets = torch.tensor([0, 128 * used], device=CUDA, dtype=torch.int32)
    segments = Segments(offsets, index, index, torch.arange(8, device=CUDA, dtype=torch.int32))
    want, got = quantize_columns(x, index), quantize_columns(x, index, segments=segments)
    for a, b in zip(got, want, strict=True):
        written = used * a.shape[1] // 8
        assert torch.equal(words(a)[:, :written], words(b)[:, :written])
        assert not torch.equal(words(a)[:, written:], words(b)[:, written:])


def test_large() -> None:
    x = torch.randn(8192, 3072, device=CUDA, dtype=torch.bfloat16)
    same_bytes(x, torch.randint(0, 8192, (65536,), device=CUDA, dtype=torch.int32), False)
