"""The weights of an experts module of Transformers in the shapes of this package."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


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


def weights_of(experts: nn.Module) -> Weights:
    """Views of the module's parameters. Each is read once: an adapter (PEFT) builds a new tensor at every reading.

    The width of the hidden states is that of the weights: some models run their experts in a latent space.
    """
    module: Any = experts
    first = "gate_up_proj" if module.has_gate else "up_proj"
    w1, w2 = getattr(module, first), module.down_proj
    if module.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    if not module.has_bias:
        return Weights(w1, None, w2, None)
    return Weights(w1, getattr(module, f"{first}_bias"), w2, module.down_proj_bias)
