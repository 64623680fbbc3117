"""The FP8 operator behind a router of your own: what a serving stack calls."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.config.activation import GateUpLayout, as_layout, check_limit
from supersonic_moe.config.grouped_routing import MAX_TOP_K
from supersonic_moe.inference.operands import (
    LARGEST_ID,
    MAX_LOCAL_EXPERTS,
    Sizes,
    as_factor,
    as_offset,
    check_experts,
    check_x,
    check_x_scale,
)
from supersonic_moe.inference.ops import TopK
from supersonic_moe.inference.replays import Request
from supersonic_moe.quantization.block_format import E4M3


class SharedExpert(NamedTuple):
    """One expert that every token has, with weight 1 and without ``routed_scaling_factor``; same H, I and row order as
    the routed ones.
    """

    w13: Tensor
    """(2 I, H) float8_e4m3fn"""
    w2: Tensor
    """(H, I) float8_e4m3fn"""
    w13_scale: Tensor
    """(2 I / 128, H / 128) float32"""
    w2_scale: Tensor
    """(H / 128, ceil(I / 128)) float32"""


def moe_fp8_topk(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    x_scale: Tensor | None = None,
    x_scale_layout: Literal["token_major", "block_major"] = "token_major",
    expert_map: Tensor | None = None,
    local_expert_offset: int = 0,
    num_experts: int | None = None,
    gate_up_order: GateUpLayout | str,
    swiglu_limit: float | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling_factor: float = 1.0,
    shared_expert: SharedExpert | None = None,
    pow2_scales: bool = False,
    received_rows: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    max_tokens_per_chunk: int | None = None,
) -> Tensor:
    """(T, H) bfloat16: the weighted sum of the local experts of each token, plus the shared expert if there is one.

    Ids are global. An id that is negative, not below ``num_experts`` or not of this rank contributes nothing; a token
    without a local expert is exactly +0 (or the shared expert alone). An id that a token names twice counts twice.

    Args:
        x: (T, H) bfloat16, quantized inside in blocks of 1 x 128, or float8_e4m3fn with ``x_scale``.
        w13: (E_local, 2 I, H) float8_e4m3fn. H a multiple of 128, I of 64.
        w2: (E_local, H, I) float8_e4m3fn.
        w13_scale, w2_scale: (E_local, 2 I / 128, H / 128), (E_local, H / 128, ceil(I / 128)) float32 of either sign;
            ``kernels/reference/inference.py`` says what they are where I is not a multiple of 128.
        topk_weights: (T, K) float32. K at most 16.
        topk_ids: (T, K) int32 or int64.
        x_scale: float32, for e4m3 x only: (T, H / 128) if ``x_scale_layout`` is ``"token_major"``, (H / 128, T) if
            ``"block_major"``; any strides.
        expert_map: (number of experts of the model,) int32: global id -> local index, -1 where another rank has it.
            Instead of ``local_expert_offset``.
        local_expert_offset: local expert i is global expert ``offset + i``.
        num_experts: experts of the model; ids at or beyond it are sentinels. None: no upper limit is known, so ids
            beyond the local ones are another rank's.
        gate_up_order: ``"gate_up"`` (vLLM, SGLang, Hugging Face), ``"up_gate"`` (FlashInfer, TensorRT-LLM) or
            ``"interleaved"`` (gate first).
        swiglu_limit: ``silu(min(gate, limit)) * clamp(up, -limit, limit)`` (DeepSeek-V4, GLM-5).
        apply_router_weight_on_input: multiply x by the weight instead of the output (Llama-4); K = 1 only, because
            more choices would need a copy of x each.
        routed_scaling_factor: multiplies the weights of routed experts.
        pow2_scales: round the scales that are made here (of bf16 x and of the intermediate) up to powers of two, for
            checkpoints whose ``scale_fmt`` is ue8m0.
        received_rows: (E_local,) int32, to which the rows that each local expert gets are added; without the shared
            expert's.
        out, workspace, max_tokens_per_chunk: as in ``moe_fp8_ds_routed``; ``workspace_bytes`` counts a shared expert
            as one more choice and one more local expert.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or setting, with the fix.
    """
    request = Request.of(
        x, (x_scale, topk_weights, topk_ids, expert_map, received_rows), out, workspace,
        [w13, w13_scale, w2, w2_scale, *(shared_expert if isinstance(shared_expert, SharedExpert) else ())],
        ("topk", shared_expert is None, x_scale_layout, local_expert_offset, num_experts, gate_up_order, swiglu_limit,
         apply_router_weight_on_input, routed_scaling_factor, pow2_scales, max_tokens_per_chunk),
    )  # fmt: skip
    if (result := request.run()) is not None:
        return result
    order = as_layout(gate_up_order)
    sizes = check_experts(w13, w2, w13_scale, w2_scale, order)
    check_x("x", x, sizes, w13)
    scales = activation_scales(x, x_scale, x_scale_layout)
    check_choices(topk_weights, topk_ids, x)
    num_choices = topk_ids.shape[1]
    checks.flag("apply_router_weight_on_input", apply_router_weight_on_input)
    if apply_router_weight_on_input and num_choices != 1:
        raise ValueError(
            f"apply_router_weight_on_input needs one expert a token (K = 1); got K = {num_choices}. Weigh the outputs "
            "instead (False)."
        )
    offset = as_offset(local_expert_offset)
    _check_placement(expert_map, offset, num_experts, x)
    check_limit("swiglu_limit", swiglu_limit)
    factor = as_factor(routed_scaling_factor)
    checks.flag("pow2_scales", pow2_scales)
    if received_rows is not None:
        check_received(received_rows, w13)
    weights = [w13, w13_scale, w2, w2_scale]
    if shared_expert is not None:
        weights += _shared_weights(shared_expert, sizes, order, w13)
    always_on = int(shared_expert is not None)
    in_use = Sizes(sizes.num_local + always_on, sizes.hidden, sizes.intermediate)
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()

    def part(first: int, end: int) -> TopK:
        return TopK(
            x[first:end], None if scales is None else scales[first:end], weights, topk_weights[first:end],
            topk_ids[first:end], expert_map, offset, num_experts, factor,
            order.value, swiglu_limit, apply_router_weight_on_input, pow2_scales, received_rows,
        )  # fmt: skip

    op = torch.ops.supersonic_moe.moe_fp8_topk.default
    return request.compute(op, part, num_choices + always_on, in_use, max_tokens_per_chunk)


def activation_scales(x: Tensor, x_scale: Tensor | None, layout: str) -> Tensor | None:
    """The (T, H / 128) scales of e4m3 x, or None for bf16 x."""
    if x.dtype is torch.bfloat16:
        if x_scale is not None:
            raise ValueError("x_scale belongs to float8_e4m3fn x; got it with bfloat16 x. Leave it None.")
        return None
    if x.dtype is not E4M3:
        raise TypeError(f"x must be bfloat16 or float8_e4m3fn; got {checks.describe(x)}. Convert it with .bfloat16().")
    if x_scale is None:
        raise ValueError("float8_e4m3fn x needs x_scale; got None. Pass the scales, or x in bfloat16.")
    return check_x_scale("x_scale", x_scale, layout, x)


def check_choices(weights: Tensor, ids: Tensor, x: Tensor) -> None:
    checks.ids("topk_ids", ids, 2)
    checks.size("topk_ids", "one row per token,", ids.shape[0], x.shape[0], "the rows of x")
    if ids.shape[1] > MAX_TOP_K:
        raise ValueError(f"topk_ids must have at most {MAX_TOP_K} choices a token; got {ids.shape[1]}.")
    checks.same_shape("topk_ids", ids, "topk_weights", weights)
    if weights.dtype is not torch.float32:
        raise TypeError(f"topk_weights must be float32; got {checks.describe(weights)}. Convert it with .float().")
    for name, t in (("topk_ids", ids), ("topk_weights", weights)):
        checks.same_device(name, t, "x", x)
        checks.dense(name, t)


def _check_placement(expert_map: Tensor | None, offset: int, num_experts: int | None, x: Tensor) -> None:
    if num_experts is not None:
        checks.positive("num_experts", num_experts)
        if num_experts > LARGEST_ID:
            raise ValueError(f"num_experts must fit into 32 bits, as ids do; got {num_experts}. None sets no limit.")
    if expert_map is None:
        return
    if offset:
        raise ValueError(
            f"expert_map and local_expert_offset say the same thing; got both, with offset {offset}. Pass one of them."
        )
    checks.tensor("expert_map", expert_map, 1, "(number of experts of the model,)")
    if expert_map.dtype is not torch.int32:
        raise TypeError(
            f"expert_map must be int32; got {checks.describe(expert_map)}. Convert it with .to(torch.int32)."
        )
    checks.same_device("expert_map", expert_map, "x", x)
    checks.dense("expert_map", expert_map)
    checks.positive("the length of expert_map", expert_map.shape[0])
    if num_experts is not None:
        checks.size("expert_map", "length", expert_map.shape[0], num_experts, "num_experts")


def check_received(received_rows: Tensor, w13: Tensor) -> None:
    checks.tensor("received_rows", received_rows, 1, "(E,)")
    if received_rows.dtype is not torch.int32:
        raise TypeError(
            f"received_rows must be int32; got {checks.describe(received_rows)}. Use torch.zeros(n, dtype=torch.int32)."
        )
    checks.size("received_rows", "length", received_rows.shape[0], w13.shape[0], "the experts of w13")
    checks.same_device("received_rows", received_rows, "w13", w13)
    checks.dense("received_rows", received_rows)


def _shared_weights(shared: SharedExpert, sizes: Sizes, order: GateUpLayout, w13: Tensor) -> list[Tensor]:
    """Its four tensors with a leading dimension of one expert, in the order of the op."""
    if not isinstance(shared, SharedExpert):
        raise TypeError(
            f"shared_expert must be a SharedExpert; got {checks.describe(shared)}. Name its tensors: "
            "SharedExpert(w13=..., w2=..., w13_scale=..., w2_scale=...)."
        )
    for name, t, shape in (
        ("w13", shared.w13, "(2 I, H)"),
        ("w2", shared.w2, "(H, I)"),
        ("w13_scale", shared.w13_scale, "(row blocks, H / 128)"),
        ("w2_scale", shared.w2_scale, "(H / 128, I / 128)"),
    ):
        checks.tensor(f"shared_expert.{name}", t, 2, shape)
    one = SharedExpert(*(t[None] for t in shared))
    own = check_experts(*one, order, of="shared_expert.")
    if sizes.num_local == MAX_LOCAL_EXPERTS:
        raise ValueError(
            f"shared_expert counts as one more local expert, and {MAX_LOCAL_EXPERTS} is the most; got "
            f"{sizes.num_local} routed ones. Spread the experts over more ranks."
        )
    checks.size("shared_expert.w13", "H", own.hidden, sizes.hidden, "H of w13")
    checks.size("shared_expert.w2", "I", own.intermediate, sizes.intermediate, "I of w2: it runs as one more expert")
    checks.same_device("shared_expert.w13", one.w13, "w13", w13)
    return [one.w13, one.w13_scale, one.w2, one.w2_scale]
