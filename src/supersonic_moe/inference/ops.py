"""The two ops of ``torch.library``: one for each entry point. Each writes ``out``; neither waits for the device.

Weights travel as flat lists [w13, w13_scale, w2, w2_scale], with the four tensors of a shared expert behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from supersonic_moe.autocast import without_autocast
from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.kernels import reference, registry
from supersonic_moe.kernels.reference.inference import Fp8Experts

if TYPE_CHECKING:
    from supersonic_moe.inference.sm90 import Call

torch.library.define(
    "supersonic_moe::moe_fp8_ds_routed",
    "(Tensor logits, Tensor? bias, Tensor x, Tensor x_scale, Tensor[] weights, int offset, int top_k, int n_group, "
    "int topk_group, str scoring, float factor, str order, Tensor(a!) out, Tensor(b!)? workspace) -> ()",
)
torch.library.define(
    "supersonic_moe::moe_fp8_topk",
    "(Tensor x, Tensor? x_scale, Tensor[] weights, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "int offset, int? num_experts, float factor, str order, float? limit, bool weight_on_input, bool pow2, "
    "Tensor(c!)? received, Tensor(a!) out, Tensor(b!)? workspace) -> ()",
)


class DsRouted(NamedTuple):
    """Arguments of the op but for its buffers."""

    logits: Tensor
    bias: Tensor | None
    x: Tensor
    x_scale: Tensor
    weights: list[Tensor]
    offset: int
    top_k: int
    n_group: int
    topk_group: int
    scoring: str
    factor: float
    order: str

    @property
    def rule(self) -> GroupedRouting:
        return GroupedRouting(
            num_experts=self.logits.shape[1],
            top_k=self.top_k,
            n_group=self.n_group,
            topk_group=self.topk_group,
            scoring=Scoring(self.scoring),
            scaling_factor=self.factor,
        )

    def call(self, out: Tensor) -> Call:
        from supersonic_moe.inference import sm90  # Hopper only

        layer = sm90.Layer(Fp8Experts(*self.weights), None, GateUpLayout(self.order))
        return sm90.ds_routed(self.logits, self.bias, self.rule, self.offset, self.x, self.x_scale, layer, out)

    def reference(self) -> Tensor:
        experts = Fp8Experts(*self.weights)
        topk_weights, topk_ids = reference.route_grouped(self.logits, self.bias, self.rule)
        ids = reference.local_ids(topk_ids, experts.w13.shape[0], self.offset)
        return reference.moe_fp8(self.x, self.x_scale, experts, topk_weights, ids, order=GateUpLayout(self.order))


class TopK(NamedTuple):
    """Arguments of the op but for its buffers."""

    x: Tensor
    x_scale: Tensor | None
    weights: list[Tensor]
    topk_weights: Tensor
    topk_ids: Tensor
    expert_map: Tensor | None
    offset: int
    num_experts: int | None
    factor: float
    order: str
    limit: float | None
    weight_on_input: bool
    pow2: bool
    received: Tensor | None

    @property
    def shared(self) -> Fp8Experts | None:
        return Fp8Experts(*self.weights[4:]) if self.weights[4:] else None

    def call(self, out: Tensor) -> Call:
        from supersonic_moe.inference import sm90  # Hopper only

        order = GateUpLayout(self.order)
        layer = sm90.Layer(Fp8Experts(*self.weights[:4]), self.shared, order, self.limit, self.pow2)
        return sm90.topk(
            self.topk_ids, self.topk_weights, self.expert_map, self.offset, self.num_experts, self.factor,
            self.weight_on_input, self.x, self.x_scale, layer, out, self.received,
        )  # fmt: skip

    def reference(self) -> Tensor:
        experts = Fp8Experts(*self.weights[:4])
        local = experts.w13.shape[0]
        ids = reference.local_ids(self.topk_ids, local, self.offset, self.num_experts, self.expert_map)
        if self.received is not None:
            self.received.add_(torch.bincount(ids[ids >= 0], minlength=local).int())
        return reference.moe_fp8(
            self.x,
            self.x_scale,
            experts,
            self.topk_weights,
            ids,
            order=GateUpLayout(self.order),
            limit=self.limit,
            pow2=self.pow2,
            weight_on_input=self.weight_on_input,
            scaling_factor=self.factor,
            shared=self.shared,
        )


Arguments: TypeAlias = DsRouted | TopK


def _run(arguments: Arguments, out: Tensor, workspace: Tensor | None) -> None:
    if on_sm90(arguments.x):
        from supersonic_moe.inference import sm90

        sm90.run(arguments.call(out), workspace)
    else:
        with torch.no_grad(), without_autocast(arguments.x):  # kernels record no gradient either
            out.copy_(arguments.reference())


@torch.library.impl("supersonic_moe::moe_fp8_ds_routed", ("cpu", "cuda"))
def _ds_routed(*arguments: Any) -> None:
    *values, out, workspace = arguments
    _run(DsRouted(*values), out, workspace)


@torch.library.impl("supersonic_moe::moe_fp8_topk", ("cpu", "cuda"))
def _topk(*arguments: Any) -> None:
    *values, out, workspace = arguments
    _run(TopK(*values), out, workspace)


@torch.library.register_fake("supersonic_moe::moe_fp8_ds_routed")  # type: ignore[untyped-decorator]
def _ds_routed_fake(*arguments: object) -> None:
    return None


@torch.library.register_fake("supersonic_moe::moe_fp8_topk")  # type: ignore[untyped-decorator]
def _topk_fake(*arguments: object) -> None:
    return None


def on_sm90(x: Tensor) -> bool:
    """Whether the kernels of a Hopper GPU run; else the reference, on a CPU, and with a warning on other GPUs, where it
    waits for the host.
    """
    return registry.choose(x.device, torch.bfloat16, hidden=x.shape[1]).name == "sm90"
