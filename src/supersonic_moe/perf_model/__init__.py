"""What a layer must cost: FLOPs, compulsory bytes and roofline time of each step, from the shape alone."""

from supersonic_moe.perf_model.kernels import kernel_steps
from supersonic_moe.perf_model.roofline import (
    H200,
    LayerShape,
    Machine,
    Step,
    layer_flops,
    layer_steps,
    saved_activation_bytes,
)

__all__ = [
    "H200",
    "LayerShape",
    "Machine",
    "Step",
    "kernel_steps",
    "layer_flops",
    "layer_steps",
    "saved_activation_bytes",
]
