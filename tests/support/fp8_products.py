"""Products of FP8 operands in fp64: what kernels are compared with."""

from __future__ import annotations

from torch import Tensor

from supersonic_moe.kernels.interface import Quantized, Rows
from supersonic_moe.kernels.reference import grouped_mm, grouped_mm_wgrad
from supersonic_moe.kernels.reference.quantize import dequantize


def exact_grouped_mm(a_PK: Quantized, b_ENK: Quantized, expert_offsets: Tensor) -> Tensor:
    """(P, N): rows of expert e are a[rows] @ b[e].T."""
    return grouped_mm(Rows(dequantize(*a_PK)), dequantize(*b_ENK).mT, expert_offsets)


def exact_grouped_mm_wgrad(a_MG: Quantized, b_NG: Quantized, padded_offsets: Tensor) -> Tensor:
    """(E, M, N): a[:, positions of e] @ b[:, positions of e].T."""
    return grouped_mm_wgrad(Rows(dequantize(*a_MG).T), dequantize(*b_NG).T, padded_offsets)
