"""Which experts layers of a model are served, by what, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from supersonic_moe.integrations.transformers import fp8
from supersonic_moe.integrations.transformers.backend import is_ours
from supersonic_moe.integrations.transformers.gates import gate_of
from supersonic_moe.integrations.transformers.weights import weights_of
from supersonic_moe.kernels import registry


class Served(NamedTuple):
    """One layer of experts."""

    layer: str
    """Its name in the model."""
    experts: str
    """Its class."""
    served: bool
    """Whether this package computes it."""
    by: str
    """What computes it."""
    why: str
    """Why it is not served, or not by the fastest way; empty where there is nothing to say."""

    def __str__(self) -> str:
        return f"{self.layer} ({self.experts}): {self.by}" + (f"; {self.why}" if self.why else "")


class Report(tuple[Served, ...]):
    """One line for each layer."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no layer of experts"


def served(model: nn.Module) -> Report:
    """A :class:`Served` for each layer of experts, in the order of the model. Computes nothing.

    A layer that the library does not let a backend compute, as in Llama 4, runs the library's own forward whatever
    ``experts_implementation`` is, without a word; here it is named.
    """
    return Report(_served(name, module) for name, module in _layers(model))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that the library decorates, and what else is called ``experts``; of nested ones the outermost."""
    found = ""
    for name, module in model.named_modules():
        inside = found and name.startswith(f"{found}.")
        if not inside and (_is_decorated(module) or name.rpartition(".")[2] == "experts"):
            found = name
            yield name, module


def _is_decorated(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate")


def _served(name: str, module: Any) -> Served:
    kind = type(module).__name__
    if not _is_decorated(module):
        why = f"the library does not let a backend compute {kind}"
        return Served(name, kind, False, "the library's own forward", why)
    implementation = module.config._experts_implementation
    if not is_ours(implementation):
        why = "call model.set_experts_implementation('supersonic')"
        return Served(name, kind, False, f"the library's {implementation!r}", why)
    if hasattr(module, "down_proj_scale_inv") and fp8.is_quantized(module):
        obstacle = fp8.obstacle(module)
        by = "the fused layer, of weights dequantized in each call" if obstacle else "the FP8 inference operator"
        return Served(name, kind, True, by, obstacle or "")
    return _served_by_the_layer(name, kind, module)


def _served_by_the_layer(name: str, kind: str, module: Any) -> Served:
    w1, _, w2, _ = weights_of(module)
    choice = None
    if w1.device.type != "meta":
        choice = registry.choose(w1.device, w1.dtype, hidden=w2.shape[1], intermediate=w2.shape[2])
    on = "" if choice is None else f" on backend {choice.name!r}"
    gate = gate_of(module)
    if gate is None:
        return Served(name, kind, True, f"two grouped products{on}", "PyTorch's gate runs between them")
    why = "" if choice is None or choice.name != "reference" or w1.device.type == "cpu" else choice.reason
    return Served(name, kind, True, f"the fused layer{on}, {gate.activation.type.value}", why)
