"""The two ops of ``torch.library``: one for each entry point. Each writes ``out``; neither waits for the device.

Weights travel as flat lists [w13, w13_scale, w2, w2_scale], with the four tensors of a shared expert behind them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.kernels import reference, registry
from supersonic_moe.kernels.reference.inference import Fp8Experts

torch.library.define(
    "supersonic_moe::moe_fp8_ds_routed",
    "(Tensor logits, Tensor? bias, Tensor x, Tensor x_scale, Tensor[] weights, int offset, int top_k, int n_group, "
    "int topk_group, str scoring, float factor, str order, Tensor(a!) out, Tensor(b!)? workspace) -> ()",
)
torch.library.define(
    "supersonic_moe::moe_fp8_topk",
    "(Tensor x, Tensor? x_scale, Tensor[] weights, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "int offset, int? num_experts, float factor, str order, float? limit, bool weight_on_input, bool pow2, "
    "Tensor(a!) out, Tensor(b!)? workspace) -> ()",
)


@torch.library.impl("supersonic_moe::moe_fp8_ds_routed", ("cpu", "cuda"))
def _ds_routed(
    logits: Tensor,
    bias: Tensor | None,
    x: Tensor,
    x_scale: Tensor,
    weights: list[Tensor],
    offset: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    scoring: str,
    factor: float,
    order: str,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    rule = GroupedRouting(
        num_experts=logits.shape[1],
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scoring=Scoring(scoring),
        scaling_factor=factor,
    )
    experts = Fp8Experts(*weights)
    if (sm90 := _sm90(x)) is not None:
        layer = sm90.Layer(experts, None, GateUpLayout(order))
        sm90.ds_routed(logits, bias, rule, offset, x, x_scale, layer, out, workspace)
        return
    topk_weights, topk_ids = reference.route_grouped(logits, bias, rule)
    ids = reference.local_ids(topk_ids, experts.w13.shape[0], offset)
    out.copy_(reference.moe_fp8(x, x_scale, experts, topk_weights, ids, order=GateUpLayout(order)))


@torch.library.impl("supersonic_moe::moe_fp8_topk", ("cpu", "cuda"))
def _topk(
    x: Tensor,
    x_scale: Tensor | None,
    weights: list[Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    offset: int,
    num_experts: int | None,
    factor: float,
    order: str,
    limit: float | None,
    weight_on_input: bool,
    pow2: bool,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    experts = Fp8Experts(*weights[:4])
    shared = Fp8Experts(*weights[4:]) if weights[4:] else None
    if (sm90 := _sm90(x)) is not None:
        layer = sm90.Layer(experts, shared, GateUpLayout(order), limit, pow2)
        sm90.topk(
            topk_ids, topk_weights, expert_map, offset, num_experts, factor, weight_on_input, x, x_scale, layer, out,
            workspace,
        )  # fmt: skip
        return
    result = reference.moe_fp8(
        x,
        x_scale,
        experts,
        topk_weights,
        reference.local_ids(topk_ids, experts.w13.shape[0], offset, num_experts, expert_map),
        order=GateUpLayout(order),
        limit=limit,
        pow2=pow2,
        weight_on_input=weight_on_input,
        scaling_factor=factor,
        shared=shared,
    )
    out.copy_(result)


@torch.library.register_fake("supersonic_moe::moe_fp8_ds_routed")  # type: ignore[untyped-decorator]
def _ds_routed_fake(*arguments: object) -> None:
    return None


@torch.library.register_fake("supersonic_moe::moe_fp8_topk")  # type: ignore[untyped-decorator]
def _topk_fake(*arguments: object) -> None:
    return None


@functools.cache
def _sm90_module() -> ModuleType:
    return importlib.import_module("supersonic_moe.inference.sm90")


def _sm90(x: Tensor) -> ModuleType | None:
    """The kernels of a Hopper GPU; None: the reference, on a CPU, and with a warning on other GPUs, where it waits for
    the host.
    """
    choice = registry.choose(x.device, torch.bfloat16, hidden=x.shape[1])
    return _sm90_module() if choice.name == "sm90" else None
