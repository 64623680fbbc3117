"""The expert MLPs under autograd, once for both dataflows.

    run_experts                which dataflow, and whether anything is saved
      Experts                  one autograd function around the ops of ``training/ops.py``

What forward keeps goes through ``save_for_backward`` if it is a tensor; anything else stays in the context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from supersonic_moe.autocast import without_autocast
from supersonic_moe.autograd import apply, in_traced_transform, refuse_second_derivatives, refuse_what_is_not_supported
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.alignment import is_turned
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.private_api import in_forward_mode
from supersonic_moe.quantization.weight_cache import Fp8Weight
from supersonic_moe.training import bf16
from supersonic_moe.training.arguments import (
    Bf16Forward,
    Fp8Weights,
    Inputs,
    MainGrads,
    Numerics,
    Plan,
    Static,
    Weight,
)
from supersonic_moe.training.fields import on_flat
from supersonic_moe.training.main_grad import Targets, targets_of
from supersonic_moe.training.ops import (
    BF16_FORWARD,
    BF16_SAVED,
    FP8_FORWARD,
    FP8_SAVED,
    FP8_WEIGHTS,
    INCOMING,
    bf16_kernels,
    experts_backward,
    experts_forward,
    experts_fp8_backward,
    experts_fp8_forward,
    quantized,
    with_fp8_copies,
)
from supersonic_moe.training.options import Options

Operands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
"""x, scores, w1, b1, w2, b2: in this order gradients are asked for."""


class _Kept(NamedTuple):
    """What a forward keeps for its backward."""

    tensors: tuple[Tensor | None, ...]
    others: tuple[bool | str | float, ...]
    backward: Callable[..., Sequence[Tensor]]
    """Calls the backward op with ``tensors``, ``others`` and the flat :class:`Incoming`."""
    twice: bool = False
    """Whether the gradients can be differentiated again."""


class Bf16Call(NamedTuple):
    """A call of the BF16 ops, but for its operands."""

    plan: Plan
    static: Static
    parameters: tuple[Tensor, Tensor] | None
    """Those of w1 and w2, if their ``main_grad`` gets dW1 and dW2."""

    def forward(self, operands: Operands, save: bool) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = experts_forward(*self.arguments(operands, save))
        return output

    def arguments(self, operands: Operands, save: bool) -> tuple[Any, ...]:
        """Those of the forward op."""
        return BF16_FORWARD.flat(*operands, self.plan, self.static, save)

    def keep(self, operands: Operands, row_scores: Tensor, z: Tensor) -> _Kept:
        x, _, w1, b1, w2, b2 = operands
        tensors, others = BF16_SAVED.split(z, x, row_scores, w1, b1, w2, b2, self.plan, self.static)
        in_plain_torch = self.static.backend == "reference" or not x.is_cuda
        return _Kept(tensors, others, backward_in_bf16, in_plain_torch and self.parameters is None)


class Fp8Call(NamedTuple):
    """The same in FP8, where the FP8 copies of the weights are multiplied."""

    plan: Plan
    static: Static
    parameters: tuple[Tensor, Tensor] | None
    numerics: Numerics
    w1: Fp8Weight
    w2: Fp8Weight

    def forward(self, operands: Operands, save: bool) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = experts_fp8_forward(*self.arguments(operands, save))
        return output

    def arguments(self, operands: Operands, save: bool) -> tuple[Any, ...]:
        x, scores, _w1, b1, _w2, b2 = operands
        w1, w2 = Quantized(self.w1.q, self.w1.scale), Quantized(self.w2.q, self.w2.scale)
        return FP8_FORWARD.flat(x, scores, w1, b1, w2, b2, self.plan, self.static, self.numerics, save)

    def keep(self, operands: Operands, row_scores: Tensor, z: Tensor, z_scale: Tensor) -> _Kept:
        x, _, w1, b1, w2, b2 = operands
        z_PN = Quantized(z, z_scale)
        call = self.plan, self.static, self.numerics
        tensors, others = FP8_SAVED.split(z_PN, x, row_scores, b1, b2, *call, is_turned(w1), is_turned(w2))
        if self.w1.transposed is None:
            again = functools.partial(backward_in_fp8_quantizing_again, self.numerics, self.static.backend)
            return _Kept((w1, w2, *tensors), others, again)
        weights = FP8_WEIGHTS.flat(*Fp8Weights.of(self.w1, self.w2, self.numerics))
        return _Kept((*weights, *tensors), others, backward_in_fp8)


def backward_in_bf16(tensors: Sequence[Any], others: Sequence[Any], incoming: Sequence[Any]) -> Sequence[Tensor]:
    grads: Sequence[Tensor] = experts_backward(*tensors, *others, *incoming)
    return grads


def backward_in_fp8(tensors: Sequence[Any], others: Sequence[Any], incoming: Sequence[Any]) -> Sequence[Tensor]:
    grads: Sequence[Tensor] = experts_fp8_backward(*tensors, *others, *incoming)
    return grads


def backward_in_fp8_quantizing_again(
    numerics: Numerics, backend: str, tensors: Sequence[Any], others: Sequence[Any], incoming: Sequence[Any]
) -> Sequence[Tensor]:
    w1, w2, *tensors = tensors
    q1, q2 = quantized([w1, w2], numerics.scale, backend)
    weights = FP8_WEIGHTS.flat(*Fp8Weights.of(q1, q2, numerics))
    return backward_in_fp8((*weights, *tensors), others, incoming)


_named_saved = on_flat(lambda saved: saved, BF16_SAVED)
_named = on_flat(lambda saved, incoming: (saved, incoming), BF16_SAVED, INCOMING)


def _differentiable_backward(*flat: Any) -> list[Tensor]:
    """Backward in plain torch: forward runs again under ``torch.func.vjp``, whose result can be differentiated as often
    as one likes, and inside other transforms.
    """
    saved, (dout, needs, _) = _named(*flat)
    x, plan, static = saved.x, saved.plan, saved.static
    k, rows = bf16_kernels(x, saved.w2, static), torch.arange(len(saved.row_scores), device=x.device)
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
    """``apply(x, scores, w1, b1, w2, b2, call)``: operands in the dtype of the computation, and a :class:`Bf16Call` or
    :class:`Fp8Call`. Gives the output, and what backward keeps of it: the scores of the rows, through which second
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
        _, _, *z = output
        ctx.mark_non_differentiable(*z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*remember(ctx, call, operands, output))

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, drow_scores: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if drow_scores is not None and not torch.compiler.is_compiling():  # which gives zeros
            return _backward_of_a_backward(ctx, dout, drow_scores)
        if dout is None:
            return (None,) * 7
        return *_backward_of_output(ctx, dout, ctx.saved_tensors if torch.is_grad_enabled() else None), None


def _backward_of_output(ctx: Any, dout: Tensor, saved: Sequence[Tensor] | None) -> list[Tensor | None]:
    """``saved``: as in :func:`gradients`; always given where gradients are differentiated (create_graph)."""
    *needs, _call = ctx.needs_input_grad
    grads = gradients(ctx, dout, Inputs(*needs), saved=saved)
    if saved is None or ctx.twice or not torch.is_grad_enabled():
        return grads
    return differentiable_once(grads, (dout, *saved))


def _backward_of_a_backward(ctx: Any, dout: Tensor | None, drow_scores: Tensor) -> tuple[Tensor | None, ...]:
    """In plain torch: what ``out`` gives, and what a second derivative gives to the scores on their way to the rows."""
    tensors = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 6 if dout is None else _backward_of_output(ctx, dout, tensors)
    if ctx.needs_input_grad[1]:
        saved = _named_saved(*tensors, *ctx.others)
        drow_scores = bf16_kernels(saved.x, saved.w2, saved.static).pick(drow_scores, saved.plan.reverse_index)
        grads[1] = drow_scores if grads[1] is None else grads[1] + drow_scores
    return *grads, None


def remember(ctx: Any, call: Bf16Call | Fp8Call, operands: Sequence[Any], output: Sequence[Tensor]) -> Sequence[Any]:
    """The tensors that :func:`gradients` needs of a call that gave ``output``, to be saved first of all; what else it
    needs is in ``ctx`` then.
    """
    _, row_scores, *z = output
    x, scores, w1, b1, w2, b2 = operands
    tensors, ctx.others, ctx.run_backward, ctx.twice = call.keep((x, scores, w1, b1, w2, b2), row_scores, *z)
    ctx.kept, ctx.parameters = len(tensors), call.parameters
    if call.parameters is not None:
        ctx.are_tensors = [t is not None for t in operands]
    return tensors


def gradients(
    ctx: Any,
    dout: Tensor,
    needs: Inputs[bool],
    run: Callable[..., Sequence[Tensor]] | None = None,
    saved: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """Those that ``needs`` asks for.

    Args:
        ctx: of a function whose first inputs have the places of :class:`Inputs`.
        run: does the work, instead of the backward op, with its arguments and what ``ctx`` has saved after the tensors
            of :func:`remember`.
        saved: ``ctx.saved_tensors``, where the caller reads them too: a checkpoint hands them out once a pass.
    """
    targets, main = _NO_TARGETS, _NO_BUFFERS
    if ctx.parameters is not None:
        needs, targets = targets_of(ctx.parameters, needs, ctx)
        main = targets.of_kernels()
    if saved is None:
        saved = ctx.saved_tensors  # may recompute forward, so look for what is missing first
    tensors = saved[: ctx.kept]
    incoming = INCOMING.flat(dout.contiguous(), needs, main)
    grads: list[Tensor | None]
    try:
        if ctx.twice and torch.is_grad_enabled():  # create_graph
            grads = [*_differentiable_backward(*tensors, *ctx.others, *incoming)]
        elif run is not None:
            grads = [*run(tensors, ctx.others, incoming, saved[ctx.kept :])]
        else:
            grads = [*ctx.run_backward(tensors, ctx.others, incoming)]
    except RuntimeError as error:
        refuse_what_is_not_supported(error)
        raise
    if ctx.parameters is not None:
        targets.finish(grads, ctx.parameters, dout.dtype)
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def differentiable_once(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return refuse_second_derivatives(_ONCE, grads, inputs)


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
    call = call_of(Plan.of(plan), w1, w2, options)
    operands = (x_TH, scores_S, w1.value, b1, w2.value, b2)
    if is_recorded(operands, options) or (in_forward_mode() and not options.inference):  # which ``apply`` refuses
        out: Tensor = apply(Experts, *operands, call)[0]
        return out
    with torch.no_grad():
        return call.forward(operands, save=False)[0]


def call_of(plan: Plan, w1: Weight, w2: Weight, options: Options) -> Bf16Call | Fp8Call:
    """With FP8 copies of both weights in an FP8 layer."""
    parameters = (w1.parameter, w2.parameter) if options.accumulate_into_main_grad else None
    common = plan, Static.of(options.activation, options.layout, options.backend), parameters
    if not isinstance(options.recipe, Fp8Recipe):
        return Bf16Call(*common)
    w1, w2 = with_fp8_copies(w1, w2, options.recipe, options.backend, options.weight_cache)
    return Fp8Call(*common, Numerics.of(options.recipe), w1.fp8, w2.fp8)


def is_recorded(operands: Sequence[Tensor | None], options: Options) -> bool:
    """Whether autograd records a call with these operands."""
    if options.inference or not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in operands) or in_traced_transform()
