"""The truth: every kernel in plain torch, on any device and float dtype. Accumulates in fp32 (fp64 for fp64 inputs),
rounds once at each store.

Shapes: T tokens, S slots, P rows, E experts, K choices, H hidden, I intermediate, N1 = 2I (gated) or I; see
``routing/plan.py`` for the rows. Buffers have undefined content in dead rows; here they are NaN, so that whoever reads
one is caught by the tests.
"""

from supersonic_moe.kernels.compose import Composed, ComposedFp8
from supersonic_moe.kernels.reference.activation import activation_backward as activation_backward
from supersonic_moe.kernels.reference.activation import activation_forward as activation_forward
from supersonic_moe.kernels.reference.aux_loss import switch_loss_backward as switch_loss_backward
from supersonic_moe.kernels.reference.aux_loss import switch_loss_forward as switch_loss_forward
from supersonic_moe.kernels.reference.departures import departures_everywhere as departures_everywhere
from supersonic_moe.kernels.reference.gather import gather_rows as gather_rows
from supersonic_moe.kernels.reference.gather import gather_sum as gather_sum
from supersonic_moe.kernels.reference.gather import zero_dead_rows as zero_dead_rows
from supersonic_moe.kernels.reference.grouped_mm import grouped_mm as grouped_mm
from supersonic_moe.kernels.reference.grouped_mm import grouped_mm_wgrad as grouped_mm_wgrad
from supersonic_moe.kernels.reference.grouped_routing import route_grouped as route_grouped
from supersonic_moe.kernels.reference.inference import local_ids as local_ids
from supersonic_moe.kernels.reference.inference import moe_fp8 as moe_fp8
from supersonic_moe.kernels.reference.pick import pick as pick
from supersonic_moe.kernels.reference.plan import build_plan as build_plan
from supersonic_moe.kernels.reference.push_rows import needed_rows as needed_rows
from supersonic_moe.kernels.reference.push_rows import push_back as push_back
from supersonic_moe.kernels.reference.push_rows import push_rows as push_rows
from supersonic_moe.kernels.reference.push_rows import take_rows as take_rows
from supersonic_moe.kernels.reference.quantize import dequantize_rows as dequantize_rows
from supersonic_moe.kernels.reference.quantize import grouped_mm_fp8 as grouped_mm_fp8
from supersonic_moe.kernels.reference.quantize import grouped_mm_wgrad_fp8 as grouped_mm_wgrad_fp8
from supersonic_moe.kernels.reference.quantize import pad_segments as pad_segments
from supersonic_moe.kernels.reference.quantize import quantize_blocks as quantize_blocks
from supersonic_moe.kernels.reference.quantize import quantize_both_orders as quantize_both_orders
from supersonic_moe.kernels.reference.quantize import quantize_columns as quantize_columns
from supersonic_moe.kernels.reference.quantize import quantize_rows as quantize_rows
from supersonic_moe.kernels.reference.quantize import quantize_saved as quantize_saved
from supersonic_moe.kernels.reference.quantize import quantize_weights as quantize_weights
from supersonic_moe.kernels.reference.reductions import row_dot as row_dot
from supersonic_moe.kernels.reference.reductions import segment_sum as segment_sum
from supersonic_moe.kernels.reference.router import route_backward as route_backward
from supersonic_moe.kernels.reference.router import route_forward as route_forward
from supersonic_moe.kernels.reference.row_parts import row_parts as row_parts
from supersonic_moe.kernels.reference.token_rounding import token_rounding_backward as token_rounding_backward
from supersonic_moe.kernels.reference.token_rounding import token_rounding_forward as token_rounding_forward

_composed = Composed(grouped_mm, activation_forward, activation_backward)
up_projection, down_backward = _composed.up_projection, _composed.down_backward

_quantizers = quantize_rows, quantize_saved, quantize_columns, quantize_both_orders
_composed_fp8 = ComposedFp8(grouped_mm_fp8, activation_forward, activation_backward, *_quantizers)
up_projection_fp8, down_backward_fp8 = _composed_fp8.up_projection_fp8, _composed_fp8.down_backward_fp8
down_backward_fp8_quantize = _composed_fp8.down_backward_fp8_quantize

ALIGNMENT = 1
