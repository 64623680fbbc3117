"""The weights of an experts module of Transformers in the shapes of this package."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from supersonic_moe import checks


class Weights(NamedTuple):
    w1: Tensor
    """(E, N1, H)"""
    b1: Tensor | None
    """(E, N1)"""
    w2: Tensor
    """(E, H, I)"""
    b2: Tensor | None
    """(E, H)"""


def is_decorated(module: nn.Module) -> bool:
    """Whether the library lets a backend compute this module."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate")


_ASKS_A_BACKEND = use_experts_implementation(type("_Experts", (nn.Module,), {})).forward.__code__
"""Of the forward that the library's decorator gives to a class."""


def asks_a_backend(module: nn.Module) -> bool:
    """Whether a decorated module still runs the forward of the decorator, alone or inside another function (of
    accelerate, or a parallel plan of the library), and not one of a subclass or of a user.
    """
    return _calls_it(module.__dict__.get("_old_forward", module.forward), 3)


def _calls_it(function: Any, depth: int) -> bool:
    function = getattr(function, "__func__", function)
    if getattr(function, "__code__", None) is _ASKS_A_BACKEND:
        return True
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    inner = [getattr(function, "func", None), getattr(function, "__wrapped__", None), *cells]
    return depth > 0 and any(callable(f) and _calls_it(f, depth - 1) for f in inner)


def weights_of(experts: nn.Module) -> Weights:
    """Views of the module's parameters. Each is read once: an adapter (PEFT) builds a new tensor at every reading.

    The width of the hidden states is that of the weights: some models run their experts in a latent space.
    """
    module: Any = experts
    first = "gate_up_proj" if module.has_gate else "up_proj"
    w1, w2 = getattr(module, first), module.down_proj
    for name, w in ((first, w1), ("down_proj", w2)):
        if not w.is_floating_point():
            raise TypeError(
                f"weights of experts must be floating; got {checks.describe(w)} for {name} of "
                f"{type(experts).__name__}. Use experts_implementation='eager', or dequantize them."
            )
    if module.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    if not module.has_bias:
        return Weights(w1, None, w2, None)
    return Weights(w1, getattr(module, f"{first}_bias"), w2, module.down_proj_bias)
