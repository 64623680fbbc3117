"""The inference operator behind the interface of FlashInfer-Bench and the MLSys 2026 contest.

Definition ``moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048``: ten inputs in the order of the definition,
and the output as an eleventh where the harness brings it (destination passing). Nothing is kept between calls but the
operator's own tensor maps, which hold addresses and no contents.
"""

import torch

from supersonic_moe.inference import moe_fp8_ds_routed


def run(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, H) bfloat16; written into ``output`` if there is one."""
    return moe_fp8_ds_routed(
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        int(local_expert_offset),
        float(routed_scaling_factor),
        out=output,
    )
