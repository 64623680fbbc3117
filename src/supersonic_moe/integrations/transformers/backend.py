"""The functions that Transformers calls for a layer of experts, and their registration."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from supersonic_moe import checks
from supersonic_moe.autocast import autocast_dtype
from supersonic_moe.config.recipe import Bf16Recipe, Recipe, as_recipe
from supersonic_moe.functional import topk_experts
from supersonic_moe.grouped import grouped_linear
from supersonic_moe.inference import decode
from supersonic_moe.integrations.transformers import fp8
from supersonic_moe.integrations.transformers.gates import class_name, gate_of
from supersonic_moe.integrations.transformers.held_weights import cache_of
from supersonic_moe.integrations.transformers.weights import Weights, weights_of
from supersonic_moe.routing.plan import plan_from_topk

log = logging.getLogger("supersonic_moe")

OLDEST, NEWEST_TESTED = (5, 17), (5, 17)


def register(name: str = "supersonic", *, recipe: Recipe | None = None) -> None:
    """Make ``name`` a value of ``experts_implementation``, in the registries of 16-bit and of FP8 checkpoints.

    Args:
        name: "supersonic" and "supersonic_fp8" are registered when this package is imported.
        recipe: how layers with 16-bit weights are multiplied, in training and inference; ``Fp8Recipe()`` for FP8. FP8
            checkpoints are multiplied in FP8 as they are, whatever the recipe.

    Raises:
        ImportError: Transformers is older than 5.17, whose models take no backend from outside.
        TypeError, ValueError: the name is no string, or taken by something else. Nothing is replaced.
    """
    _check_version()
    if not isinstance(name, str):
        raise TypeError(f"the name of an experts backend must be a string; got {checks.describe(name)}.")
    if name in ("", "eager"):  # the library knows "eager" without registering it
        raise ValueError(
            f"the name of an experts backend must be free or ours; {name!r} is not. Register another name: "
            "register('my_supersonic')."
        )
    backends = {
        "ALL_EXPERTS_FUNCTIONS": (ALL_EXPERTS_FUNCTIONS, functools.partial(experts_forward, recipe=as_recipe(recipe))),
        "ALL_FP8_EXPERTS_FUNCTIONS": (
            ALL_FP8_EXPERTS_FUNCTIONS,
            functools.partial(fp8_experts_forward, recipe=as_recipe(recipe)),
        ),
    }
    for registry, (functions, backend) in backends.items():
        taken = functions.get(name) if name in functions else None
        if taken is not None and not _same(taken, backend):
            raise ValueError(
                f"the name of an experts backend must be free or ours; {name!r} in {registry} is "
                f"{checks.short(taken)}. Register another name: register('my_supersonic')."
            )
    for functions, backend in backends.values():
        functions.register(name, backend)


def recipe_of(name: str) -> Recipe | None:
    """The recipe of a value of ``experts_implementation`` that was registered here; None for any other value."""
    backend: Any = ALL_EXPERTS_FUNCTIONS.get(name) if name in ALL_EXPERTS_FUNCTIONS else None
    ours = isinstance(backend, functools.partial) and backend.func is experts_forward
    return backend.keywords["recipe"] if ours else None


def _same(taken: Any, backend: functools.partial[Tensor]) -> bool:
    ours = isinstance(taken, functools.partial) and taken.func is backend.func
    return ours and taken.keywords == backend.keywords


def _check_version() -> None:
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        raise ImportError(
            "supersonic_moe.integrations.transformers needs Transformers 5.17 or newer; got "
            f"{transformers.__version__}. Run pip install -U 'transformers>=5.17'."
        )
    if found > NEWEST_TESTED:
        _warn_of_version(transformers.__version__)


@functools.cache
def _warn_of_version(version: str) -> None:
    log.warning(
        "Transformers %s is newer than 5.17, for which the experts backend is tested; a gate that has changed its code "
        "under the same name would be wrong without notice. Look for a newer supersonic-moe.",
        version,
    )


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, recipe: Recipe
) -> Tensor:
    """For experts modules with 16- or 32-bit weights. Hidden states of another dtype than the weights are converted to
    theirs, as the library's own backends do, and the result is in the dtype of the hidden states.
    """
    out = run(experts, hidden_states, top_k_index, top_k_weights, weights_of(experts), recipe)
    return out if out.dtype is hidden_states.dtype else out.to(hidden_states.dtype)


def fp8_experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, recipe: Recipe
) -> Tensor:
    """For the modules of an FP8 checkpoint: the inference operator where it can, else weights are dequantized."""
    if not fp8.is_quantized(experts):
        return experts_forward(experts, hidden_states, top_k_index, top_k_weights, recipe=recipe)
    if (refusal := fp8.refusal(experts)) is not None:
        raise NotImplementedError(refusal)
    why = fp8.obstacle(experts) or fp8.obstacle_of_call(hidden_states, top_k_index, top_k_weights)
    if why is None:
        return fp8.run_operator(experts, hidden_states, top_k_index, top_k_weights)
    if not torch.compiler.is_compiling():
        fp8.warn_of_slow_path(class_name(experts), why)
    weights = fp8.dequantized(experts, hidden_states.dtype)
    return run(experts, hidden_states, top_k_index, top_k_weights, weights, Bf16Recipe()).to(hidden_states.dtype)


def run(experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights, recipe: Recipe) -> Tensor:
    """(T, H) in the dtype of the weights, or that of autocast."""
    w1, b1, w2, b2 = weights
    plain = autocast_dtype(x) is None
    if plain and x.dtype is not w1.dtype:
        x = x.to(w1.dtype)
    gate = gate_of(experts)
    if gate is None:
        return run_with_own_gate(experts, x, ids, scores, weights, recipe)
    if plain and not experts.training and not torch.is_grad_enabled():  # a module in training may run this again
        operands = decode.Operands(x, ids, scores, *weights)
        if decode.suits(operands, gate):
            return decode.run(operands, gate)
    return topk_experts(
        x, ids, scores, w1, w2, b1=b1, b2=b2, activation=gate.activation, layout=gate.layout, recipe=recipe,
        weight_cache=cache_of(experts),
    )  # fmt: skip


def run_with_own_gate(
    experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights, recipe: Recipe
) -> Tensor:
    """The module's gate as PyTorch between two grouped products; sums in fp32."""
    w1, b1, w2, b2 = weights
    plan = plan_from_topk(ids, w1.shape[0])
    checks.same_shape("top_k_index", ids, "top_k_weights", scores)
    num_tokens, k = ids.shape
    z_PN = grouped_linear(x.contiguous(), w1, plan, bias=b1, gather=True, recipe=recipe)
    module: Any = experts
    a_PI = (module._apply_gate(z_PN) if module.has_gate else module.act_fn(z_PN)).to(z_PN.dtype)
    y_PH = grouped_linear(a_PI, w2, plan, bias=b2, recipe=recipe)
    row_S = plan.reverse_index
    routed_S = row_S >= 0
    y_SH = torch.where(routed_S[:, None], y_PH.index_select(0, row_S.clamp(min=0)), 0)
    scores_S = torch.where(routed_S, scores.reshape(-1), 0)
    dtype = torch.promote_types(torch.float32, y_PH.dtype)
    return (y_SH.to(dtype) * scores_S.to(dtype)[:, None]).view(num_tokens, k, w2.shape[1]).sum(1).to(y_PH.dtype)
