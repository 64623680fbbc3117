"""The ops of the expert MLPs.

    experts_forward, _backward        training/bf16.py
    experts_fp8_forward, _backward    training/fp8.py
    quantize_weights                  apart, so that a cache may keep its result from one forward to the next

An op is opaque to ``torch.compile``. What it takes and gives is a list of ``training/arguments.py``, of which its
schema is made. ``training/experts.py`` has autograd around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from supersonic_moe.autocast import without_autocast
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels import interface, registry
from supersonic_moe.kernels.alignment import aligned, empty_gradient, is_turned
from supersonic_moe.ops import at_once, caller, unobserved
from supersonic_moe.quantization.block_format import blocks, empty_e4m3, empty_saved, empty_scales
from supersonic_moe.quantization.weight_cache import Fp8Weight, WeightCache
from supersonic_moe.training import bf16, flops, fp8
from supersonic_moe.training.arguments import (
    Bf16Forward,
    Bf16Output,
    Bf16Saved,
    Fp8Forward,
    Fp8Output,
    Fp8Saved,
    Fp8Weights,
    Incoming,
    Inputs,
    MainGrads,
    Static,
    Weight,
)
from supersonic_moe.training.fields import Fields, on_flat

_ops = torch.ops.supersonic_moe

# ---- kernels ---------------------------------------------------------------------------------------------------------


def bf16_kernels(x: Tensor, w2: Tensor, static: Static) -> interface.Experts:
    choice = registry.choose(x.device, x.dtype, hidden=w2.shape[1], intermediate=w2.shape[2], backend=static.backend)
    return registry.kernels(choice.name).experts


def fp8_kernels(x: Tensor, intermediate: int, static: Static) -> interface.Fp8Experts:
    choice = registry.choose_fp8(x.device, hidden=x.shape[1], intermediate=intermediate, backend=static.backend)
    return registry.fp8_kernels(choice.name)


def _bf16_forward(call: Bf16Forward) -> Bf16Output:
    k = bf16_kernels(call.x, call.w2, call.static)
    with without_autocast(call.x):
        return bf16.forward(k, aligned(call, k.ALIGNMENT, "x", "w1", "b1", "w2"))


def _bf16_backward(saved: Bf16Saved, incoming: Incoming) -> tuple[Tensor, ...]:
    k = bf16_kernels(saved.x, saved.w2, saved.static)
    saved = aligned(saved, k.ALIGNMENT, "z", "x", "w1", "b1", "w2")
    incoming = aligned(incoming, k.ALIGNMENT, "dout")
    with without_autocast(saved.x):
        gradients = bf16.backward(k, saved, incoming)
    return _returned(saved.x, gradients, incoming.main)


def _fp8_forward(call: Fp8Forward) -> tuple[Tensor, ...]:
    k = fp8_kernels(call.x, call.w2.shape[2], call.static)
    with without_autocast(call.x):
        output = fp8.forward(k, aligned(call, k.ALIGNMENT, "b1"))
    return _FP8_OUTPUT.flat(*output)


def _fp8_backward(weights: Fp8Weights, saved: Fp8Saved, incoming: Incoming) -> tuple[Tensor, ...]:
    k = fp8_kernels(saved.x, weights.w2_transposed.shape[1], saved.static)
    saved, incoming = aligned(saved, k.ALIGNMENT, "x", "b1"), aligned(incoming, k.ALIGNMENT, "dout")
    with without_autocast(saved.x):
        gradients = fp8.backward(k, weights, saved, incoming)
    return _returned(saved.x, gradients, incoming.main)


def _returned(x: Tensor, gradients: Inputs[Tensor | None], main: MainGrads) -> tuple[Tensor, ...]:
    """An op can return neither None nor what it wrote to: an empty tensor stands for a gradient that nobody asked for,
    and for one that was added to a buffer.
    """
    dx, dscores, dw1, db1, dw2, db2 = gradients
    dw1, dw2 = None if main.w1 is not None else dw1, None if main.w2 is not None else dw2
    return tuple([x.new_empty(0) if g is None else g for g in (dx, dscores, dw1, db1, dw2, db2)])


def _quantize_weights(weights: list[Tensor], scale: str, backend: str) -> list[Tensor]:
    """(q, q transposed, scale) of each weight in a row."""
    _, n, k = weights[0].shape
    choice = registry.choose_fp8(weights[0].device, hidden=k, intermediate=n, backend=backend)
    copies = registry.fp8_kernels(choice.name).quantize_weights(weights, scale == "pow2")
    return [t for q_ENK, q_EKN, scale_ENK in copies for t in (q_ENK, q_EKN, scale_ENK.contiguous())]


def _quantize_each(*weights_scale_backend: Any) -> tuple[Tensor, ...]:
    *weights, scale, backend = weights_scale_backend
    return tuple(_quantize_weights(weights, scale, backend))


# ---- what the compiler knows of them ---------------------------------------------------------------------------------


def _bf16_forward_fake(call: Bf16Forward) -> Bf16Output:
    x, rows = call.x, call.plan.gather_index.shape[0]
    z_PN = x.new_empty(rows if call.save else 0, call.w1.shape[1])
    return Bf16Output(x.new_empty(x.shape), call.scores.new_empty(rows), z_PN)


def _fp8_forward_fake(call: Fp8Forward) -> tuple[Tensor, ...]:
    x, rows, n1 = call.x, call.plan.gather_index.shape[0], call.w1.shape[1]
    saved = call.numerics.save_preactivation
    if call.save and saved == "fp8":
        z_PN, z_scale = empty_e4m3(x, rows, n1), empty_scales(x, rows, blocks(n1), True)
    elif call.save and saved == "int8":
        z_PN, z_scale = empty_saved(x, rows, n1)
    else:
        z_PN = x.new_empty(rows if call.save and saved == "bf16" else 0, n1)
        z_scale = x.new_empty(0, blocks(n1), dtype=torch.float32)
    return x.new_empty(x.shape), call.scores.new_empty(rows), z_PN, z_scale


def _bf16_backward_fake(saved: Bf16Saved, incoming: Incoming) -> tuple[Tensor, ...]:
    dw1, dw2 = (empty_gradient(is_turned(w), saved.x, w.shape) for w in (saved.w1, saved.w2))
    return _gradients_fake(saved, dw1, dw2, incoming)


def _fp8_backward_fake(weights: Fp8Weights, saved: Fp8Saved, incoming: Incoming) -> tuple[Tensor, ...]:
    dw1 = empty_gradient(saved.w1_turned, saved.x, weights.w1_transposed.mT.shape)
    dw2 = empty_gradient(saved.w2_turned, saved.x, weights.w2_transposed.mT.shape)
    return _gradients_fake(saved, dw1, dw2, incoming)


def _gradients_fake(saved: Bf16Saved | Fp8Saved, dw1: Tensor, dw2: Tensor, incoming: Incoming) -> tuple[Tensor, ...]:
    x, scores, b1, b2 = saved.x, saved.row_scores, saved.b1, saved.b2
    biases = (None if b is None else b.new_empty(b.shape) for b in (b1, b2))
    db1, db2 = biases
    dscores = scores.new_empty(saved.plan.reverse_index.shape)
    gradients = Inputs(x.new_empty(x.shape), dscores, dw1, db1, dw2, db2)
    wanted = Inputs(*(g if need else None for g, need in zip(gradients, incoming.needs, strict=True)))
    return _returned(x, wanted, incoming.main)


def _quantize_weights_fake(weights: list[Tensor], scale: str, backend: str) -> list[Tensor]:
    copies = []
    for w in weights:
        e, n, k = w.shape
        scales = w.new_empty(e, blocks(n), blocks(k), dtype=torch.float32)
        copies += [empty_e4m3(w, e, n, k), empty_e4m3(w, e, k, n), scales]
    return copies


# ---- definitions -----------------------------------------------------------------------------------------------------

BF16_FORWARD, BF16_SAVED = Fields(Bf16Forward), Fields(Bf16Saved)
FP8_FORWARD, FP8_WEIGHTS, FP8_SAVED = Fields(Fp8Forward), Fields(Fp8Weights), Fields(Fp8Saved)
_FP8_OUTPUT, INCOMING = Fields(Fp8Output), Fields(Incoming)


def _define(
    name: str,
    arguments: Sequence[Fields[..., Any]],
    result: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    count: Callable[..., int],
) -> Callable[..., Any]:
    """``run``, ``fake`` and ``count``, its FLOPs, take the NamedTuples that ``arguments`` make of the flat ones, with
    which what is returned is called.
    """
    op, kernel = f"supersonic_moe::{name}", on_flat(run, *arguments)
    torch.library.define(op, f"({', '.join(fields.schema for fields in arguments)}) -> ({result})")
    torch.library.impl(op, ("cpu", "cuda"))(kernel)
    torch.library.register_fake(op)(on_flat(fake, *arguments))
    counted = on_flat(count, *arguments)
    register_flop_formula(getattr(_ops, name), get_raw=True)(lambda *args, out_val: counted(*args))
    return caller(getattr(_ops, name).default, kernel)


_GRADIENTS = ", ".join(f"Tensor d{name}" for name in Inputs._fields)
experts_forward = _define(
    "experts_forward", [BF16_FORWARD], Fields(Bf16Output).schema, _bf16_forward, _bf16_forward_fake, flops.forward
)
experts_backward = _define(
    "experts_backward",
    [BF16_SAVED, INCOMING],
    _GRADIENTS,
    _bf16_backward,
    _bf16_backward_fake,
    flops.bf16_backward,
)
experts_fp8_forward = _define(
    "experts_fp8_forward", [FP8_FORWARD], _FP8_OUTPUT.schema, _fp8_forward, _fp8_forward_fake, flops.forward
)
experts_fp8_backward = _define(
    "experts_fp8_backward",
    [FP8_WEIGHTS, FP8_SAVED, INCOMING],
    _GRADIENTS,
    _fp8_backward,
    _fp8_backward_fake,
    flops.fp8_backward,
)

_QUANTIZE = "supersonic_moe::quantize_weights"
torch.library.define(_QUANTIZE, "(Tensor[] weights, str scale, str backend) -> Tensor[]")
torch.library.impl(_QUANTIZE, ("cpu", "cuda"))(_quantize_weights)
torch.library.register_fake(_QUANTIZE)(_quantize_weights_fake)

# ---- FP8 copies ------------------------------------------------------------------------------------------------------


def with_fp8_copies(
    w1: Weight, w2: Weight, recipe: Fp8Recipe, backend: str, cache: WeightCache | None
) -> tuple[Weight, Weight]:
    """Both with their FP8 copies: of ``cache``, or made in one launch."""

    def quantize(which: Sequence[int]) -> list[Fp8Weight]:
        values = [(w1, w2)[i].value.detach() for i in which]
        copies = quantized(values, recipe.scale, backend)
        return copies if recipe.keep_transposed else [copy._replace(transposed=None) for copy in copies]

    if cache is None:
        q1, q2 = quantize((0, 1))
    else:
        key = (w1.value.dtype, recipe.scale, recipe.keep_transposed, backend)
        q1, q2 = cache.get((w1.parameter, w2.parameter), key, quantize)
    return Weight(w1.parameter, w1.value, q1), Weight(w2.parameter, w2.value, q2)


def quantized(weights: list[Tensor], scale: str, backend: str) -> list[Fp8Weight]:
    """New copies, not of a cache."""
    if unobserved(*weights):
        flat = iter(at_once(_quantize_each, *weights, scale, backend))
    else:
        flat = iter(_ops.quantize_weights.default(weights, scale, backend))
    return [Fp8Weight(*three) for three in zip(flat, flat, flat, strict=True)]
