"""What a layer must cost: FLOPs, compulsory bytes and roofline time of each step, from the shape alone."""

from supersonic_moe.perf_model.fp8 import fp8_saved_bytes, fp8_step_kernels, fp8_steps
from supersonic_moe.perf_model.kernels import kernel_steps
from supersonic_moe.perf_model.roofline import (
    H200,
    STEP_KERNELS,
    LayerShape,
    Machine,
    Step,
    layer_flops,
    layer_steps,
    saved_activation_bytes,
)

__all__ = [
    "H200",
    "STEP_KERNELS",
    "LayerShape",
    "Machine",
    "Step",
    "fp8_saved_bytes",
    "fp8_step_kernels",
    "fp8_steps",
    "kernel_steps",
    "layer_flops",
    "layer_steps",
    "saved_activation_bytes",
]
