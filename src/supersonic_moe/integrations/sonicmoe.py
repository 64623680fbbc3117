"""SonicMoE's entry points, version 0.1.2, on this package: code written for it changes an import.

    from sonicmoe import MoE, KernelBackendMoE              from supersonic_moe.integrations.sonicmoe import ...
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer, moe_general_routing_inputs

Argument order, layouts and results are SonicMoE's (arXiv 2512.14080):

    x (T, H) · w1 (2I, H, E) or, ungated, (I, H, E) · b1 (E, 2I) · w2 (H, I, E) · b2 (E, H)

The expert is the last axis of a weight and the first in memory: a (E, N, K) parameter is passed as
``w.permute(1, 2, 0)``. Gate and up rows of w1 alternate, or with ``concat_layout`` all gate rows come first.
``stream_id`` is ignored, as in SonicMoE: kernels run on torch's current stream.

Beyond SonicMoE: one bias alone works, ungated activations do, triples may come in any order, experts outside [0, E) are
skipped.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.config.router import SoftmaxAfterTopK, SoftmaxBeforeTopK, TopKRouter
from supersonic_moe.functional import experts_from_plan, moe_layer
from supersonic_moe.moe import KernelBackendMoE, MoE
from supersonic_moe.routing.plan import plan_from_triples

__all__ = [
    "ActivationType",
    "KernelBackendMoE",
    "MoE",
    "enums",
    "is_glu",
    "moe_TC_softmax_topk_layer",
    "moe_general_routing_inputs",
]


def is_glu(activation_type: ActivationType | str) -> bool:
    """Whether w1 has a gate and an up row for each activation."""
    return _activation(activation_type).gated


def moe_TC_softmax_topk_layer(
    x: Tensor,
    router_w: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    K: int,
    stream_id: int | None = None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    is_softmax_over_topk: bool = True,
    norm_topk_probs: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output (T, H), router logits (T, E), rows of each expert (E,) int32) of router, top-k and experts.

    Args:
        router_w: (E, H). Other shapes: module docstring.
        is_softmax_over_topk: softmax of the K chosen logits; False: the K largest of the softmax of all.
        norm_topk_probs: divide these K by their sum; without effect on a softmax of the chosen logits.
    """
    router: TopKRouter = SoftmaxAfterTopK()
    if not is_softmax_over_topk:
        router = SoftmaxBeforeTopK(renormalize=norm_topk_probs)
    out, logits, counts = moe_layer(
        x,
        router_w,
        w1.permute(2, 0, 1),
        w2.permute(2, 0, 1),
        K,
        router=router,
        b1=b1,
        b2=b2,
        activation=_activation(activation_type),
        layout=_layout(concat_layout),
        inference=is_inference_mode_enabled,
    )
    return out, logits, counts


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int | None = None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output (T, H), rows of each expert (E,) int32) of (token, expert, score) triples: three tensors of one length,
    any number of experts a token. ``E`` is ignored, as in SonicMoE: w2 has it.
    """
    plan = plan_from_triples(token_indices, expert_indices, x.shape[0], w2.shape[2])
    out = experts_from_plan(
        x,
        router_scores,
        plan,
        w1.permute(2, 0, 1),
        w2.permute(2, 0, 1),
        b1=b1,
        b2=b2,
        activation=_activation(activation_type),
        layout=_layout(concat_layout),
        inference=is_inference_mode_enabled,
    )
    return out, plan.expert_counts


def _activation(value: ActivationType | str) -> Activation:
    """Of a name, or of either package's ``ActivationType``."""
    return Activation(ActivationType(value if isinstance(value, str) else value.value))


def _layout(concat: bool) -> GateUpLayout:
    return GateUpLayout.GATE_UP if concat else GateUpLayout.INTERLEAVED


enums = SimpleNamespace(ActivationType=ActivationType, is_glu=is_glu)
"""As the module ``sonicmoe.enums``, for callers that were handed the package as an object."""
