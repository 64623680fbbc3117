"""What a layer must cost: FLOPs, compulsory bytes and roofline time of each step, from the shape alone."""

from supersonic_moe.perf_model.roofline import (
    H200,
    LayerShape,
    Machine,
    Step,
    layer_flops,
    layer_steps,
    saved_activation_bytes,
)

__all__ = ["H200", "LayerShape", "Machine", "Step", "layer_flops", "layer_steps", "saved_activation_bytes"]
