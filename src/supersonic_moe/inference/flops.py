"""FLOPs of the inference operators, for ``torch.utils.flop_counter.FlopCounterMode``: 6 H I for each row.

How many choices fall to local experts only the device knows. Counted is what an even spread over all experts gives this
rank, or every choice where the number of experts is not known; a shared expert has every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from supersonic_moe.inference import ops  # noqa: F401  defines what is registered here

_ops = torch.ops.supersonic_moe


@register_flop_formula(_ops.moe_fp8_ds_routed, get_raw=True)
def _ds_routed(
    logits: Tensor,
    bias: Tensor | None,
    x: Tensor,
    x_scale: Tensor,
    weights: Sequence[Tensor],
    offset: int,
    top_k: int,
    *rest: object,
    **result: object,
) -> int:
    return _flops(x, weights, top_k, logits.shape[1])


@register_flop_formula(_ops.moe_fp8_topk, get_raw=True)
def _topk(
    x: Tensor,
    x_scale: Tensor | None,
    weights: Sequence[Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    offset: int,
    num_experts: int | None,
    *rest: object,
    **result: object,
) -> int:
    known = num_experts if expert_map is None else expert_map.shape[0]
    return _flops(x, weights, topk_ids.shape[1], known)


def _flops(x: Tensor, weights: Sequence[Tensor], choices: int, num_experts: int | None) -> int:
    """``weights``: four tensors of the routed experts, and four of a shared one if there is one."""
    (num_local, hidden, intermediate), tokens = weights[2].shape, x.shape[0]
    rows = tokens * choices
    if num_experts is not None:
        rows = rows * min(num_local, num_experts) // num_experts
    return 6 * (rows + tokens * (len(weights) > 4)) * hidden * intermediate
