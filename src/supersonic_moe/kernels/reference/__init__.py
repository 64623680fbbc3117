"""The truth: every kernel in plain torch, on any device and float dtype. Accumulates in fp32 (fp64 for fp64 inputs),
rounds once at each store.

Shapes: T tokens, S slots, P rows, E experts, K choices, H hidden, I intermediate, N1 = 2I (gated) or I; see
``routing/plan.py`` for the rows. Buffers have undefined content in dead rows; here they are NaN, so that whoever reads
one is caught by the tests.
"""

from supersonic_moe.kernels.compose import Composed, ComposedFp8
from supersonic_moe.kernels.reference.activation import activation_backward, activation_forward
from supersonic_moe.kernels.reference.aux_loss import switch_loss_backward, switch_loss_forward
from supersonic_moe.kernels.reference.gather import gather_rows, gather_sum, zero_dead_rows
from supersonic_moe.kernels.reference.grouped_mm import grouped_mm, grouped_mm_wgrad
from supersonic_moe.kernels.reference.grouped_routing import route_grouped
from supersonic_moe.kernels.reference.inference import local_ids, moe_fp8
from supersonic_moe.kernels.reference.pick import pick
from supersonic_moe.kernels.reference.plan import build_plan
from supersonic_moe.kernels.reference.quantize import (
    grouped_mm_fp8,
    grouped_mm_wgrad_fp8,
    pad_segments,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_tiles,
    quantize_weights,
)
from supersonic_moe.kernels.reference.reductions import row_dot, segment_sum
from supersonic_moe.kernels.reference.router import route_backward, route_forward
from supersonic_moe.kernels.reference.token_rounding import token_rounding_backward, token_rounding_forward

_composed = Composed(grouped_mm, activation_forward, activation_backward)
up_projection, down_backward = _composed.up_projection, _composed.down_backward

_composed_fp8 = ComposedFp8(
    grouped_mm_fp8, activation_forward, activation_backward, quantize_rows, quantize_columns, quantize_tiles
)
up_projection_fp8, down_backward_fp8 = _composed_fp8.up_projection_fp8, _composed_fp8.down_backward_fp8
down_backward_fp8_quantised = _composed_fp8.down_backward_fp8_quantised

__all__ = [
    "activation_backward",
    "activation_forward",
    "build_plan",
    "down_backward",
    "down_backward_fp8",
    "down_backward_fp8_quantised",
    "gather_rows",
    "gather_sum",
    "grouped_mm",
    "grouped_mm_fp8",
    "grouped_mm_wgrad",
    "grouped_mm_wgrad_fp8",
    "local_ids",
    "moe_fp8",
    "pad_segments",
    "pick",
    "quantize_blocks",
    "quantize_columns",
    "quantize_rows",
    "quantize_tiles",
    "quantize_weights",
    "route_backward",
    "route_forward",
    "route_grouped",
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
