"""Random bf16 operands of the GEMM suite, and who multiplies them.

Peers, each missing where it is not installed:

torch_grouped_mm
    ``torch.nn.functional.grouped_mm``: ends of the groups on the device, bf16 out. A ragged contraction takes Aᵀ.
deep_gemm
    DeepGEMM, or SGLang's build of it. The forward product is its contiguous layout: each row names its expert, and the
    rows of an expert start at a multiple of 128. The weight gradient is ``k_grouped``: it adds to fp32 and wants the
    rows of each expert on the host too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.bench.gemm import Contender
from supersonic_moe.bench.shapes import GemmCase
from supersonic_moe.kernels.interface import Into, Rows
from supersonic_moe.kernels.sm90 import grouped_gemm, grouped_wgrad

DEEP_GEMM_ROWS = 128  # every expert's rows start at a multiple of this

Builders = Mapping[str, Callable[[], Contender]]


def contenders(case: GemmCase, device: torch.device) -> Builders:
    return _products(case, device) if case.kind == "gemm" else _weight_gradients(case, device)


def _products(case: GemmCase, device: torch.device) -> Builders:
    """D (P, N) = A (P, K) · W (E, N, K)ᵀ of each row's expert. W is passed as it is stored: B has K contiguous."""
    N, K = case.sizes
    a_PK, w_ENK = normal(device, case.rows, K), normal(device, case.experts, N, K)
    b_EKN = w_ENK.transpose(1, 2)
    offsets, index_P = offsets_of(case, device), permutation(case, device)

    def exact(expert: int) -> Tensor:
        return a_PK[rows_of(case, expert)].double() @ b_EKN[expert].double()

    def exact_gathered(expert: int) -> Tensor:
        return a_PK[index_P[rows_of(case, expert)]].double() @ b_EKN[expert].double()

    def deep_gemm() -> Contender:
        gemm = deep_gemm_module(case).m_grouped_bf16_gemm_nt_contiguous
        d_PN = a_PK.new_full((case.rows, N), torch.nan)
        expert_P = torch.arange(case.rows, device=device).div(case.rows_per_expert, rounding_mode="floor").int()

        def run() -> Tensor:
            gemm(a_PK, w_ENK, d_PN, expert_P)
            return d_PN

        return Contender(run, exact)

    return {
        "ours": lambda: Contender(lambda: grouped_gemm.grouped_mm(Rows(a_PK), b_EKN, offsets), exact),
        "ours_gathered": lambda: Contender(
            lambda: grouped_gemm.grouped_mm(Rows(a_PK, index_P), b_EKN, offsets), exact_gathered
        ),
        "torch_grouped_mm": lambda: Contender(lambda: F.grouped_mm(a_PK, b_EKN, offs=offsets[1:]), exact),
        "deep_gemm": deep_gemm,
    }


def _weight_gradients(case: GemmCase, device: torch.device) -> Builders:
    """D (E, M, N) = A (P, M)ᵀ · B (P, N) over the rows of each expert."""
    M, N = case.sizes
    a_PM, b_PN = normal(device, case.rows, M), normal(device, case.rows, N)
    offsets, index_P = offsets_of(case, device), permutation(case, device)

    def exact(expert: int) -> Tensor:
        rows = rows_of(case, expert)
        return a_PM[rows].double().T @ b_PN[rows].double()

    def exact_gathered(expert: int) -> Tensor:
        rows = rows_of(case, expert)
        return a_PM[index_P[rows]].double().T @ b_PN[rows].double()

    def main_grad_EMN() -> Tensor:
        """Of ones, so that the check of the first result sees who overwrites instead of adding."""
        return torch.ones(case.experts, M, N, device=device)

    def ours_accumulate() -> Contender:
        d_EMN = main_grad_EMN()
        return Contender(
            lambda: grouped_wgrad.grouped_mm_wgrad(Rows(a_PM), b_PN, offsets, Into(d_EMN, accumulate=True)),
            exact,
            initial=1,
        )

    def deep_gemm() -> Contender:
        gemm = deep_gemm_module(case).k_grouped_bf16_gemm_tn_contiguous
        counts = [case.rows_per_expert] * case.experts
        counts_E = torch.tensor(counts, device=device, dtype=torch.int32)
        d_EMN = main_grad_EMN()

        def run() -> Tensor:
            gemm(a_PM, b_PN, d_EMN, counts, counts_E, d_EMN)  # D = C + Aᵀ · B, and C is D
            return d_EMN

        return Contender(run, exact, initial=1)

    return {
        "ours": lambda: Contender(lambda: grouped_wgrad.grouped_mm_wgrad(Rows(a_PM), b_PN, offsets), exact),
        "ours_gathered": lambda: Contender(
            lambda: grouped_wgrad.grouped_mm_wgrad(Rows(a_PM, index_P), b_PN, offsets), exact_gathered
        ),
        "ours_accumulate": ours_accumulate,
        "torch_grouped_mm": lambda: Contender(lambda: F.grouped_mm(a_PM.t(), b_PN, offs=offsets[1:]), exact),
        "deep_gemm": deep_gemm,
    }


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def offsets_of(case: GemmCase, device: torch.device) -> Tensor:
    """(E + 1) int32: expert e has the rows from offsets[e] up to offsets[e + 1]."""
    return torch.arange(case.experts + 1, device=device, dtype=torch.int32) * case.rows_per_expert


def permutation(case: GemmCase, device: torch.device) -> Tensor:
    """(P) int32: which row of A stands in for each. Random, so a gather has no locality to live on."""
    return torch.randperm(case.rows, device=device, dtype=torch.int32)


def rows_of(case: GemmCase, expert: int) -> slice:
    return slice(expert * case.rows_per_expert, (expert + 1) * case.rows_per_expert)


def deep_gemm_module(case: GemmCase) -> ModuleType:
    if case.rows_per_expert % DEEP_GEMM_ROWS:
        raise ValueError(f"its rows of an expert must be a multiple of {DEEP_GEMM_ROWS}; got {case.rows_per_expert}.")
    return importlib.import_module("deep_gemm")
