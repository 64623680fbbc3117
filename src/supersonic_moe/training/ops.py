"""The ops of the expert MLPs and autograd around them, once for both dataflows.

    run_experts                         which dataflow, and whether anything is saved
      Experts                           one autograd function
        experts_forward, _backward      training/bf16.py
        experts_fp8_forward, _backward  training/fp8.py
      quantize_weights                  outside, so that a cache may keep its result from one forward to the next

An op is opaque to ``torch.compile``. What it takes and gives is a list of ``training/arguments.py``, of which its
schema is made; a tensor that forward keeps goes through ``save_for_backward``, anything else stays in the context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from supersonic_moe.autocast import without_autocast
from supersonic_moe.autograd import apply, refuse_second_derivatives, refuse_what_is_not_supported
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels import interface, registry
from supersonic_moe.kernels.alignment import aligned, empty_gradient, is_turned
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.ops import at_once, caller, unobserved
from supersonic_moe.private_api import in_forward_mode
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
    Numerics,
    Plan,
    Static,
    Weight,
)
from supersonic_moe.training.fields import Fields, on_flat
from supersonic_moe.training.main_grad import Targets, targets_of
from supersonic_moe.training.options import Options

_ops = torch.ops.supersonic_moe

# ---- kernels ---------------------------------------------------------------------------------------------------------


def _bf16_kernels(x: Tensor, w2: Tensor, static: Static) -> interface.Experts:
    choice = registry.choose(x.device, x.dtype, hidden=w2.shape[1], intermediate=w2.shape[2], backend=static.backend)
    return registry.kernels(choice.name).experts


def _fp8_kernels(x: Tensor, intermediate: int, static: Static) -> interface.Fp8Experts:
    choice = registry.choose_fp8(x.device, hidden=x.shape[1], intermediate=intermediate, backend=static.backend)
    return registry.fp8_kernels(choice.name)


def _bf16_forward(call: Bf16Forward) -> Bf16Output:
    k = _bf16_kernels(call.x, call.w2, call.static)
    with without_autocast(call.x):
        return bf16.forward(k, aligned(call, k.ALIGNMENT, "x", "w1", "b1", "w2"))


def _bf16_backward(saved: Bf16Saved, incoming: Incoming) -> tuple[Tensor, ...]:
    k = _bf16_kernels(saved.x, saved.w2, saved.static)
    saved = aligned(saved, k.ALIGNMENT, "z", "x", "w1", "b1", "w2")
    incoming = aligned(incoming, k.ALIGNMENT, "dout")
    with without_autocast(saved.x):
        gradients = bf16.backward(k, saved, incoming)
    return _returned(saved.x, gradients, incoming.main)


def _fp8_forward(call: Fp8Forward) -> tuple[Tensor, ...]:
    k = _fp8_kernels(call.x, call.w2.shape[2], call.static)
    with without_autocast(call.x):
        output = fp8.forward(k, aligned(call, k.ALIGNMENT, "b1"))
    return _FP8_OUTPUT.flat(*output)


def _fp8_backward(weights: Fp8Weights, saved: Fp8Saved, incoming: Incoming) -> tuple[Tensor, ...]:
    k = _fp8_kernels(saved.x, weights.w2_transposed.shape[1], saved.static)
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
    quantized = registry.fp8_kernels(choice.name).quantize_weights(weights, scale == "pow2")
    return [t for q_ENK, q_EKN, scale_ENK in quantized for t in (q_ENK, q_EKN, scale_ENK.contiguous())]


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
    quantized = []
    for w in weights:
        e, n, k = w.shape
        scales = w.new_empty(e, blocks(n), blocks(k), dtype=torch.float32)
        quantized += [empty_e4m3(w, e, n, k), empty_e4m3(w, e, k, n), scales]
    return quantized


# ---- definitions -----------------------------------------------------------------------------------------------------

_BF16_FORWARD, _BF16_SAVED = Fields(Bf16Forward), Fields(Bf16Saved)
_FP8_FORWARD, _FP8_WEIGHTS, _FP8_SAVED = Fields(Fp8Forward), Fields(Fp8Weights), Fields(Fp8Saved)
_FP8_OUTPUT, _INCOMING = Fields(Fp8Output), Fields(Incoming)


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
_experts_forward = _define(
    "experts_forward", [_BF16_FORWARD], Fields(Bf16Output).schema, _bf16_forward, _bf16_forward_fake, flops.forward
)
_experts_backward = _define(
    "experts_backward",
    [_BF16_SAVED, _INCOMING],
    _GRADIENTS,
    _bf16_backward,
    _bf16_backward_fake,
    flops.bf16_backward,
)
_experts_fp8_forward = _define(
    "experts_fp8_forward", [_FP8_FORWARD], _FP8_OUTPUT.schema, _fp8_forward, _fp8_forward_fake, flops.forward
)
_experts_fp8_backward = _define(
    "experts_fp8_backward",
    [_FP8_WEIGHTS, _FP8_SAVED, _INCOMING],
    _GRADIENTS,
    _fp8_backward,
    _fp8_backward_fake,
    flops.fp8_backward,
)

_QUANTIZE = "supersonic_moe::quantize_weights"
torch.library.define(_QUANTIZE, "(Tensor[] weights, str scale, str backend) -> Tensor[]")
torch.library.impl(_QUANTIZE, ("cpu", "cuda"))(_quantize_weights)
torch.library.register_fake(_QUANTIZE)(_quantize_weights_fake)

# ---- autograd --------------------------------------------------------------------------------------------------------


_Operands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
"""x, scores, w1, b1, w2, b2: in this order gradients are asked for."""


class _Kept(NamedTuple):
    """What a forward keeps for its backward."""

    tensors: tuple[Tensor | None, ...]
    others: tuple[bool | str | float, ...]
    backward: Callable[..., Sequence[Tensor]]
    """Calls the backward op with ``tensors``, ``others`` and the flat :class:`Incoming`."""
    twice: bool = False
    """Whether the gradients can be differentiated again."""


class _Bf16Call(NamedTuple):
    """A call of the BF16 ops, but for its operands."""

    plan: Plan
    static: Static
    parameters: tuple[Tensor, Tensor] | None
    """Those of w1 and w2, if their ``main_grad`` gets dW1 and dW2."""

    def forward(self, operands: _Operands, save: bool) -> tuple[Tensor, ...]:
        arguments = _BF16_FORWARD.flat(*operands, self.plan, self.static, save)
        output: tuple[Tensor, ...] = _experts_forward(*arguments)
        return output

    def keep(self, operands: _Operands, row_scores: Tensor, z: Tensor) -> _Kept:
        x, _, w1, b1, w2, b2 = operands
        tensors, others = _BF16_SAVED.split(z, x, row_scores, w1, b1, w2, b2, self.plan, self.static)
        in_plain_torch = self.static.backend == "reference" or not x.is_cuda
        return _Kept(tensors, others, _backward_in_bf16, in_plain_torch and self.parameters is None)


class _Fp8Call(NamedTuple):
    """The same in FP8, where the FP8 copies of the weights are multiplied."""

    plan: Plan
    static: Static
    parameters: tuple[Tensor, Tensor] | None
    numerics: Numerics
    w1: Fp8Weight
    w2: Fp8Weight

    def forward(self, operands: _Operands, save: bool) -> tuple[Tensor, ...]:
        x, scores, _w1, b1, _w2, b2 = operands
        w1, w2 = Quantized(self.w1.q, self.w1.scale), Quantized(self.w2.q, self.w2.scale)
        arguments = _FP8_FORWARD.flat(x, scores, w1, b1, w2, b2, self.plan, self.static, self.numerics, save)
        output: tuple[Tensor, ...] = _experts_fp8_forward(*arguments)
        return output

    def keep(self, operands: _Operands, row_scores: Tensor, z: Tensor, z_scale: Tensor) -> _Kept:
        x, _, w1, b1, w2, b2 = operands
        z_PN = Quantized(z, z_scale)
        call = self.plan, self.static, self.numerics
        tensors, others = _FP8_SAVED.split(z_PN, x, row_scores, b1, b2, *call, is_turned(w1), is_turned(w2))
        if self.w1.transposed is None:
            again = functools.partial(_backward_in_fp8_quantizing_again, self.numerics, self.static.backend)
            return _Kept((w1, w2, *tensors), others, again)
        weights = _FP8_WEIGHTS.flat(*Fp8Weights.of(self.w1, self.w2, self.numerics))
        return _Kept((*weights, *tensors), others, _backward_in_fp8)


def _backward_in_bf16(tensors: Sequence[Any], others: Sequence[Any], incoming: Sequence[Any]) -> Sequence[Tensor]:
    grads: Sequence[Tensor] = _experts_backward(*tensors, *others, *incoming)
    return grads


def _backward_in_fp8(tensors: Sequence[Any], others: Sequence[Any], incoming: Sequence[Any]) -> Sequence[Tensor]:
    grads: Sequence[Tensor] = _experts_fp8_backward(*tensors, *others, *incoming)
    return grads


def _backward_in_fp8_quantizing_again(
    numerics: Numerics, backend: str, tensors: Sequence[Any], others: Sequence[Any], incoming: Sequence[Any]
) -> Sequence[Tensor]:
    w1, w2, *tensors = tensors
    q1, q2 = _quantized([w1, w2], numerics.scale, backend)
    weights = _FP8_WEIGHTS.flat(*Fp8Weights.of(q1, q2, numerics))
    return _backward_in_fp8((*weights, *tensors), others, incoming)


_named_saved = on_flat(lambda saved: saved, _BF16_SAVED)
_named = on_flat(lambda saved, incoming: (saved, incoming), _BF16_SAVED, _INCOMING)


def _differentiable_backward(*flat: Any) -> list[Tensor]:
    """Backward in plain torch: forward runs again under ``torch.func.vjp``, whose result can be differentiated as often
    as one likes, and inside other transforms.
    """
    saved, (dout, needs, _) = _named(*flat)
    x, plan, static = saved.x, saved.plan, saved.static
    k, rows = _bf16_kernels(x, saved.w2, static), torch.arange(len(saved.row_scores), device=x.device)
    operands = Inputs(x, saved.row_scores, saved.w1, saved.b1, saved.w2, saved.b2)

    def out(*wanted: Tensor) -> Tensor:
        given = iter(wanted)
        used: Inputs[Any] = Inputs(*[next(given) if need else t for t, need in zip(operands, needs, strict=True)])
        return bf16.forward(k, Bf16Forward(*used, plan._replace(scatter_index=rows), static, True)).out

    with without_autocast(x):
        _, pull, *_ = torch.func.vjp(out, *[t for t, need in zip(operands, needs, strict=True) if need])
        found = iter(pull(dout))
    grads = Inputs(*[next(found) if need else x.new_empty(0) for need in needs])
    return [*grads._replace(scores=k.pick(grads.scores, plan.reverse_index) if needs.scores else grads.scores)]


_ONCE = (
    "second derivatives of the experts exist in plain torch only: on a CPU or with backend='reference', in "
    "Bf16Recipe() and without accumulate_into_main_grad. Call the layer so where its gradient is differentiated again "
    "(create_graph=True), or leave create_graph out."
)


_NO_TARGETS, _NO_BUFFERS = Targets(), MainGrads()


class Experts(torch.autograd.Function):
    """``apply(x, scores, w1, b1, w2, b2, call)``: operands in the dtype of the computation, and a :class:`_Bf16Call` or
    :class:`_Fp8Call`. Gives the output, and what backward keeps of it: the scores of the rows, through which second
    derivatives come back, and Z.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *operands, call = args
        output: tuple[Tensor, ...] = call.forward(operands, save=True)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *operands, call = inputs
        _, row_scores, *z = output
        ctx.mark_non_differentiable(*z)
        ctx.set_materialize_grads(False)
        tensors, ctx.others, ctx.run_backward, ctx.twice = call.keep(operands, row_scores, *z)
        ctx.save_for_backward(*tensors)
        ctx.parameters = call.parameters
        if call.parameters is not None:
            ctx.are_tensors = [t is not None for t in operands]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, drow_scores: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if drow_scores is not None and not torch.compiler.is_compiling():  # which gives zeros
            return _backward_of_a_backward(ctx, dout, drow_scores)
        if dout is None:
            return (None,) * 7
        *needed, _call = ctx.needs_input_grad
        needs, targets, main = Inputs(*needed), _NO_TARGETS, _NO_BUFFERS
        if ctx.parameters is not None:
            needs, targets = targets_of(ctx.parameters, needs, ctx)
            main = targets.of_kernels()
        tensors = ctx.saved_tensors  # may recompute forward, so look for what is missing first
        incoming = _INCOMING.flat(dout.contiguous(), needs, main)
        again = torch.is_grad_enabled()  # create_graph
        grads: list[Tensor | None]
        try:
            if again and ctx.twice:
                grads = [*_differentiable_backward(*tensors, *ctx.others, *incoming)]
            else:
                grads = [*ctx.run_backward(tensors, ctx.others, incoming)]
        except RuntimeError as error:
            refuse_what_is_not_supported(error)
            raise
        if ctx.parameters is not None:
            for at, target, parameter in zip((2, 4), targets, ctx.parameters, strict=True):
                if target is not None:
                    grads[at] = target.finish(parameter, dout.dtype)
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        if again and not ctx.twice:
            grads = _differentiable_once(grads, (dout, *tensors))
        return *grads, None


def _backward_of_a_backward(ctx: Any, dout: Tensor | None, drow_scores: Tensor) -> tuple[Tensor | None, ...]:
    """In plain torch: what ``out`` gives, and what a second derivative gives to the scores on their way to the rows."""
    *grads, _call = Experts.backward(ctx, dout, None)
    if ctx.needs_input_grad[1]:
        saved = _named_saved(*ctx.saved_tensors, *ctx.others)
        drow_scores = _bf16_kernels(saved.x, saved.w2, saved.static).pick(drow_scores, saved.plan.reverse_index)
        grads[1] = drow_scores if grads[1] is None else grads[1] + drow_scores
    return *grads, None


def _differentiable_once(grads: list[Tensor | None], inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    handed_on = iter(refuse_second_derivatives(_ONCE, [g for g in grads if g is not None], inputs))
    return [None if g is None else next(handed_on) for g in grads]


# ---- entry -----------------------------------------------------------------------------------------------------------


def run_experts(
    x_TH: Tensor,
    scores_S: Tensor,
    w1: Weight,
    b1: Tensor | None,
    w2: Weight,
    b2: Tensor | None,
    plan: RoutingPlan,
    options: Options,
) -> Tensor:
    """(T, H) output of the experts, for operands in the dtype of the computation. Nothing is saved in inference mode or
    where no input requires a gradient.
    """
    parameters = (w1.parameter, w2.parameter) if options.accumulate_into_main_grad else None
    common = Plan.of(plan), Static.of(options.activation, options.layout, options.backend), parameters
    call: _Bf16Call | _Fp8Call
    if isinstance(options.recipe, Fp8Recipe):
        w1, w2 = with_fp8_copies(w1, w2, options.recipe, options.backend, options.weight_cache)
        call = _Fp8Call(*common, Numerics.of(options.recipe), w1.fp8, w2.fp8)
    else:
        call = _Bf16Call(*common)
    operands = (x_TH, scores_S, w1.value, b1, w2.value, b2)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if not options.inference and (recorded or in_forward_mode()):  # the latter is refused by ``apply``
        out: Tensor = apply(Experts, *operands, call)[0]
        return out
    with torch.no_grad():
        return call.forward(operands, save=False)[0]


def with_fp8_copies(
    w1: Weight, w2: Weight, recipe: Fp8Recipe, backend: str, cache: WeightCache | None
) -> tuple[Weight, Weight]:
    """Both with their FP8 copies: of ``cache``, or made in one launch."""

    def quantize(which: Sequence[int]) -> list[Fp8Weight]:
        values = [(w1, w2)[i].value.detach() for i in which]
        copies = _quantized(values, recipe.scale, backend)
        return copies if recipe.keep_transposed else [copy._replace(transposed=None) for copy in copies]

    if cache is None:
        q1, q2 = quantize((0, 1))
    else:
        key = (w1.value.dtype, recipe.scale, recipe.keep_transposed, backend)
        q1, q2 = cache.get((w1.parameter, w2.parameter), key, quantize)
    return Weight(w1.parameter, w1.value, q1), Weight(w2.parameter, w2.value, q2)


def _quantized(weights: list[Tensor], scale: str, backend: str) -> list[Fp8Weight]:
    if unobserved(*weights):
        flat = iter(at_once(_quantize_each, *weights, scale, backend))
    else:
        flat = iter(_ops.quantize_weights.default(weights, scale, backend))
    return [Fp8Weight(*three) for three in zip(flat, flat, flat, strict=True)]
