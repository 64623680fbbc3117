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

from supersonic_moe import checks
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
    w1, w2 = _expert_first(w1, w2)
    router: TopKRouter = SoftmaxAfterTopK()
    if not is_softmax_over_topk:
        router = SoftmaxBeforeTopK(renormalize=norm_topk_probs)
    out, logits, counts = moe_layer(
        x,
        router_w,
        w1,
        w2,
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
    any number of experts a token. ``E`` is ignored, as in SonicMoE: w2 has it. Tokens outside [0, T) and experts
    outside [0, E) are left out.
    """
    w1, w2 = _expert_first(w1, w2)
    checks.tensor("x", x, 2, "(T, H)")
    plan = plan_from_triples(token_indices, expert_indices, x.shape[0], w2.shape[0])
    out = experts_from_plan(
        x,
        router_scores,
        plan,
        w1,
        w2,
        b1=b1,
        b2=b2,
        activation=_activation(activation_type),
        layout=_layout(concat_layout),
        inference=is_inference_mode_enabled,
    )
    return out, plan.expert_counts


def _expert_first(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """(E, N1, H) and (E, H, I)"""
    checks.tensor("w1", w1, 3, "(2I, H, E)")
    checks.tensor("w2", w2, 3, "(H, I, E)")
    if w1.shape[2] != w2.shape[2]:
        raise ValueError(
            f"w1 (2I, H, E) and w2 (H, I, E) must have as many experts, their last dimension; got {tuple(w1.shape)} "
            f"and {tuple(w2.shape)}. Pass weights with the expert first as w.permute(1, 2, 0)."
        )
    return w1.permute(2, 0, 1), w2.permute(2, 0, 1)


def _activation(value: ActivationType | str) -> Activation:
    """Of a name, or of either package's ``ActivationType``."""
    name = value if isinstance(value, str) else getattr(value, "value", None)
    if not isinstance(name, str):
        raise TypeError(
            f"activation_type must be an ActivationType or its name; got {checks.describe(value)}. Use "
            "ActivationType.SWIGLU; an Activation with constants goes to topk_experts or moe_layer."
        )
    return Activation(checks.member("activation", name, ActivationType))


def _layout(concat: bool) -> GateUpLayout:
    return GateUpLayout.GATE_UP if concat else GateUpLayout.INTERLEAVED


enums = SimpleNamespace(ActivationType=ActivationType, is_glu=is_glu)
"""As the module ``sonicmoe.enums``, for callers that were handed the package as an object."""
