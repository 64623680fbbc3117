"""The sm_90 backend: grouped GEMMs of this package, everything memory-bound from Triton (kernels/registry.py)."""

from supersonic_moe.kernels.sm90.down_backward import down_backward
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad
from supersonic_moe.kernels.sm90.up_projection import up_projection
from supersonic_moe.kernels.triton import (
    build_plan,
    gather_sum,
    route_backward,
    route_forward,
    row_dot,
    segment_sum,
    token_rounding_backward,
    token_rounding_forward,
)

__all__ = [
    "build_plan",
    "down_backward",
    "gather_sum",
    "grouped_mm",
    "grouped_mm_wgrad",
    "route_backward",
    "route_forward",
    "row_dot",
    "segment_sum",
    "token_rounding_backward",
    "token_rounding_forward",
    "up_projection",
]
