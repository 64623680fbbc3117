"""Random e4m3 operands of the GEMM suite with their block scales, and who multiplies them.

Operands are normal numbers in bf16 that pass through our quantizers. Everyone gets these bytes, in the order that he
wants, beforehand: neither quantizing nor laying out scales is in anybody's time. An exact product is that of the
dequantized operands in fp64. Beyond the variants of ``gemm.py``:

    ours_up, ours_up_gathered     the up-projection: the same product with SwiGLU and both quantizations in its epilogue
    ours_transposed               wgrad only: (E, N, M), as dW1 of a layer is stored

Peers:

ours-BF16
    Our BF16 kernel on the bf16 numbers that the operands come from: what FP8 is worth.
deep_gemm
    DeepGEMM, or SGLang's build of it. The forward product takes the same formats as ours. Its weight gradient
    (``k_grouped``) scales both operands 1 x 128 along the rows where ours has one scale for 128 x 128 of B, and adds to
    fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.bench.gemm import Contender
from supersonic_moe.bench.gemm_bf16 import Builders, deep_gemm_module, normal, offsets_of, permutation, rows_of
from supersonic_moe.bench.shapes import GemmCase
from supersonic_moe.config.activation import GateUpLayout, as_activation
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.interface import NEW, Gate, Into, Quantized, Rows, UpProjection
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.sm90 import (
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_wgrad,
    grouped_wgrad_fp8,
    up_projection_fp8,
)
from supersonic_moe.kernels.triton import pad_segments, quantize
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

BF16 = "ours-BF16"
DOWN = ("_down", "_l2")  # cases that end so are no up-projections

COMPARED: dict[str, dict[str, tuple[str, ...]]] = {
    "gemm": {
        "ours": ("deep_gemm", BF16),
        "ours_gathered": ("ours",),
        "ours_up": ("ours",),
        "ours_up_gathered": ("ours",),
    },
    "wgrad": {"ours": (BF16,), "ours_transposed": ("ours",), "ours_accumulate": ("deep_gemm",)},
}

FP32_LIMIT = 1e-3  # of an fp32 result: the tensor core sums 128 of K with about 14 bits
E4M3_LIMIT = 0.04  # of a result that was rounded to e4m3: 0.026 on normal data


def contenders(case: GemmCase, device: torch.device) -> Builders:
    return _products(case, device) if case.kind == "gemm" else _weight_gradients(case, device)


def _products(case: GemmCase, device: torch.device) -> Builders:
    """D (P, N) = A (P, K) · W (E, N, K)ᵀ of each row's expert."""
    N, K = case.sizes
    a_PK, w_ENK = normal(device, case.rows, K), normal(device, case.experts, N, K)
    q_PK, scale_PB = quantize.quantize_rows(a_PK, False, True)  # in order: scales by TMA
    _, scale_by_row = quantize.quantize_rows(a_PK, False, False)  # through an index: scales by row
    wq_ENK, _, w_scale = quantize.quantize_blocks(w_ENK)
    w_scale = w_scale.contiguous()
    weight = Quantized(wq_ENK, w_scale)
    offsets, index_P = offsets_of(case, device), permutation(case, device)
    expert_P = torch.arange(case.rows, device=device).div(case.rows_per_expert, rounding_mode="floor").int()

    def product(rows: Tensor | slice, expert: int) -> Tensor:
        a = dequantize(q_PK.view(torch.uint8)[rows].view(E4M3), scale_by_row[rows])
        return a @ dequantize(wq_ENK[expert], w_scale[expert]).T

    def exact(expert: int) -> Tensor:
        return product(rows_of(case, expert), expert)

    def exact_gathered(expert: int) -> Tensor:
        return product(index_P[rows_of(case, expert)], expert)

    in_order = Rows(Quantized(q_PK, scale_PB))
    gathered = Rows(Quantized(q_PK, scale_by_row), index_P)

    def up(rows: Rows[Quantized], exact_h: Callable[[int], Tensor]) -> Contender:
        gate, recipe = Gate(as_activation("swiglu"), GateUpLayout.INTERLEAVED), Fp8Recipe()
        step = UpProjection(rows, weight, None, offsets, expert_P, gate, save=True)

        def run() -> tuple[Quantized, Quantized]:
            return up_projection_fp8.up_projection_fp8(step, recipe)

        def exact_a(expert: int) -> Tensor:
            h = exact_h(expert)
            return F.silu(h[:, 0::2]) * h[:, 1::2]

        return Contender(run, exact_a, value=lambda outputs: dequantize(*outputs[1]), limit=E4M3_LIMIT)

    def bf16() -> Contender:
        return Contender(
            lambda: grouped_gemm.grouped_mm(Rows(a_PK), w_ENK.mT, offsets),
            lambda expert: a_PK[rows_of(case, expert)].double() @ w_ENK[expert].double().T,
        )

    def deep_gemm() -> Contender:
        module = deep_gemm_module(case)
        name = "m_grouped_fp8_fp4_gemm_nt_contiguous"  # SGLang's build; DeepGEMM's own has no FP4 there
        gemm = getattr(module, name, None) or module.m_grouped_fp8_gemm_nt_contiguous
        d_PN = a_PK.new_full((case.rows, N), torch.nan)
        laid_out = module.get_mn_major_tma_aligned_tensor(scale_by_row)
        wq = wq_ENK.contiguous()

        def run() -> Tensor:
            gemm((q_PK, laid_out), (wq, w_scale), d_PN, expert_P)
            return d_PN

        return Contender(run, exact)

    found = {
        "ours": lambda: Contender(lambda: grouped_gemm_fp8.grouped_mm_fp8(in_order, weight, offsets), exact),
        "ours_gathered": lambda: Contender(
            lambda: grouped_gemm_fp8.grouped_mm_fp8(gathered, weight, offsets), exact_gathered
        ),
    }
    if not case.name.endswith(DOWN):
        found |= {"ours_up": lambda: up(in_order, exact), "ours_up_gathered": lambda: up(gathered, exact_gathered)}
    return found | {BF16: bf16, "deep_gemm": deep_gemm}


def _weight_gradients(case: GemmCase, device: torch.device) -> Builders:
    """D (E, M, N) = A (P, M)ᵀ · B (P, N) over the rows of each expert, padded to whole blocks of 128 positions."""
    M, N = case.sizes
    a_PM, b_PN = normal(device, case.rows, M), normal(device, case.rows, N)
    offsets = offsets_of(case, device)
    rows_P = torch.arange(case.rows, device=device, dtype=torch.int32)
    capacity = case.experts * blocks(case.rows_per_expert) * BLOCK
    positions, _, index_G, _ = pad_segments(offsets, rows_P, capacity)
    a_MG, b_NG = quantize.quantize_columns(a_PM, index_G), quantize.quantize_columns(b_PN, index_G, tiled=True)

    def of_expert(q_CG: Tensor, scale: Tensor, expert: int) -> Tensor:
        segment = capacity // case.experts
        at = slice(expert * segment, (expert + 1) * segment)
        return dequantize(q_CG[:, at], scale[:, at.start // BLOCK : at.stop // BLOCK])

    def exact(expert: int) -> Tensor:
        return of_expert(*a_MG, expert) @ of_expert(*b_NG, expert).T

    def product(into: Into = NEW) -> Tensor:
        return grouped_wgrad_fp8.grouped_mm_wgrad_fp8(a_MG, b_NG, positions, into)

    def accumulating() -> Contender:
        d_EMN = torch.ones(case.experts, M, N, device=device)  # ones, so that the check sees who overwrites
        return Contender(lambda: product(Into(d_EMN, accumulate=True)), exact, initial=1, limit=FP32_LIMIT)

    def deep_gemm() -> Contender:
        gemm = deep_gemm_module(case).k_grouped_fp8_gemm_nt_contiguous
        b_rows = quantize.quantize_columns(b_PN, index_G)
        counts = [case.rows_per_expert] * case.experts
        counts_E = torch.tensor(counts, device=device, dtype=torch.int32)
        d_EMN = torch.ones(case.experts, M, N, device=device)
        a, b = _by_expert(case, a_MG.q), _by_expert(case, b_rows.q)

        def run() -> Tensor:
            gemm((a, a_MG.scale), (b, b_rows.scale), d_EMN, counts, counts_E, d_EMN)  # D = C + A · Bᵀ, and C is D
            return d_EMN

        def exact_by_row(expert: int) -> Tensor:
            return of_expert(*a_MG, expert) @ of_expert(*b_rows, expert).T

        return Contender(run, exact_by_row, initial=1, limit=FP32_LIMIT)

    def bf16_exact(expert: int) -> Tensor:
        rows = rows_of(case, expert)
        return a_PM[rows].double().T @ b_PN[rows].double()

    return {
        "ours": lambda: Contender(product, exact),
        "ours_transposed": lambda: Contender(lambda: product(Into(transposed=True)), lambda expert: exact(expert).T),
        "ours_accumulate": accumulating,
        BF16: lambda: Contender(lambda: grouped_wgrad.grouped_mm_wgrad(Rows(a_PM), b_PN, offsets), bf16_exact),
        "deep_gemm": deep_gemm,
    }


def _by_expert(case: GemmCase, q_CG: Tensor) -> Tensor:
    """Flat: the (C, rows) of one expert after the other, as ``k_grouped`` reads them."""
    parts = [q_CG.view(torch.uint8)[:, rows_of(case, expert)].flatten() for expert in range(case.experts)]
    return torch.cat(parts).view(E4M3)
