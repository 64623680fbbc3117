"""Expert weights that several forwards share, quantized once: the micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from supersonic_moe import checks
from supersonic_moe.integrations.transformers.weights import is_decorated
from supersonic_moe.quantization.weight_cache import WeightCache

_CACHES: WeakKeyDictionary[nn.Module, WeightCache] = WeakKeyDictionary()
"""Of modules inside :func:`constant_weights`."""


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """No expert weight of ``model`` changes inside the block, so that ``"supersonic_fp8"`` quantizes each once, as
    :func:`supersonic_moe.constant_weights` does it for ``MoE`` (``quantization/weight_cache.py`` lists what is noticed
    nevertheless). Compiled forwards quantize each time.

    Raises:
        TypeError, ValueError: no module, or one without experts that a backend computes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"constant_weights needs a torch.nn.Module; got {checks.describe(model)}.")
    layers = [module for module in model.modules() if is_decorated(module)]
    if not layers:
        raise ValueError(
            f"constant_weights needs a model with experts that a backend computes; {type(model).__name__} has none: "
            "served(model) says why. For supersonic_moe.MoE use supersonic_moe.constant_weights."
        )
    with ExitStack() as held:
        for layer in layers:
            if layer not in _CACHES:
                _CACHES[layer] = WeightCache()
                held.callback(_CACHES.pop, layer)
            held.enter_context(_CACHES[layer].hold())
        yield


def cache_of(experts: nn.Module) -> WeightCache | None:
    """The copies of a module whose weights are held now."""
    return _CACHES.get(experts) if _CACHES and not torch.compiler.is_compiling() else None
