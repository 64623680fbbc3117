"""Options that every entry point of ``functional.py`` takes by keyword, and what becomes of them.

To add one: a line in :class:`ExpertOptions`, which callers see, and one in :class:`Options`, which code reads. A third
in ``_READERS`` where it may be given in several forms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation, as_layout
from supersonic_moe.config.recipe import Bf16Recipe, Recipe, as_recipe
from supersonic_moe.quantization.weight_cache import WeightCache


class ExpertOptions(TypedDict, total=False):
    """Keyword options of ``moe_layer``, ``topk_experts``, ``routed_experts``, ``dispatched_experts`` and
    ``experts_from_plan``. All may be left out.

    b1: (E, N1) bias of the first projection, in the dtype of x. Default: none. One projection alone may have a bias.
    b2: (E, H) bias of the second one.
    activation: an :class:`ActivationType`, its name, or an :class:`Activation` with constants. Default: SwiGLU.
    layout: how the N1 rows of w1 hold gate and up, a :class:`GateUpLayout` or its name. Default: interleaved.
    recipe: ``Fp8Recipe()`` multiplies in e4m3 (``config/recipe.py``; bfloat16 inputs or autocast to it). Default:
        ``Bf16Recipe()``, which computes in the dtype of x.
    weight_cache: holds the FP8 copies of the weights, which are quantized in every call without it: one cache for each
        pair of weights (``quantization/weight_cache.py``).
    inference: save nothing for backward and return a tensor without gradient. Default: False.
    accumulate_into_main_grad: add the gradients of w1 and w2 to their fp32 ``main_grad`` where they are computed, and
        leave ``.grad`` alone: Megatron's gradient accumulation fusion (``training/main_grad.py``). Biases and router
        keep ordinary gradients. Default: False.
    backend: a name of ``kernels.registry.BACKENDS``, which is then used or refused, never replaced. Default: "auto".
    validate: also check what only device data can answer (NaN logits, scores that are not finite, repeated or
        out-of-range expert ids, offsets that do not add up), for a host synchronisation. Without it such values have a
        memory-safe result: a bad id is skipped, a NaN stays in its token. Default: False.
    """

    b1: Tensor | None
    b2: Tensor | None
    activation: Activation | ActivationType | str
    layout: GateUpLayout | str
    recipe: Recipe | None
    weight_cache: WeightCache | None
    inference: bool
    accumulate_into_main_grad: bool
    backend: str
    validate: bool


class Options(NamedTuple):
    """:class:`ExpertOptions` with defaults filled in and names looked up."""

    b1: Tensor | None = None
    b2: Tensor | None = None
    activation: Activation = Activation(ActivationType.SWIGLU)
    layout: GateUpLayout = GateUpLayout.INTERLEAVED
    recipe: Recipe = Bf16Recipe()
    weight_cache: WeightCache | None = None
    inference: bool = False
    accumulate_into_main_grad: bool = False
    backend: str = "auto"
    validate: bool = False

    @classmethod
    def read(cls, given: ExpertOptions) -> Options:
        """Raises TypeError for an unknown option, and what the readers raise for an unknown name."""
        read: dict[str, Any] = {**cls._field_defaults, **given}
        if len(read) > len(cls._fields):
            unknown = next(name for name in read if name not in cls._fields)
            raise TypeError(f"unknown option {unknown!r}; the options of experts are {', '.join(cls._fields)}.")
        for name, reader in _READERS.items():
            read[name] = reader(read[name])
        return tuple.__new__(cls, read.values())

    def check(self) -> None:
        """Raises TypeError for a value that would be taken for another: "no" is true."""
        for name in FLAGS:
            checks.flag(name, getattr(self, name))
        if self.weight_cache is not None and not isinstance(self.weight_cache, WeightCache):
            raise TypeError(
                f"weight_cache must be a WeightCache or None; got {checks.describe(self.weight_cache)}. Keep one "
                "supersonic_moe.WeightCache() for each pair of weights."
            )


FLAGS = ("inference", "accumulate_into_main_grad", "validate")
_READERS: dict[str, Callable[[Any], Any]] = {"activation": as_activation, "layout": as_layout, "recipe": as_recipe}

F = TypeVar("F", bound=Callable[..., Any])


def lists_options(function: F) -> F:
    """``help`` and ``inspect.signature`` show each option with its default instead of ``**options``."""
    signature, hints = inspect.signature(function), get_type_hints(ExpertOptions)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in Options._field_defaults.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function
