"""The experts of the sm_90 backend: grouped GEMMs of this package, what is memory-bound from Triton. Routing is that of
Triton (kernels/registry.py).
"""

from supersonic_moe.kernels.sm90.down_backward import down_backward as down_backward
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8 as down_backward_fp8
from supersonic_moe.kernels.sm90.down_backward_fp8_quantize import (
    down_backward_fp8_quantize as down_backward_fp8_quantize,
)
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm as grouped_mm
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8 as grouped_mm_fp8
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad as grouped_mm_wgrad
from supersonic_moe.kernels.sm90.grouped_wgrad_fp8 import grouped_mm_wgrad_fp8 as grouped_mm_wgrad_fp8
from supersonic_moe.kernels.sm90.quantize_columns import quantize_columns as quantize_columns
from supersonic_moe.kernels.sm90.up_projection import up_projection as up_projection
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8 as up_projection_fp8
from supersonic_moe.kernels.triton import dequantize_rows as dequantize_rows
from supersonic_moe.kernels.triton import gather_sum as gather_sum
from supersonic_moe.kernels.triton import pad_segments as pad_segments
from supersonic_moe.kernels.triton import pick as pick
from supersonic_moe.kernels.triton import quantize_both_orders as quantize_both_orders
from supersonic_moe.kernels.triton import quantize_rows as quantize_rows
from supersonic_moe.kernels.triton import quantize_saved as quantize_saved
from supersonic_moe.kernels.triton import quantize_weights as quantize_weights
from supersonic_moe.kernels.triton import row_dot as row_dot
from supersonic_moe.kernels.triton import segment_sum as segment_sum
from supersonic_moe.kernels.triton import zero_dead_rows as zero_dead_rows

ALIGNMENT = 16  # of TMA
