"""Numeric recipes: one immutable object says how a layer computes; it is resolved once, at construction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bf16Recipe:
    """Compute in the dtype of the inputs (BF16 in practice): fp32 accumulation, activation in fp32, one rounding at
    each store.
    """


def as_recipe(value: Bf16Recipe | None) -> Bf16Recipe:
    if value is None:
        return Bf16Recipe()
    if isinstance(value, Bf16Recipe):
        return value
    raise TypeError(
        f"recipe must be None or a Bf16Recipe; got {type(value).__name__}. "
        "FP8 training is not part of this version (README, table of features)."
    )
