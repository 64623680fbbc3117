"""Problems for the FP8 backward of the down-projection on a GPU, and their fp64 results."""

from __future__ import annotations

import torch
from grouped_cases import CUDA, picked

from supersonic_moe.config.activation import Activation, GateUpLayout, as_activation
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import DownBackward, Gate, Quantized, Rows
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows
from supersonic_moe.kernels.triton.quantize_saved import quantize_saved
from supersonic_moe.quantization.block_format import saved_steps

INTERLEAVED, GATE_UP, UP_GATE = GateUpLayout.INTERLEAVED, GateUpLayout.GATE_UP, GateUpLayout.UP_GATE
# Depths below, at and between whole laps of three stages of 128; one block of columns, an even and an odd number of
# them, full and not.
SIZES = [(64, 128), (384, 512), (520, 384), (1000, 640)]
RAGGED = [(72, 8), (264, 200), (392, 1000)]  # widths that e4m3 H in halves leaves to the unfused function
ACTIVATIONS = {
    **{name: as_activation(name) for name in ("swiglu", "geglu", "reglu")},
    "gpt_oss": Activation.gpt_oss(limit=0.9),
}


def step_of(
    offsets: torch.Tensor, dout: torch.Tensor, index: torch.Tensor | None, width: int, layout: GateUpLayout,
    activation: Activation, saved_fp8: bool, bias: bool, int8: bool = False,
) -> tuple[DownBackward[Quantized], tuple]:  # fmt: skip
    """What ``down_backward_fp8`` takes; the fp64 result of the rows that experts own, and the norm of the products
    that dS sums: in one row they may cancel.
    """
    num_experts, rows, hidden = offsets.shape[0] - 1, int(offsets[-1]), dout.shape[1]
    allocated = dout.shape[0] if index is None else index.shape[0]
    dout[:, : hidden // 2] *= 10  # a scale in the wrong K block shows
    dout_q, dout_scale = quantize_rows(dout, tma=index is None)
    w2 = torch.randn(num_experts, hidden, width, device=CUDA, dtype=torch.bfloat16) / hidden**0.5
    w2_q, w2_transposed, w2_scale = quantize_blocks(w2)
    steps = torch.arange(2 * width, device=CUDA) // 128 % 3 + 1  # and a scale in the wrong block of H
    h = (torch.randn(allocated, 2 * width, device=CUDA) * steps).bfloat16()
    scores = torch.randn(allocated, device=CUDA)
    unscored = torch.rand(allocated, device=CUDA) < 0.1
    scores[unscored], h[unscored] = 0, float("nan")
    if int8:
        h, z_scale = quantize_saved(h)
        exact_h = h.double() * saved_steps(z_scale, 2 * width).double()
        z_scale[unscored] = -1  # exponents of infinity
    elif saved_fp8:
        h, z_scale = quantize_rows(h, tma=True)
        exact_h = dequantize(h, z_scale)
        z_scale[unscored] = float("nan")
    else:
        exact_h, z_scale = h.double(), h.new_empty(0, -(-2 * width // 128), dtype=torch.float32)
    b1 = torch.randn(num_experts, 2 * width, device=CUDA, dtype=torch.bfloat16) if bias else None
    experts = torch.searchsorted(
        offsets[1:].contiguous(), torch.arange(allocated, device=CUDA, dtype=torch.int32), right=True
    )
    exact_dout = picked(dequantize(dout_q, dout_scale), index)[:rows]
    da = reference.grouped_mm(Rows(exact_dout), dequantize(w2_q, w2_scale), offsets)
    exact_h = exact_h.float().double()  # as a kernel has it: a gate that its bias cancels is a kink of ReGLU
    exact_h, exact_b1 = torch.where(unscored[:, None], 0, exact_h)[:rows], None if b1 is None else b1.double()
    owner, gate = experts[:rows].int(), Gate(activation, layout)
    want = reference.activation_backward(exact_h, exact_b1, da, scores[:rows].double(), owner, gate)
    products = da * reference.activation_forward(exact_h, exact_b1, owner, gate)
    operands = Rows(Quantized(dout_q, dout_scale), index), Quantized(w2_transposed, w2_scale.mT), Quantized(h, z_scale)
    step = DownBackward(*operands, b1, scores, offsets, experts.int(), gate)
    return step, (*want, products[~unscored[:rows]].norm())
