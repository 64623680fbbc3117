"""Numeric recipes: one immutable object says how a layer computes; it is resolved once, at construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args, get_type_hints

from supersonic_moe import checks


@dataclass(frozen=True)
class Bf16Recipe:
    """Compute in the dtype of the inputs (BF16 in practice): fp32 accumulation, activation in fp32, one rounding at
    each store.
    """


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """Multiply in e4m3 with a scale for every block: 1 x 128 of activations along the contraction, 128 x 128 of weights
    (``quantization/block_format.py``), and with ``wgrad="fp8"`` 128 x 128 of the operands of the weight gradients that
    the layer computes itself. Sums, activations and gradients of biases and scores stay in fp32.
    """

    scale: Literal["fp32", "pow2"] = "fp32"
    """Scales of the blocks. "pow2" rounds them up to powers of two, as UE8M0 checkpoints have them. That costs 3 to 6 %
    more error on Gaussian data and up to 40 % with outlier channels, whose elements fp32 scales represent exactly.
    """
    save_preactivation: Literal["fp8", "int8", "bf16", "recompute"] = "fp8"
    """What backward knows of the pre-activation: 1 byte an element, in e4m3 with a scale for 128 columns or in int8
    with one for 32; 2 bytes; or nothing, at the price of running the up-projection again. "int8" leaves gradients with
    nearly the error of "bf16", but elements far below the largest of their 32 lose digits. On Hopper it is fused for
    SwiGLU.
    """
    wgrad: Literal["fp8", "bf16"] = "fp8"
    """Operands of the weight gradients. "fp8" multiplies faster than "bf16" and pays for it with transposed copies and
    one rounding more; the whole step is faster with it (docs/log.md).
    """
    keep_transposed: Literal[True, False] = True
    """Keep the transposed FP8 weights from forward to backward, 1 byte a weight. False quantizes the BF16 weights once
    more in backward, 4 bytes a weight through DRAM, and keeps nothing: for FSDP, where no whole copy of the weights
    should outlive forward.
    """

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Fp8Recipe.{name} must be one of {', '.join(map(repr, choices))}; got "
                    f"{checks.short(getattr(self, name))}."
                )

    @property
    def pow2(self) -> bool:
        return self.scale == "pow2"


_CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Fp8Recipe).items()}

Recipe: TypeAlias = Bf16Recipe | Fp8Recipe


def as_recipe(value: Recipe | None) -> Recipe:
    if value is None:
        return Bf16Recipe()
    if isinstance(value, Recipe):
        return value
    raise TypeError(f"recipe must be None, a Bf16Recipe or an Fp8Recipe; got {checks.describe(value)}.")
