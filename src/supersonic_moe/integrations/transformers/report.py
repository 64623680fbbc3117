"""Which experts layers of a model are served, by what, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from supersonic_moe import checks
from supersonic_moe.config.recipe import Fp8Recipe, Recipe
from supersonic_moe.integrations.transformers import fp8
from supersonic_moe.integrations.transformers.backend import recipe_of
from supersonic_moe.integrations.transformers.gates import gate_of
from supersonic_moe.integrations.transformers.weights import asks_a_backend, is_decorated, weights_of
from supersonic_moe.kernels import registry

REFUSED = "nothing, it is refused"


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {checks.describe(model)}.")
    return Report(_served(name, module) for name, module in _layers(model))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that the library decorates, inside wrappers too (PEFT's for adapters on weights), what else is called
    ``experts``, and classes named MoE that hold neither (JetMoe); of nested ones the outermost.
    """
    found = ""
    for name, module in model.named_modules():
        inside = found and name.startswith(f"{found}.")
        if not inside and (_are_experts(name, module) or _is_moe_without(module)):
            found = name
            yield name, module


def _are_experts(name: str, module: nn.Module) -> bool:
    if is_decorated(module):
        return True
    return name.rpartition(".")[2] == "experts" and not any(map(is_decorated, module.modules()))


def _is_moe_without(module: nn.Module) -> bool:
    return type(module).__name__.endswith("MoE") and not any(_are_experts(*part) for part in module.named_modules())


def _served(name: str, module: Any) -> Served:
    kind = type(module).__name__
    if not is_decorated(module):
        why = f"the library does not let a backend compute {kind}"
        return Served(name, kind, False, "the library's own forward", why)
    if not asks_a_backend(module):
        return Served(name, kind, False, "a forward of its own", "it does not ask a backend: its forward was replaced")
    implementation = module.config._experts_implementation
    recipe = recipe_of(implementation)
    if recipe is None:
        why = "call model.set_experts_implementation('supersonic')"
        return Served(name, kind, False, f"the library's {implementation!r}", why)
    if hasattr(module, "down_proj_scale_inv") and fp8.is_quantized(module):
        if (refusal := fp8.refusal(module)) is not None:
            return Served(name, kind, False, REFUSED, refusal)
        obstacle = fp8.obstacle(module)
        by = "the fused layer, of weights dequantized in each call" if obstacle else "the FP8 inference operator"
        return Served(name, kind, True, by, obstacle or "")
    return _served_by_the_layer(name, kind, module, recipe)


def _served_by_the_layer(name: str, kind: str, module: Any, recipe: Recipe) -> Served:
    try:
        w1, _, w2, _ = weights_of(module)
    except TypeError as error:
        return Served(name, kind, False, REFUSED, str(error))
    in_fp8, where, why = isinstance(recipe, Fp8Recipe), "", ""
    if w1.device.type != "meta":
        _, hidden, intermediate = w2.shape
        try:
            if in_fp8:
                choice = registry.choose_fp8(w1.device, hidden=hidden, intermediate=intermediate)
            else:
                choice = registry.choose(w1.device, w1.dtype, hidden=hidden, intermediate=intermediate)
        except ValueError as error:
            return Served(name, kind, False, REFUSED, str(error))
        where = f" on backend {choice.name!r}"
        why = choice.reason if choice.name == "reference" and w1.device.type != "cpu" else ""
    if in_fp8 and w1.dtype is not torch.bfloat16:
        why = f"under torch.autocast to bfloat16 only, for its weights are {str(w1.dtype).removeprefix('torch.')}"
    numerics = " in FP8" if in_fp8 else ""
    gate = gate_of(module)
    if gate is None:
        return Served(name, kind, True, f"two grouped products{numerics}{where}", "PyTorch's gate runs between them")
    return Served(name, kind, True, f"the fused layer{numerics}{where}, {gate.activation.type.value}", why)
