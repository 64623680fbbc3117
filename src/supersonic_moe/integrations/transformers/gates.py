"""What lies between the two projections of an experts module of Transformers, as an activation of ours.

A gated module computes ``_apply_gate(x W1ᵀ + b1)``, an ungated one ``act_fn(x W1ᵀ + b1)``. Both are recognised by what
they are, the function and the type, never by strings of a config, which do not tell: gpt-oss, DeepSeek-V4 and
MiniMax-M3 all say ``hidden_act="silu"``.

    the library's default gate      act_fn(gate) · up, [gate; up]       SwiGLU, GeGLU, ReGLU of act_fn
    a gate of the model's own       OWN_GATES                           SwiGLU with its constants
    anything else                   None: PyTorch's gate runs between two grouped products (``backend.py``)
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import activations as library
from transformers.integrations.finegrained_fp8 import FP8Experts

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.private_api import constant_when_compiled, runs_hooks

log = logging.getLogger("supersonic_moe")


class OwnGate(NamedTuple):
    """SwiGLU with constants that the module holds in attributes."""

    alpha: str | None
    """Attribute with alpha; None: 1."""
    limit: str
    """Attribute with the clamp."""
    up_offset: float = 0.0
    layout: GateUpLayout = GateUpLayout.GATE_UP
    inner: bool = False
    """Whether the gate calls ``act_fn``, which must be SiLU then, or spells SiLU out."""


OWN_GATES = {
    "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts": OwnGate(None, "limit", inner=True),
    "glm5_next.modeling_glm5_next.Glm5NextTextExperts": OwnGate(None, "swiglu_limit"),
    "hy_v4.modeling_hy_v4.HYV4Experts": OwnGate(None, "swiglu_limit"),
    "gpt_oss.modeling_gpt_oss.GptOssExperts": OwnGate("alpha", "limit", 1.0, GateUpLayout.INTERLEAVED),
    "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts": OwnGate("alpha", "limit", 1.0),
    "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": OwnGate("swiglu_alpha", "swiglu_limit", 1.0),
}
"""Gates that a model defines for itself, by the module (below ``transformers.models``) and class of ``_apply_gate``."""

DEFAULT_GATE = "transformers.integrations.moe._default_apply_gate"
"""``act_fn(gate) * up`` of [gate; up]: what the library gives to a class without a gate of its own."""

FP8_GATE = "transformers.integrations.finegrained_fp8.FP8Experts"
"""The class that replaces every experts module of an FP8 checkpoint. Its gate has three branches, after the module's
attributes.
"""

INNER: dict[Any, str] = {
    library.SiLUActivation: "silu",
    nn.SiLU: "silu",
    F.silu: "silu",
    library.GELUActivation: "gelu",
    F.gelu: "gelu",
    library.GELUTanh: "gelu_tanh",
    library.NewGELUActivation: "gelu_tanh",
    library.QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu",
    F.relu: "relu",
    library.ReLUSquaredActivation: "relu_sq",
}
"""Inner activations: the type of a module, or a function."""

_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in INNER if hasattr(kind, "forward")}
"""What a module of these types computes. Who replaces it, for all, has another activation."""

_GATED = {
    "silu": Activation(ActivationType.SWIGLU),
    "quick_gelu": Activation(ActivationType.SWIGLU, alpha=1.702),
    "gelu": Activation(ActivationType.GEGLU),
    "gelu_tanh": Activation(ActivationType.GEGLU_TANH),
    "relu": Activation(ActivationType.REGLU),
}
_UNGATED = {name: Activation(ActivationType(name)) for name in ("silu", "gelu", "gelu_tanh", "relu", "relu_sq")}

RULES: dict[str, Gate | OwnGate] = {
    **{f"gated {name}": Gate(activation, GateUpLayout.GATE_UP) for name, activation in _GATED.items()},
    **{f"ungated {name}": Gate(activation, GateUpLayout.GATE_UP) for name, activation in _UNGATED.items()},
    **OWN_GATES,
    f"{FP8_GATE} alpha": OwnGate("swiglu_alpha", "swiglu_limit", 1.0),
    f"{FP8_GATE} limit": OwnGate(None, "limit", inner=True),
}


CHANGED = "changed"
"""In the place of a gate or an inner activation that is not what its type says: of one module, or with hooks."""


def gate_of(experts: nn.Module) -> Gate | None:
    """The gate of an experts module; None if nobody told us what it computes, with one warning for each class."""
    kind: Any = type(experts)
    act: Any = getattr(experts, "act_fn", None)
    inner = _type_of(act) if isinstance(act, nn.Module) else act
    function, branch = None, ""
    if experts.has_gate:
        function = CHANGED if "_apply_gate" in experts.__dict__ else kind._apply_gate
        if isinstance(experts, FP8Experts):
            branch = "alpha" if experts.swiglu_alpha is not None else "limit" if experts.limit is not None else ""
    rule = RULES.get(_rule(kind, function, inner, branch))
    if not isinstance(rule, OwnGate):
        return rule
    alpha: Any = 1.0 if rule.alpha is None else getattr(experts, rule.alpha)
    limit: Any = getattr(experts, rule.limit)
    if not (_is_constant(alpha) and (limit is None or (_is_constant(limit) and limit > 0))):
        _rule(kind, CHANGED, inner, branch)  # learned, or no clamp: warns
        return None
    if torch.compiler.is_compiling():
        activation = _COMMON.get((alpha, limit, rule.up_offset))
        return None if activation is None else Gate(activation, rule.layout)
    return Gate(_swiglu(alpha, limit, rule.up_offset), rule.layout)


def _type_of(act: nn.Module) -> Any:
    return CHANGED if runs_hooks(act) else type(act)


def _is_constant(value: object) -> bool:
    return isinstance(value, int | float) and -math.inf < value < math.inf


def class_name(experts: nn.Module) -> str:
    return f"{type(experts).__module__}.{type(experts).__qualname__}"


def _name(function: Any) -> str:
    if not hasattr(function, "__qualname__"):  # CHANGED, or an object that can be called
        return ""
    return f"{function.__module__}.{function.__qualname__.removesuffix('._apply_gate')}"


@constant_when_compiled
def _rule(experts: Any, gate: Any, inner: Any, branch: str) -> str:
    """A key of :data:`RULES`, or "". ``gate``: the function, None without one; ``inner``: the activation's type, or
    itself where it is no module; ``branch``: of FP8_GATE. A constant to the compiler, which cannot trace the names of
    functions.
    """
    try:
        name = INNER.get(inner, "")
    except TypeError:  # an object that can be called, without a hash
        name = ""
    if name and inner in _FORWARDS and inner.forward is not _FORWARDS[inner]:
        name = ""
    return _cached_rule(experts, gate, name, branch)


@functools.cache
def _cached_rule(experts: Any, gate: Any, name: str, branch: str) -> str:
    """``name``: the value in INNER, or "". A function of the user's own would keep what it is bound to."""
    function = DEFAULT_GATE if gate is None else _name(gate)
    if function == DEFAULT_GATE or (function == FP8_GATE and not branch):
        key = f"ungated {name}" if gate is None else f"gated {name}"
    else:
        key = f"{FP8_GATE} {branch}" if function == FP8_GATE else function.removeprefix("transformers.models.")
    rule = RULES.get(key)
    if rule is None or (isinstance(rule, OwnGate) and rule.inner and name != "silu"):
        log.warning(
            "%s.%s: its gate is not known to supersonic-moe, so it runs as PyTorch between two grouped products. The "
            "result is the same; the layer is slower, and keeps more for backward.",
            experts.__module__,
            experts.__qualname__,
        )
        return ""
    return key


@functools.cache
def _swiglu(alpha: float, limit: float, up_offset: float) -> Activation:
    return Activation(ActivationType.SWIGLU, alpha=alpha, limit=limit, up_offset=up_offset)


_COMMON = {
    (alpha, float(limit), up_offset): _swiglu(alpha, float(limit), up_offset)
    for alpha, up_offset in ((1.0, 0.0), (1.702, 1.0))
    for limit in range(1, 33)
}
"""What a traced call may have: looking a float up makes it a constant of the graph, and building an activation of one
that may change does not trace. Other constants run as PyTorch between two grouped products when compiled.
"""
