"""A layer in plain eager calls on a GPU: as few steps for the host as there can be. Elsewhere its parts do the same.

    Layer      forward     logits = x W^T          backward    experts: dx, dscores, dW1, dW2
                           scores, ids = top-k                 dlogits = route'(dscores) + that of the losses
                           plan, experts                       dx += dlogits W, dW = dlogits^T x

    FromIds    forward     plan, experts           backward    experts

One function of autograd each, where the parts are up to four; what stands in a line is one tape (``jit/tape.py``). What
runs and what is kept are those of the parts, to the bit: ``routing/topk.py``, ``routing/plan.py``,
``training/experts.py``, ``training/router_linear.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.autograd import apply
from supersonic_moe.config.router import SigmoidGroupedTopK
from supersonic_moe.kernels.interface import Slots
from supersonic_moe.kernels.reference.aux_loss import switch_loss_backward as plain_loss_backward
from supersonic_moe.ops import caller
from supersonic_moe.private_api import in_forward_mode, transforms_active
from supersonic_moe.routing.aux_loss import switch_loss_backward, switch_loss_forward
from supersonic_moe.routing.plan import build
from supersonic_moe.routing.topk import route_backward, route_forward
from supersonic_moe.training.arguments import Inputs, Plan, Weight
from supersonic_moe.training.experts import (
    Bf16Call,
    Fp8Call,
    call_of,
    differentiable_once,
    gradients,
    is_recorded,
    remember,
)
from supersonic_moe.training.fields import Fields, on_flat
from supersonic_moe.training.ops import BF16_FORWARD, FP8_FORWARD, experts_forward, experts_fp8_forward
from supersonic_moe.training.options import Options

Grads: TypeAlias = tuple[Tensor | None, ...]


class Choice(NamedTuple):
    """How a router chooses: arguments of ``route_forward``."""

    correction_bias: Tensor | None
    k: int
    config: tuple[Any, ...]
    """``topk.encode`` and a backend."""
    with_loss: bool
    """Whether the Switch loss is wanted."""

    @property
    def of_loss(self) -> tuple[str, bool]:
        """Arguments of the ops of the loss: a backend, and whether probabilities come from sigmoids."""
        kind, *_, backend = self.config
        return backend, kind == SigmoidGroupedTopK.kind


class Found(NamedTuple):
    output: Tensor
    """(T, H)"""
    logits: Tensor
    """(T, E)"""
    counts: Tensor
    """(E,) int32"""
    ids: Tensor
    """(T, K) int32"""
    loss: Tensor | None


def suits(x: Tensor, backend: str) -> bool:
    """Whether a call on ``x`` is one for this file. Who looks at ops makes no difference, so that a forward that
    checkpointing runs again keeps the same tensors.
    """
    plain = not (torch.compiler.is_compiling() or transforms_active() or in_forward_mode())
    return plain and x.is_cuda and backend != "reference"


def run_layer(x_TH: Tensor, router_EH: Tensor, choice: Choice, w1: Weight, w2: Weight, options: Options) -> Found:
    """Of operands of one dtype."""
    operands = (x_TH, router_EH, w1.value, options.b1, w2.value, options.b2)
    call = call_of(_NO_PLAN, w1, w2, options)
    if is_recorded(operands, options):
        return Found(*apply(Layer, *operands, choice, call))
    with torch.no_grad():
        logits_TE, scores_TK, ids_TK = _choose(x_TH, router_EH, *choice[:2], *choice.config)
        out_TH, counts_E = _forward_of_ids(call, ids_TK, (x_TH, scores_TK, *operands[2:]), save=False)
        loss = switch_loss_forward(logits_TE, counts_E, *choice.of_loss) if choice.with_loss else None
    return Found(out_TH, logits_TE, counts_E, ids_TK, loss)


def run_ids(
    x_TH: Tensor, ids_TK: Tensor, scores_TK: Tensor, w1: Weight, b1: Tensor | None, w2: Weight, b2: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """(T, H) output. Scores of any floating dtype, everything else in one."""
    operands = (x_TH, scores_TK, w1.value, b1, w2.value, b2)
    call = call_of(_NO_PLAN, w1, w2, options)
    if is_recorded(operands, options):
        recorded: Tensor = apply(FromIds, *operands, (ids_TK,), call)
        return recorded
    with torch.no_grad():
        return _forward_of_ids(call, ids_TK, operands, save=False)[0]


# ---- autograd --------------------------------------------------------------------------------------------------------


class Layer(torch.autograd.Function):
    """``apply(x, router, w1, b1, w2, b2, choice, call)``. Gives the fields of :class:`Found`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        x, router, *weights, choice, call = args
        ctx.choice = choice
        logits, scores, ids = _choose(x, router, *choice[:2], *choice.config)
        out, kept, counts = _forward(ctx, (x, scores, *weights), ids, call)
        loss = switch_loss_forward(logits, counts, *choice.of_loss) if choice.with_loss else None
        ctx.save_for_backward(*kept, x, router, logits, scores, ids, counts)
        constant = [t for t in (logits, loss) if t is not None and not (x.requires_grad or router.requires_grad)]
        ctx.mark_non_differentiable(counts, ids, *constant)
        return out, logits, counts, ids, loss

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlogits: Tensor | None, *more: Tensor | None) -> Grads:
        *needed, _choice, _call = ctx.needs_input_grad
        needs, (_, _, dloss) = Inputs(*needed), more
        if dout is None:
            return _backward_of_losses(ctx, dlogits, dloss, needs)
        if torch.is_grad_enabled():  # create_graph
            with torch.no_grad():
                once = Layer.backward(ctx, dout, dlogits, *more)[:6]
            return *differentiable_once(once, (dout, dlogits, dloss, *ctx.saved_tensors)), None, None
        routes = needs.x or needs.scores
        grads, (x, router, *chosen) = gradients(ctx, dout, needs._replace(scores=routes))
        if routes:
            dx, dscores = grads[:2]
            asked = dx, dlogits, dloss, needs.scores
            drouter = _router_backward(dscores, *chosen, x, router, *asked, *ctx.choice.config)
            grads[1] = drouter if needs.scores else None
        return *grads, None, None


def _backward_of_losses(ctx: Any, dlogits: Tensor | None, dloss: Tensor | None, needs: Inputs[bool]) -> Grads:
    """Where nothing depends on the output. May be differentiated again."""
    x, router, logits, _, _, counts = ctx.saved_tensors[ctx.kept :]
    if dloss is not None:
        backward = plain_loss_backward if torch.is_grad_enabled() else switch_loss_backward
        backend, sigmoid = ctx.choice.of_loss
        arguments = (sigmoid,) if torch.is_grad_enabled() else (backend, sigmoid)
        of_loss = backward(dloss, logits, counts, *arguments)
        dlogits = of_loss if dlogits is None else dlogits + of_loss
    if dlogits is None:
        return (None,) * 8
    dx = dlogits @ router if needs.x else None
    return dx, dlogits.t() @ x if needs.scores else None, *[None] * 6


class FromIds(torch.autograd.Function):
    """``apply(x, scores, w1, b1, w2, b2, (ids,), call)``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *operands, (ids,), call = args
        out, kept, _ = _forward(ctx, operands, ids, call)
        ctx.save_for_backward(*kept)
        ctx.shape = ids.shape
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> Grads:
        if dout is None:
            return (None,) * 8
        *needed, _ids, _call = ctx.needs_input_grad
        (dx, dscores, *dweights), _ = gradients(ctx, dout, Inputs(*needed))
        grads: Sequence[Tensor | None] = (dx, None if dscores is None else dscores.view(ctx.shape), *dweights)
        if torch.is_grad_enabled():  # create_graph
            grads = differentiable_once(grads, (dout, *ctx.saved_tensors))
        return *grads, None, None


def _forward(
    ctx: Any, operands: Sequence[Any], ids: Tensor, call: Bf16Call | Fp8Call
) -> tuple[Tensor, Sequence[Any], Tensor]:
    """(output, what to save, counts)."""
    ctx.set_materialize_grads(False)
    *output, offsets, gather, scatter, row_expert, reverse, counts = _forward_of_ids(call, ids, operands, save=True)
    plan = Plan(offsets, gather, scatter, row_expert, reverse, reverse, None, False)
    return output[0], remember(ctx, call._replace(plan=plan), operands, output), counts


# ---- tapes -----------------------------------------------------------------------------------------------------------

_NO_PLAN: Any = tuple.__new__(Plan, (*[None] * 7, False))


class _Ids(NamedTuple):
    ids: Tensor


def _of_ids(fields: Fields[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of ``fields`` with ids (T, K) in front and a plan that is made of them. Gives what ``forward`` gives
    and the plan; where nothing is saved, output and counts.
    """

    def run(given: _Ids, call: Any) -> tuple[Tensor, ...]:
        tokens, k = given.ids.shape
        slots = Slots(given.ids.reshape(-1), None, k, tokens, call.w1.shape[0], 1, tokens * k)
        offsets, gather, scatter, row_expert, reverse, counts = plan = build(slots)
        call = call._replace(
            scores=call.scores.reshape(-1),
            plan=Plan(offsets, gather, scatter, row_expert, reverse, reverse, None, False),
        )
        output = forward(*fields.flat(*call))
        return (*output, *plan) if call.save else (output[0], counts)

    flat = on_flat(run, Fields(_Ids), fields)
    return caller(flat, flat)


_bf16_of_ids, _fp8_of_ids = _of_ids(BF16_FORWARD, experts_forward), _of_ids(FP8_FORWARD, experts_fp8_forward)


def _forward_of_ids(call: Bf16Call | Fp8Call, ids: Tensor, operands: Sequence[Any], save: bool) -> tuple[Tensor, ...]:
    run, (x, scores, w1, b1, w2, b2) = _bf16_of_ids if isinstance(call, Bf16Call) else _fp8_of_ids, operands
    found: tuple[Tensor, ...] = run(ids, *call.arguments((x, scores, w1, b1, w2, b2), save))
    return found


def _route(x: Tensor, router: Tensor, bias: Tensor | None, k: int, *config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, scores, ids)."""
    logits = torch.mm(x, router.t(), out=x.new_empty(x.shape[0], router.shape[0]))  # which a tape can hold
    return logits, *route_forward(logits, bias, k, *config)


def _route_observed(x: Tensor, router: Tensor, *choice: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same for who looks at ops: selective checkpointing keeps no tensor that is written to."""
    logits = F.linear(x, router)
    return logits, *route_forward(logits, *choice)


def _route_back(
    dscores_S: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, counts: Tensor, x: Tensor, router: Tensor,
    dx: Tensor | None, dlogits: Tensor | None, dloss: Tensor | None, wanted: bool, kind: str, *config: Any,
) -> Tensor:  # fmt: skip
    """The router's gradient, if it is ``wanted``; ``dx``, where there is one, gets the router's share added. Sums of
    ``dlogits`` are rounded in the order in which autograd would make them.
    """
    total = route_backward(dscores_S.view(ids.shape), logits, scores, ids, kind, *config)
    if dloss is not None:
        of_loss = switch_loss_backward(dloss, logits, counts, config[-1], kind == SigmoidGroupedTopK.kind)
        dlogits = of_loss if dlogits is None else torch.add(dlogits, of_loss, out=of_loss)
    if dlogits is not None:
        torch.add(dlogits, total, out=total)
    if dx is not None:
        torch.addmm(dx, total, router, out=dx)
    return torch.mm(total.t(), x, out=router.new_empty(router.shape)) if wanted else total


_choose, _router_backward = caller(_route_observed, _route), caller(_route_back, _route_back)
