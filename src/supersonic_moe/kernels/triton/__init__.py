"""The memory-bound kernels in Triton, around torch's grouped GEMM: the portable GPU backend.

Same functions as ``kernels/reference``, for bfloat16, float16 and float32 (the grouped GEMMs: bfloat16, of torch, and
float16 on CUDA).
Every kernel runs on the current stream of its tensors' device, never synchronises with the host, has one writer per
element and sums in a fixed order, so results are bit-identical from call to call and every launch can be captured in
a CUDA graph. Without a GPU the same code runs in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is
imported).
"""

from supersonic_moe.kernels.compose import Composed
from supersonic_moe.kernels.triton.activation import activation_backward, activation_forward
from supersonic_moe.kernels.triton.aux_loss import switch_loss_backward, switch_loss_forward
from supersonic_moe.kernels.triton.bias_gradient import segment_sum
from supersonic_moe.kernels.triton.gather_rows import gather_rows
from supersonic_moe.kernels.triton.gather_sum import gather_sum
from supersonic_moe.kernels.triton.grouped_mm import grouped_mm, grouped_mm_wgrad
from supersonic_moe.kernels.triton.pad_segments import pad_segments
from supersonic_moe.kernels.triton.pick import pick
from supersonic_moe.kernels.triton.plan import build_plan
from supersonic_moe.kernels.triton.quantize import quantize_columns, quantize_rows, quantize_tiles, quantize_weights
from supersonic_moe.kernels.triton.router import route_backward, route_forward
from supersonic_moe.kernels.triton.score_gradient import row_dot
from supersonic_moe.kernels.triton.token_rounding import token_rounding_backward, token_rounding_forward

_composed = Composed(grouped_mm, activation_forward, activation_backward)
up_projection, down_backward = _composed.up_projection, _composed.down_backward

__all__ = [
    "activation_backward",
    "activation_forward",
    "build_plan",
    "down_backward",
    "gather_rows",
    "gather_sum",
    "grouped_mm",
    "grouped_mm_wgrad",
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
]
