"""The fused steps as grouped GEMMs and passes over their results: for what no kernel here fuses."""

from __future__ import annotations

from supersonic_moe.kernels.compose import Composed, ComposedFp8
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.triton import (
    activation_backward,
    activation_forward,
    quantize_both_orders,
    quantize_columns,
    quantize_rows,
    quantize_saved,
)

UNFUSED = Composed(grouped_mm, activation_forward, activation_backward)
_QUANTIZERS = quantize_rows, quantize_saved, quantize_columns, quantize_both_orders
UNFUSED_FP8 = ComposedFp8(grouped_mm_fp8, activation_forward, activation_backward, *_QUANTIZERS)
