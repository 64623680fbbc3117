"""The memory-bound kernels in Triton, around torch's grouped GEMM: the portable GPU backend.

Same functions as ``kernels/reference``, for bfloat16, float16 and float32 (the grouped GEMMs: bfloat16, of torch, and
float16 on CUDA). Every kernel runs on the current stream of its tensors' device, never synchronises with the host, has
one writer per element and sums in a fixed order, so results are bit-identical from call to call and every launch can be
captured in a CUDA graph. Two count by integer atomics, which shows in the order of ``needed_rows`` alone. Without a GPU
the same code runs in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported).
"""

from supersonic_moe.kernels.compose import Composed
from supersonic_moe.kernels.triton.activation import activation_backward as activation_backward
from supersonic_moe.kernels.triton.activation import activation_forward as activation_forward
from supersonic_moe.kernels.triton.aux_loss import switch_loss_backward as switch_loss_backward
from supersonic_moe.kernels.triton.aux_loss import switch_loss_forward as switch_loss_forward
from supersonic_moe.kernels.triton.bias_gradient import segment_sum as segment_sum
from supersonic_moe.kernels.triton.departures import departures_everywhere as departures_everywhere
from supersonic_moe.kernels.triton.dequantize import dequantize_rows as dequantize_rows
from supersonic_moe.kernels.triton.gather_rows import gather_rows as gather_rows
from supersonic_moe.kernels.triton.gather_sum import gather_sum as gather_sum
from supersonic_moe.kernels.triton.grouped_mm import grouped_mm as grouped_mm
from supersonic_moe.kernels.triton.grouped_mm import grouped_mm_wgrad as grouped_mm_wgrad
from supersonic_moe.kernels.triton.pad_segments import pad_segments as pad_segments
from supersonic_moe.kernels.triton.pick import pick as pick
from supersonic_moe.kernels.triton.plan import build_plan as build_plan
from supersonic_moe.kernels.triton.push_rows import needed_rows as needed_rows
from supersonic_moe.kernels.triton.push_rows import push_back as push_back
from supersonic_moe.kernels.triton.push_rows import push_rows as push_rows
from supersonic_moe.kernels.triton.push_rows import take_rows as take_rows
from supersonic_moe.kernels.triton.quantize import quantize_both_orders as quantize_both_orders
from supersonic_moe.kernels.triton.quantize import quantize_columns as quantize_columns
from supersonic_moe.kernels.triton.quantize import quantize_rows as quantize_rows
from supersonic_moe.kernels.triton.quantize import quantize_weights as quantize_weights
from supersonic_moe.kernels.triton.quantize_saved import quantize_saved as quantize_saved
from supersonic_moe.kernels.triton.router import route_backward as route_backward
from supersonic_moe.kernels.triton.router import route_forward as route_forward
from supersonic_moe.kernels.triton.row_parts import row_parts as row_parts
from supersonic_moe.kernels.triton.score_gradient import row_dot as row_dot
from supersonic_moe.kernels.triton.token_rounding import token_rounding_backward as token_rounding_backward
from supersonic_moe.kernels.triton.token_rounding import token_rounding_forward as token_rounding_forward
from supersonic_moe.kernels.triton.zero_dead_rows import zero_dead_rows as zero_dead_rows

_composed = Composed(grouped_mm, activation_forward, activation_backward)
up_projection, down_backward = _composed.up_projection, _composed.down_backward

ALIGNMENT = 16  # of torch's grouped GEMM
