"""The down-projection of the inference operator: rows that are their token's only one go straight to the output."""

from __future__ import annotations

import oracle
import pytest
import torch
from fp8_products import exact_grouped_mm
from grouped_cases import CUDA, GROUPS, case
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels.interface import Quantized, Rows
from supersonic_moe.kernels.sm90.down_projection_fp8 import down_projection_fp8
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(128, 128), (384, 640), (2048, 1152)])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_rows_go_where_the_table_says(counts: list[int], depth: int, columns: int, pairs: bool) -> None:
    offsets, (a,) = case(counts, 0, depth)
    rows = sum(counts)
    b, _, b_scale = quantize_blocks(torch.randn(len(counts), columns, depth, device=CUDA, dtype=torch.bfloat16))
    c, w = quantize_rows(a, tma=True), Quantized(b, b_scale)
    tokens = torch.randperm(rows + 5, device=CUDA)[:rows].int()  # some of no row
    alone = torch.rand(rows, device=CUDA) < 0.4
    weights = torch.where(alone, torch.rand(rows, device=CUDA) * 3, 1.0)
    table = torch.full((a.shape[0], 2), -77, device=CUDA, dtype=torch.int32)
    table[:rows] = torch.stack([torch.where(alone, tokens, -1), weights.view(torch.int32)], 1)
    untouched = -123.0
    out = torch.full((rows + 5, columns), untouched, device=CUDA, dtype=torch.bfloat16)

    y = torch.empty(a.shape[0], columns, device=CUDA, dtype=torch.bfloat16)
    down_projection_fp8(c, w, offsets, table, y, out, pairs)
    at, apart = tokens[alone].long(), ~alone
    plain = grouped_mm_fp8(Rows(c), w, offsets)[:rows]
    assert torch.equal(y[:rows][apart], plain[apart]), "rows of y have the bits of the grouped GEMM"
    exact = exact_grouped_mm(c, w, offsets)[:rows] * weights[:, None].double()
    if alone.any():
        assert oracle.rel_fro(out[at], exact[alone]) < 3e-3
    others = torch.ones(rows + 5, dtype=torch.bool, device=CUDA)
    others[at] = False
    assert out[others].eq(untouched).all()
    again = torch.full_like(out, untouched)
    down_projection_fp8(c, w, offsets, table, y, again, pairs)
    assert torch.equal(out, again)
