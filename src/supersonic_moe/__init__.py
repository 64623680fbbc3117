"""supersonic-moe: the Mixture-of-Experts block of a transformer, fast on NVIDIA Hopper and correct everywhere.

Names are imported on first use (PEP 562), so that ``supersonic-moe --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supersonic_moe.config.activation import Activation as Activation
    from supersonic_moe.config.activation import ActivationType as ActivationType
    from supersonic_moe.config.activation import GateUpLayout as GateUpLayout
    from supersonic_moe.config.plan import RoutingPlan as RoutingPlan
    from supersonic_moe.config.recipe import Bf16Recipe as Bf16Recipe
    from supersonic_moe.config.recipe import Fp8Recipe as Fp8Recipe
    from supersonic_moe.config.router import SigmoidGroupedTopK as SigmoidGroupedTopK
    from supersonic_moe.config.router import SoftmaxAfterTopK as SoftmaxAfterTopK
    from supersonic_moe.config.router import SoftmaxBeforeTopK as SoftmaxBeforeTopK
    from supersonic_moe.config.router import TokenRounding as TokenRounding
    from supersonic_moe.config.router import TopKRouter as TopKRouter
    from supersonic_moe.functional import MoEOutput as MoEOutput
    from supersonic_moe.functional import dispatched_experts as dispatched_experts
    from supersonic_moe.functional import experts_from_plan as experts_from_plan
    from supersonic_moe.functional import moe_layer as moe_layer
    from supersonic_moe.functional import routed_experts as routed_experts
    from supersonic_moe.functional import topk_experts as topk_experts
    from supersonic_moe.grouped import grouped_linear as grouped_linear
    from supersonic_moe.integrations.mlp_node import SonicMoEMlpNode as SonicMoEMlpNode
    from supersonic_moe.moe import KernelBackendMoE as KernelBackendMoE
    from supersonic_moe.moe import MoE as MoE
    from supersonic_moe.moe import RouterOutput as RouterOutput
    from supersonic_moe.moe import constant_weights as constant_weights
    from supersonic_moe.moe import fp8_training as fp8_training
    from supersonic_moe.moe import update_correction_bias as update_correction_bias
    from supersonic_moe.parts import Experts as Experts
    from supersonic_moe.parts import Router as Router
    from supersonic_moe.quantization.weight_cache import WeightCache as WeightCache
    from supersonic_moe.routing.aux_loss import router_z_loss as router_z_loss
    from supersonic_moe.routing.aux_loss import sequence_expert_counts as sequence_expert_counts
    from supersonic_moe.routing.aux_loss import sequence_load_balancing_loss as sequence_load_balancing_loss
    from supersonic_moe.routing.aux_loss import switch_load_balancing_loss as switch_load_balancing_loss
    from supersonic_moe.routing.plan import plan_from_deepep as plan_from_deepep
    from supersonic_moe.routing.plan import plan_from_offsets as plan_from_offsets
    from supersonic_moe.routing.plan import plan_from_topk as plan_from_topk
    from supersonic_moe.routing.plan import plan_from_triples as plan_from_triples
    from supersonic_moe.routing.token_rounding import token_rounding as token_rounding
    from supersonic_moe.routing.topk import route as route

__version__ = "0.1.0"

_HOME = {
    "config.activation": ("Activation", "ActivationType", "GateUpLayout"),
    "config.plan": ("RoutingPlan",),
    "config.recipe": ("Bf16Recipe", "Fp8Recipe"),
    "config.router": ("SigmoidGroupedTopK", "SoftmaxAfterTopK", "SoftmaxBeforeTopK", "TokenRounding", "TopKRouter"),
    "functional": (
        "MoEOutput",
        "dispatched_experts",
        "experts_from_plan",
        "moe_layer",
        "routed_experts",
        "topk_experts",
    ),
    "grouped": ("grouped_linear",),
    "integrations.mlp_node": ("SonicMoEMlpNode",),
    "moe": (
        "KernelBackendMoE",
        "MoE",
        "RouterOutput",
        "constant_weights",
        "fp8_training",
        "update_correction_bias",
    ),
    "parts": ("Experts", "Router"),
    "quantization.weight_cache": ("WeightCache",),
    "routing.aux_loss": (
        "router_z_loss",
        "sequence_expert_counts",
        "sequence_load_balancing_loss",
        "switch_load_balancing_loss",
    ),
    "routing.plan": ("plan_from_deepep", "plan_from_offsets", "plan_from_topk", "plan_from_triples"),
    "routing.token_rounding": ("token_rounding",),
    "routing.topk": ("route",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)

LOG_LEVELS = "DEBUG, INFO, WARNING, ERROR, CRITICAL"


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'supersonic_moe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"supersonic_moe.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if level := os.environ.get("SUPERSONIC_MOE_LOG_LEVEL"):
    log = logging.getLogger("supersonic_moe")
    if level.upper() in logging.getLevelNamesMapping():
        log.setLevel(level.upper())
    else:
        log.warning("SUPERSONIC_MOE_LOG_LEVEL must be one of %s; got %r, which changes nothing", LOG_LEVELS, level)
