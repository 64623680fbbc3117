"""``moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048`` of FlashInfer-Bench, for any shape of that kind."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.config.activation import GateUpLayout, as_layout
from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring, as_scoring
from supersonic_moe.inference.operands import (
    as_factor,
    as_offset,
    check_experts,
    check_x,
    check_x_scale,
)
from supersonic_moe.inference.ops import DsRouted
from supersonic_moe.inference.replays import Request
from supersonic_moe.quantization.block_format import E4M3


def moe_fp8_ds_routed(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_scale: Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    n_group: int = 8,
    topk_group: int = 4,
    top_k: int = 8,
    scoring: Scoring | str = "sigmoid",
    gate_up_order: GateUpLayout | str = "up_gate",
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    max_tokens_per_chunk: int | None = None,
) -> Tensor:
    """Routing over all experts, then the experts of this rank, combined: (T, H) bfloat16.

    ``out[t] = sum over the chosen experts e with a local index of w[t, e] * (silu(gate_e) * up_e) w2_e^T``; a token
    without one is exactly +0, also where its row of ``hidden_states`` holds NaN. Inputs are read as they are, in every
    call; nothing is prepacked and nothing derived from contents is kept.

    Args:
        routing_logits: (T, E) float32, E of the whole model, at most 1024.
        routing_bias: (E,) bfloat16 or float32, added for the choice only; None adds nothing.
        hidden_states: (T, H) float8_e4m3fn; H a multiple of 128.
        hidden_states_scale: (H / 128, T) float32.
        gemm1_weights: (E_local, 2 I, H) float8_e4m3fn; I a multiple of 64, E_local at most 512.
        gemm1_scale: (E_local, 2 I / 128, H / 128) float32 of either sign; ``kernels/reference/inference.py`` says what
            it is where I is not a multiple of 128.
        gemm2_weights: (E_local, H, I) float8_e4m3fn.
        gemm2_scale: (E_local, H / 128, ceil(I / 128)) float32.
        local_expert_offset: local expert i is expert ``offset + i`` of the model; indices outside [0, E) never get a
            token.
        routed_scaling_factor: multiplies the weights after normalisation.
        n_group, topk_group, top_k, scoring: ``config/grouped_routing.py``.
        gate_up_order: how the 2 I rows of ``gemm1_weights`` hold gate and up.
        out: (T, H) contiguous bfloat16 to write and return.
        workspace: uint8, at least ``workspace_bytes(T or max_tokens_per_chunk, top_k, H, I, E_local)``, on a GPU from a
            multiple of 256 bytes on; made if None.
        max_tokens_per_chunk: compute so many tokens at a time, so that a long prefill needs less memory. The result is
            the same up to rounding.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or setting, with the fix.
    """
    weights = [gemm1_weights, gemm1_scale, gemm2_weights, gemm2_scale]
    settings = (n_group, topk_group, top_k, scoring, routed_scaling_factor, local_expert_offset, gate_up_order)
    request = Request.of(
        hidden_states, (routing_logits, routing_bias, hidden_states_scale), out, workspace, weights,
        ("ds_routed", max_tokens_per_chunk, *settings),
    )  # fmt: skip
    if (result := request.run()) is not None:
        return result
    order = as_layout(gate_up_order)
    sizes = check_experts(gemm1_weights, gemm2_weights, gemm1_scale, gemm2_scale, order)
    check_x("hidden_states", hidden_states, sizes, gemm1_weights)
    if hidden_states.dtype is not E4M3:
        raise TypeError(
            f"hidden_states must be float8_e4m3fn; got {checks.describe(hidden_states)}. moe_fp8_topk takes bfloat16."
        )
    x_scale = check_x_scale("hidden_states_scale", hidden_states_scale, "block_major", hidden_states)
    _check_router(routing_logits, routing_bias, hidden_states)
    rule = GroupedRouting(
        num_experts=routing_logits.shape[1],
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scoring=as_scoring(scoring),
        scaling_factor=as_factor(routed_scaling_factor),
    )
    offset = as_offset(local_expert_offset)
    x, bias = hidden_states.contiguous(), None if routing_bias is None else routing_bias.contiguous()

    def part(first: int, end: int) -> DsRouted:
        return DsRouted(
            routing_logits[first:end], bias, x[first:end], x_scale[first:end], weights,
            offset, top_k, n_group, topk_group, rule.scoring.value, rule.scaling_factor, order.value,
        )  # fmt: skip

    op = torch.ops.supersonic_moe.moe_fp8_ds_routed.default
    return request.compute(op, part, top_k, sizes, max_tokens_per_chunk)


def _check_router(logits: Tensor, bias: Tensor | None, x: Tensor) -> None:
    checks.tensor("routing_logits", logits, 2, "(T, E)")
    checks.size("routing_logits", "length", logits.shape[0], x.shape[0], "the tokens of hidden_states")
    checks.same_device("routing_logits", logits, "hidden_states", x)
    if logits.dtype is not torch.float32:
        raise TypeError(f"routing_logits must be float32; got {checks.describe(logits)}. Convert it with .float().")
    checks.dense("routing_logits", logits)
    if bias is not None:
        checks.tensor("routing_bias", bias, 1, "(E,)")
        checks.size("routing_bias", "length", bias.shape[0], logits.shape[1], "the columns of routing_logits")
        checks.same_device("routing_bias", bias, "hidden_states", x)
        if bias.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"routing_bias must be bfloat16 or float32; got {checks.describe(bias)}. Convert it.")
