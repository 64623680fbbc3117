"""supersonic-moe: the Mixture-of-Experts block of a transformer, fast on NVIDIA Hopper and correct everywhere."""

from supersonic_moe.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.functional import (
    MoEOutput,
    dispatched_experts,
    experts_from_plan,
    moe_layer,
    routed_experts,
    topk_experts,
)
from supersonic_moe.moe import Experts, KernelBackendMoE, MoE
from supersonic_moe.recipe import Bf16Recipe
from supersonic_moe.routing.aux_loss import router_z_loss, switch_load_balancing_loss
from supersonic_moe.routing.plan import (
    RoutingPlan,
    plan_from_deepep,
    plan_from_offsets,
    plan_from_topk,
    plan_from_triples,
)
from supersonic_moe.routing.token_rounding import TokenRounding, token_rounding
from supersonic_moe.routing.topk import SigmoidGroupedTopK, SoftmaxAfterTopK, SoftmaxBeforeTopK, TopKRouter, route

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "ActivationType",
    "Bf16Recipe",
    "Experts",
    "GateUpLayout",
    "KernelBackendMoE",
    "MoE",
    "MoEOutput",
    "TopKRouter",
    "RoutingPlan",
    "SigmoidGroupedTopK",
    "SoftmaxAfterTopK",
    "SoftmaxBeforeTopK",
    "TokenRounding",
    "dispatched_experts",
    "experts_from_plan",
    "moe_layer",
    "plan_from_deepep",
    "plan_from_offsets",
    "plan_from_topk",
    "plan_from_triples",
    "route",
    "routed_experts",
    "router_z_loss",
    "switch_load_balancing_loss",
    "token_rounding",
    "topk_experts",
]
