"""The sm_90 backend: grouped GEMMs of this package, everything memory-bound from Triton (kernels/registry.py)."""

from supersonic_moe.kernels.sm90.down_backward import down_backward
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8
from supersonic_moe.kernels.sm90.down_backward_fp8_quantised import down_backward_fp8_quantised
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad
from supersonic_moe.kernels.sm90.grouped_wgrad_fp8 import grouped_mm_wgrad_fp8
from supersonic_moe.kernels.sm90.quantize_columns import quantize_columns
from supersonic_moe.kernels.sm90.up_projection import up_projection
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8
from supersonic_moe.kernels.triton import (
    build_plan,
    gather_sum,
    pad_segments,
    pick,
    quantize_rows,
    quantize_tiles,
    quantize_weights,
    route_backward,
    route_forward,
    row_dot,
    segment_sum,
    switch_loss_backward,
    switch_loss_forward,
    token_rounding_backward,
    token_rounding_forward,
    zero_dead_rows,
)

__all__ = [
    "build_plan",
    "down_backward",
    "down_backward_fp8",
    "down_backward_fp8_quantised",
    "gather_sum",
    "grouped_mm",
    "grouped_mm_fp8",
    "grouped_mm_wgrad",
    "grouped_mm_wgrad_fp8",
    "pad_segments",
    "pick",
    "quantize_columns",
    "quantize_rows",
    "quantize_tiles",
    "quantize_weights",
    "route_backward",
    "route_forward",
    "row_dot",
    "segment_sum",
    "switch_loss_backward",
    "switch_loss_forward",
    "token_rounding_backward",
    "token_rounding_forward",
    "up_projection",
    "up_projection_fp8",
    "zero_dead_rows",
]
