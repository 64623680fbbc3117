"""A layer in plain eager calls on a GPU: as few steps for the host as there can be. Elsewhere its parts do the same.

    Layer      forward     logits = x W^T          backward    experts: dx, dscores, dW1, dW2
                           scores, ids = top-k                 dlogits = route'(dscores) + that of the losses
                           plan, experts                       dx += dlogits W, dW = dlogits^T x

    FromIds    forward     plan, experts           backward    experts

One function of autograd each, where the parts are up to four, and one tape each way (``jit/tape.py``). What
runs and what is kept are those of the parts, to the bit: ``routing/topk.py``, ``routing/plan.py``,
``training/experts.py``, ``training/router_linear.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.autograd import apply
from supersonic_moe.config.router import SigmoidGroupedTopK
from supersonic_moe.kernels.interface import PlanTensors, Slots
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
    backward_in_bf16,
    backward_in_fp8,
    call_of,
    differentiable_once,
    gradients,
    is_recorded,
    remember,
)
from supersonic_moe.training.fields import Fields, on_flat
from supersonic_moe.training.ops import (
    BF16_FORWARD,
    BF16_SAVED,
    FP8_FORWARD,
    FP8_SAVED,
    FP8_WEIGHTS,
    INCOMING,
    experts_backward,
    experts_forward,
    experts_fp8_backward,
    experts_fp8_forward,
)
from supersonic_moe.training.options import Options

Grads: TypeAlias = tuple[Tensor | None, ...]


class Choice(NamedTuple):
    """How a router chooses: arguments of ``route_forward``."""

    correction_bias: Tensor | None
    k: int
    kind: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    scaling_factor: float
    routing_backend: str
    with_loss: bool
    """Whether the Switch loss is wanted."""

    @property
    def config(self) -> tuple[Any, ...]:
        """Of ``route_backward``."""
        return self[2:8]

    @property
    def of_loss(self) -> tuple[str, bool]:
        """Arguments of the ops of the loss: a backend, and whether probabilities come from sigmoids."""
        return self.routing_backend, self.kind == SigmoidGroupedTopK.kind


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
        out, counts, logits, _, ids, *loss = _forward_of_logits(call, choice, operands, save=False)
    return Found(out, logits, counts, ids, loss[0] if loss else None)


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
        x, router, *weights, ctx.choice, call = args
        found = _forward_of_logits(call, ctx.choice, args[:6], save=True)
        own = 4 if ctx.choice.with_loss else 3
        logits, scores, ids, *loss = found[-own:]
        out, kept, counts = _kept(ctx, (x, scores, *weights), found[:-own], call)
        ctx.save_for_backward(*kept, x, router, logits, scores, ids, counts)
        constant = () if x.requires_grad or router.requires_grad else (logits, *loss)
        ctx.mark_non_differentiable(counts, ids, *constant)
        return out, logits, counts, ids, loss[0] if loss else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlogits: Tensor | None, *more: Tensor | None) -> Grads:
        *needed, _choice, _call = ctx.needs_input_grad
        needs, (_, _, dloss) = Inputs(*needed), more
        if dout is None:
            return _backward_of_losses(ctx, dlogits, dloss, needs)
        if not torch.is_grad_enabled():
            return *_backward_of_all(ctx, dout, dlogits, dloss, needs), None, None
        saved = ctx.saved_tensors  # create_graph
        with torch.no_grad():
            once = _backward_of_all(ctx, dout, dlogits, dloss, needs, saved)
        return *differentiable_once(once, (dout, dlogits, dloss, *saved)), None, None


def _backward_of_all(
    ctx: Any,
    dout: Tensor,
    dlogits: Tensor | None,
    dloss: Tensor | None,
    needs: Inputs[bool],
    saved: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """``saved``: as in :func:`gradients`."""
    if not (needs.x or needs.scores):
        return gradients(ctx, dout, needs, saved=saved)

    def run(tensors: Any, others: Any, incoming: Any, chosen: Any) -> Sequence[Tensor]:
        asked = dlogits, dloss, needs.x, needs.scores, *ctx.choice.config
        together = _TOGETHER.get(ctx.run_backward)
        if together is not None:
            return together(*chosen, *asked, *tensors, *others, *incoming)
        dx, dscores, *dweights = ctx.run_backward(tensors, others, incoming)
        return dx, _router_backward(dscores, dx, *chosen, *asked), *dweights

    grads = gradients(ctx, dout, needs._replace(scores=True), run, saved)
    if not needs.scores:
        grads[1] = None
    return grads


def _backward_of_losses(ctx: Any, dlogits: Tensor | None, dloss: Tensor | None, needs: Inputs[bool]) -> Grads:
    """Where nothing depends on the output. May be differentiated again."""
    x, router, logits, _, _, counts = ctx.saved_tensors[ctx.kept :]
    if dloss is not None:
        backend, sigmoid = ctx.choice.of_loss
        if torch.is_grad_enabled():  # create_graph
            of_loss = plain_loss_backward(dloss, logits, counts, sigmoid)
        else:
            of_loss = switch_loss_backward(dloss, logits, counts, backend, sigmoid)
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
        out, kept, _ = _kept(ctx, operands, _forward_of_ids(call, ids, operands, save=True), call)
        ctx.save_for_backward(*kept)
        ctx.shape = ids.shape
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> Grads:
        if dout is None:
            return (None,) * 8
        *needed, _ids, _call = ctx.needs_input_grad
        saved = ctx.saved_tensors if torch.is_grad_enabled() else None
        dx, dscores, *dweights = gradients(ctx, dout, Inputs(*needed), saved=saved)
        grads: Sequence[Tensor | None] = (dx, None if dscores is None else dscores.view(ctx.shape), *dweights)
        if saved is not None:  # create_graph
            grads = differentiable_once(grads, (dout, *saved))
        return *grads, None, None


def _kept(
    ctx: Any, operands: Sequence[Any], found: Sequence[Tensor], call: Bf16Call | Fp8Call
) -> tuple[Tensor, Sequence[Any], Tensor]:
    """(output, what to save, counts). ``found``: of :func:`_forward_of_ids`."""
    ctx.set_materialize_grads(False)
    output, plan = found[:-6], PlanTensors(*found[-6:])
    return output[0], remember(ctx, call._replace(plan=_plan(plan)), operands, output), plan.counts


# ---- tapes: forward --------------------------------------------------------------------------------------------------

_NO_PLAN: Any = tuple.__new__(Plan, (*[None] * 7, False))


def _plan(made: PlanTensors) -> Plan:
    """Every token has as many slots as any other."""
    offsets, gather, scatter, row_expert, reverse, _ = made
    return Plan(offsets, gather, scatter, row_expert, reverse, token_rows=reverse, token_offsets=None, identity=False)


class _Ids(NamedTuple):
    ids: Tensor


class _Router(NamedTuple):
    router: Tensor
    choice: Choice


def _of_ids(fields: Fields[..., Any], forward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """``forward`` of ``fields`` with ids (T, K) in front and a plan that is made of them. Gives what ``forward`` gives
    and the plan; where nothing is saved, output and counts.
    """

    def run(given: _Ids, call: Any) -> tuple[Tensor, ...]:
        tokens, k = given.ids.shape
        slots = Slots(given.ids.reshape(-1), None, k, tokens, call.w1.shape[0], 1, tokens * k)
        plan = build(slots)
        output = forward(*fields.flat(*call._replace(scores=call.scores.reshape(-1), plan=_plan(plan))))
        return (*output, *plan) if call.save else (output[0], plan.counts)

    return run


def _of_logits(run: Callable[..., Any], product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """``run`` of :func:`_of_ids` with the router in front. Gives logits, scores, ids and the loss as well."""

    def run_all(given: _Router, call: Any) -> tuple[Tensor, ...]:
        choice = given.choice
        logits = product(call.x, given.router)
        scores, ids = route_forward(logits, *choice[:8])
        found = run(_Ids(ids), call._replace(scores=scores))
        if choice.with_loss:
            return *found, logits, scores, ids, switch_loss_forward(logits, found[-1], *choice.of_loss)
        return *found, logits, scores, ids

    return run_all


def _product(x: Tensor, router: Tensor) -> Tensor:
    """As a tape can hold it. For who looks at ops it is ``F.linear``: selective checkpointing keeps no tensor that is
    written to.
    """
    return torch.mm(x, router.t(), out=x.new_empty(x.shape[0], router.shape[0]))


def _callers(fields: Fields[..., Any], forward: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """From ids on, and from the router on."""
    run = _of_ids(fields, forward)
    of_ids = on_flat(run, Fields(_Ids), fields)
    plain, observed = (on_flat(_of_logits(run, p), Fields(_Router), fields) for p in (_product, F.linear))
    return caller(of_ids, of_ids), caller(observed, plain)


_BF16_CALLERS, _FP8_CALLERS = _callers(BF16_FORWARD, experts_forward), _callers(FP8_FORWARD, experts_fp8_forward)


def _forward_of_ids(call: Bf16Call | Fp8Call, ids: Tensor, operands: Sequence[Any], save: bool) -> tuple[Tensor, ...]:
    run, _ = _BF16_CALLERS if isinstance(call, Bf16Call) else _FP8_CALLERS
    x, scores, w1, b1, w2, b2 = operands
    found: tuple[Tensor, ...] = run(ids, *call.arguments((x, scores, w1, b1, w2, b2), save))
    return found


def _forward_of_logits(
    call: Bf16Call | Fp8Call, choice: Choice, operands: Sequence[Any], save: bool
) -> tuple[Tensor, ...]:
    """``operands``: with the router in the place of scores."""
    _, run = _BF16_CALLERS if isinstance(call, Bf16Call) else _FP8_CALLERS
    x, router, w1, b1, w2, b2 = operands
    no_scores: Any = None
    found: tuple[Tensor, ...] = run(router, *choice, *call.arguments((x, no_scores, w1, b1, w2, b2), save))
    return found


# ---- tapes: backward -------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What a layer saves beside what its experts save."""

    tokens: Tensor
    router: Tensor
    logits: Tensor
    scores: Tensor
    ids: Tensor
    counts: Tensor


class _Asked(NamedTuple):
    dlogits: Tensor | None
    dloss: Tensor | None
    of_x: bool
    of_router: bool
    kind: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    scaling_factor: float
    routing_backend: str


def _route_back(dscores_S: Tensor, dx: Tensor, saved: _Saved, asked: _Asked) -> Tensor:
    """The router's gradient, if it is asked for; ``dx``, if that is, gets the router's share added. Sums of ``dlogits``
    are rounded in the order in which autograd would make them.
    """
    x, router, logits, scores, ids, counts = saved
    dlogits, dloss, of_x, of_router, *config = asked
    total = route_backward(dscores_S.view(ids.shape), logits, scores, ids, *config)
    if dloss is not None:
        sigmoid = asked.kind == SigmoidGroupedTopK.kind
        of_loss = switch_loss_backward(dloss, logits, counts, asked.routing_backend, sigmoid)
        dlogits = of_loss if dlogits is None else torch.add(dlogits, of_loss, out=of_loss)
    if dlogits is not None:
        torch.add(dlogits, total, out=total)
    if of_x:
        torch.addmm(dx, total, router, out=dx)
    return torch.mm(total.t(), x, out=router.new_empty(router.shape)) if of_router else total


def _and_router(backward: Callable[..., Any], *fields: Fields[..., Any]) -> Callable[..., Any]:
    """``backward`` of the experts, whose arguments are ``fields``, and then that of the router."""

    def run(saved: _Saved, asked: _Asked, *arguments: Any) -> tuple[Tensor, ...]:
        flat = itertools.chain.from_iterable(f.flat(*given) for f, given in zip(fields, arguments, strict=True))
        dx, dscores, *dweights = backward(*flat)
        return dx, _route_back(dscores, dx, saved, asked), *dweights

    together = on_flat(run, Fields(_Saved), Fields(_Asked), *fields)
    return caller(together, together)


class _Experts(NamedTuple):
    """What the router's backward needs of that of the experts."""

    dscores: Tensor
    dx: Tensor


def _after_experts(experts: _Experts, saved: _Saved, asked: _Asked) -> Tensor:
    return _route_back(experts.dscores, experts.dx, saved, asked)


_separate = on_flat(_after_experts, Fields(_Experts), Fields(_Saved), Fields(_Asked))
_router_backward = caller(_separate, _separate)
_TOGETHER: dict[Any, Callable[..., Sequence[Tensor]]] = {
    backward_in_bf16: _and_router(experts_backward, BF16_SAVED, INCOMING),
    backward_in_fp8: _and_router(experts_fp8_backward, FP8_WEIGHTS, FP8_SAVED, INCOMING),
}
"""Of each backward that is one op."""
