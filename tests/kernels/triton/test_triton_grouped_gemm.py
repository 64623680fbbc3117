"""Grouped GEMMs of the Triton backend against fp64 loops over experts: torch's in bf16, ours in fp16. Rows that must
not matter hold NaN; so do fresh outputs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401
from sorted_rows import assert_rounded, offsets_of, owners_of

from supersonic_moe.kernels import triton as kernels
from supersonic_moe.kernels.interface import Into, Rows


def test_grouped_mm(device: torch.device) -> None:
    counts = [5, 0, 12, 1]
    a = torch.randn(21, 48, device=device).bfloat16()  # 3 dead rows
    w = torch.randn(4, 32, 48, device=device).bfloat16()
    transposed_storage = w.mT.contiguous().mT  # an (E, K, N) parameter seen as (E, N, K)
    got = kernels.grouped_mm(Rows(a), w.transpose(1, 2), offsets_of(counts, device))
    for row, e in enumerate(owners_of(counts, 0, device).tolist()):
        assert_rounded(got[row], (w[e].double() @ a[row].double()).cpu(), scale=200)
    again = kernels.grouped_mm(Rows(a), transposed_storage.transpose(1, 2), offsets_of(counts, device))
    assert_rounded(again[:18], got[:18].double().cpu(), scale=200)


def test_grouped_mm_wgrad(device: torch.device) -> None:
    counts = [5, 0, 12, 0, 1]
    a, b = torch.randn(21, 24, device=device).bfloat16(), torch.randn(21, 40, device=device).bfloat16()
    a[18:], b[18:] = math.nan, math.nan
    offsets = offsets_of(counts, device)
    got = kernels.grouped_mm_wgrad(Rows(a), b, offsets)
    assert torch.equal(kernels.grouped_mm_wgrad(Rows(b), a, offsets, Into(transposed=True)), got)
    for e, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        assert_rounded(got[e], (a[start:end].double().T @ b[start:end].double()).cpu(), scale=200)
    assert not got[1].any() and not got[3].any()


@pytest.mark.parametrize(("depth", "columns"), [(48, 32), (136, 200), (8, 8)])
def test_grouped_mm_in_fp16(depth: int, columns: int, device: torch.device) -> None:
    """Tiles that end inside an expert, experts without rows, rows at a stride, weights in either order."""
    counts = [5, 0, 130, 1, 0, 256]
    a = torch.randn(395, depth + 8, device=device).half()[:, :depth]
    a[392:] = math.nan
    w = torch.randn(6, columns, depth, device=device).half()
    transposed_storage = w.mT.contiguous().mT
    offsets = offsets_of(counts, device)
    got = kernels.grouped_mm(Rows(a), w.transpose(1, 2), offsets)
    assert got.dtype is torch.float16 and got.shape == (395, columns)
    for e, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        assert_rounded(got[start:end], (a[start:end].double() @ w[e].double().T).cpu(), scale=200)
    again = kernels.grouped_mm(Rows(a), transposed_storage.transpose(1, 2), offsets)
    assert torch.equal(again[:392], got[:392])


def test_rows_of_a_weight_in_fp16_may_lie_2_to_31_elements_apart(device: torch.device) -> None:
    """4 GB of addresses, of which a CPU touches the rows only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        w = torch.empty(2**31 + 8, dtype=torch.float16, device=device).as_strided((1, 257, 8), (0, 2**23, 1))
    w.copy_(torch.randn(w.shape, device=device))
    for view in (w, w.mT):  # (E, N, K), and as the other factor (E, K, N)
        a, near = torch.randn(3, view.shape[2], device=device).half(), view.contiguous()
        offsets = offsets_of([3], device)
        got = kernels.grouped_mm(Rows(a), view.mT, offsets)
        assert torch.equal(got, kernels.grouped_mm(Rows(a), near.mT, offsets))


@pytest.mark.parametrize("out_dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_grouped_mm_wgrad_in_fp16(out_dtype: torch.dtype | None, accumulate: bool, device: torch.device) -> None:
    counts = [5, 0, 600, 0, 1]
    a, b = (torch.randn(610, width, device=device).half() for width in (24, 140))
    a[606:], b[606:] = math.nan, math.nan
    offsets = offsets_of(counts, device)
    if out_dtype is None:
        got = kernels.grouped_mm_wgrad(Rows(a), b, offsets)
        before = torch.zeros(5, 24, 140, dtype=torch.float64)
        assert torch.equal(kernels.grouped_mm_wgrad(Rows(b), a, offsets, Into(None, transposed=True)), got)
    else:
        out = torch.randn(5, 24, 140, device=device).to(out_dtype)
        before = out.double().cpu() if accumulate else torch.zeros(5, 24, 140, dtype=torch.float64)
        got = kernels.grouped_mm_wgrad(Rows(a), b, offsets, Into(out, accumulate=accumulate))
        assert got is out
    for e, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        product = (a[start:end].double().T @ b[start:end].double()).cpu()
        assert_rounded(got[e], before[e] + product, scale=200)
    assert accumulate or (not got[1].any() and not got[3].any())


def test_wgrad_of_an_empty_expert_is_zero_whatever_the_gemm_left(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch promises nothing for a group without rows, so let its GEMM return NaN everywhere."""
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: a.new_empty(len(offs), a.shape[0], b.shape[1]))
    a, b = torch.randn(9, 264, device=device).bfloat16(), torch.randn(9, 256, device=device).bfloat16()  # 17 blocks
    got = kernels.grouped_mm_wgrad(Rows(a), b, offsets_of([0, 9, 0], device))
    assert not got[0].any() and not got[2].any()
    assert got[1].isnan().all()
