"""``grouped_linear``: one linear layer for each expert, on rows sorted by expert, for what is not an expert MLP as this
package knows it: a gate of your own between two of them, an adapter beside them, a trainer's grouped-GEMM seam.

    forward    y[r] = x[r] W[e]ᵀ + b[e]          for the rows r of expert e; with ``gather`` x[token of r]
    backward   dx = dy W      dW[e] = dy[rows of e]ᵀ x[rows of e]      db[e] = sum of dy over the rows of e

Rows at and past the last offset belong to no expert: they are not read, and they are exact zeros in y and dx. Saved for
backward: x, W and the plan. FLOPs: 2 P N C forward, 4 P N C backward, for P rows, C columns of x and N of y.

In FP8 (``recipe=Fp8Recipe()``) x, dy and W are quantized as in ``training/fp8.py``, and weight gradients multiply in
bf16 or e4m3 as ``recipe.wgrad`` says.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.autocast import autocast_dtype, without_autocast
from supersonic_moe.autograd import apply, in_traced_transform, refuse_second_derivatives
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe, Recipe, as_recipe
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.alignment import aligned, empty_gradient, is_turned, weight_gradient
from supersonic_moe.kernels.interface import Experts, Fp8Experts, Into, Quantized, Rows, TokenRows
from supersonic_moe.private_api import in_forward_mode
from supersonic_moe.quantization.block_format import padded_capacity
from supersonic_moe.quantization.weight_cache import Fp8Weight
from supersonic_moe.routing.plan import plan_from_offsets
from supersonic_moe.training.arguments import Numerics, Plan
from supersonic_moe.training.fields import Fields, on_flat
from supersonic_moe.training.ops import quantized


def grouped_linear(
    x: Tensor,
    w: Tensor,
    offsets_or_plan: Tensor | RoutingPlan,
    *,
    bias: Tensor | None = None,
    gather: bool = False,
    recipe: Recipe | None = None,
) -> Tensor:
    """(P, N) in the dtype of x: each row times the weight of its expert. Differentiable in x, w and bias; no host
    synchronization.

    Args:
        x: (P, C) rows sorted by expert; with ``gather`` (T, C) tokens.
        w: (E, N, C). Stored (E, C, N) it is passed as ``w.transpose(1, 2)``: a view, never a copy.
        offsets_or_plan: (E,) int32 or int64 cumulative ends on the device of x, as in
            ``torch.nn.functional.grouped_mm``; or a :class:`RoutingPlan`, of which P is the ``capacity``. Of counts
            take ``cumsum``: nothing looks at their values, and ends that fall give rows to the wrong experts.
        bias: (E, N).
        gather: row r is x[plan.gather_index[r]] instead of x[r], zeros where that is -1. Needs a plan.
        recipe: ``Fp8Recipe()`` multiplies in e4m3 (bfloat16 operands, or autocast to it). Default: in the dtype of x.

    Under ``torch.autocast`` operands are converted to the autocast dtype, as of ``torch.nn.Linear``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, with the fix.
    """
    recipe = as_recipe(recipe)
    checks.flag("gather", gather)
    checks.tensor("x", x, 2, "(T, C)" if gather else "(P, C)")
    checks.tensor("w", w, 3, "(E, N, C)")
    plan = _plan(offsets_or_plan, x, w, gather)
    checks.size("w", "last dimension", w.shape[2], x.shape[1], "the last dimension of x")
    if bias is not None:
        checks.tensor("bias", bias, 2, "(E, N)")
        checks.size("bias", "shape", tuple(bias.shape), tuple(w.shape[:2]), "one bias for each row of w")
    x, w, bias = _in_one_dtype(x, w, bias)
    if isinstance(recipe, Fp8Recipe):
        if x.dtype is not torch.bfloat16:
            raise TypeError(
                f"Fp8Recipe needs bfloat16 inputs and weights; got x as {checks.describe(x)}. Convert the model with "
                ".to(torch.bfloat16), or run under torch.autocast(dtype=torch.bfloat16)."
            )
        numerics = Numerics.of(recipe)
        (copy,) = quantized([w.detach()], recipe.scale, "auto")
    else:
        numerics, copy = None, None
    call = _Call(Plan.of(plan), gather, numerics, copy)
    recorded = in_traced_transform() or any(t is not None and t.requires_grad for t in (x, w, bias))
    if (recorded and torch.is_grad_enabled()) or in_forward_mode():  # which ``apply`` refuses
        y: Tensor = apply(GroupedLinear, x, w, bias, call)
        return y
    with torch.no_grad():
        return call.forward(x, w, bias)


def _plan(offsets_or_plan: Tensor | RoutingPlan, x: Tensor, w: Tensor, gather: bool) -> RoutingPlan:
    num_experts = w.shape[0]
    if isinstance(offsets_or_plan, RoutingPlan):
        plan = offsets_or_plan
        checks.size("the plan", "num_experts", plan.num_experts, num_experts, "the experts of w")
        rows, what = (plan.num_tokens, "num_tokens") if gather else (plan.capacity, "capacity")
        checks.size("x", "rows", x.shape[0], rows, f"{what} of the plan; gather={gather}")
        checks.same_device("the plan", plan.expert_offsets, "x", x)
        return plan
    if gather:
        raise TypeError(
            "gather=True needs a RoutingPlan, which says what token a row reads; got "
            f"{checks.describe(offsets_or_plan)}. Make one with plan_from_topk, or pass rows that are sorted by expert."
        )
    if not isinstance(offsets_or_plan, Tensor):
        raise TypeError(
            "offsets_or_plan must be the cumulative ends of the experts, an int32 tensor (E,), or a RoutingPlan; got "
            f"{checks.describe(offsets_or_plan)}. Use torch.tensor(ends, dtype=torch.int32, device=x.device)."
        )
    checks.ids("offsets", offsets_or_plan, 1)
    checks.size("offsets", "length", offsets_or_plan.shape[0], num_experts, "one cumulative end for each expert of w")
    checks.same_device("offsets", offsets_or_plan, "x", x)
    return plan_from_offsets(offsets_or_plan, x.shape[0])


def _in_one_dtype(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    autocast = autocast_dtype(x)
    for name, t in (("x", x), ("w", w), ("bias", bias)):
        if t is None:
            continue
        checks.floating(name, t)
        checks.same_device(name, t, "x", x)
        checks.dense(name, t)
        if autocast is None:
            checks.same_dtype(name, t, "x", x)
    if autocast is None:
        return x, w, bias
    return x.to(autocast), w.to(autocast), None if bias is None else bias.to(autocast)


TRANSPOSED = Into(transposed=True)


# ---- kernels ---------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    x: Tensor
    w: Tensor
    bias: Tensor | None
    w_q: Tensor | None
    """(E, N, C) e4m3; None: multiply in the dtype of x."""
    w_scale: Tensor | None
    plan: Plan
    gather: bool
    pow2: bool


class Backward(NamedTuple):
    dy: Tensor
    x: Tensor
    w: Tensor
    w_q_transposed: Tensor | None
    w_scale: Tensor | None
    plan: Plan
    gather: bool
    pow2: bool
    fp8_wgrad: bool
    needs_x: bool
    needs_w: bool
    needs_bias: bool


def _kernels(x: Tensor, w: Tensor) -> Experts:
    choice = registry.choose(x.device, x.dtype, hidden=w.shape[2], intermediate=w.shape[1])
    return registry.kernels(choice.name).experts


def _fp8_kernels(x: Tensor, w: Tensor) -> Fp8Experts:
    return registry.fp8_kernels(registry.choose_fp8(x.device, hidden=w.shape[2], intermediate=w.shape[1]).name)


def _forward(call: Forward) -> Tensor:
    plan, w_q, w_scale = call.plan, call.w_q, call.w_scale
    index = plan.gather_index if call.gather else None
    with without_autocast(call.x):
        k: Experts
        if w_q is None or w_scale is None:
            k = _kernels(call.x, call.w)
            call = aligned(call, k.ALIGNMENT, "x", "w")
            y_PN = k.grouped_mm(Rows(call.x, index), call.w.mT, plan.expert_offsets)
        else:
            k = fp8 = _fp8_kernels(call.x, call.w)
            x = Rows(fp8.quantize_rows(call.x, call.pow2, not call.gather), index)
            y_PN = fp8.grouped_mm_fp8(x, Quantized(w_q, w_scale), plan.expert_offsets)
        if call.bias is None:
            k.zero_dead_rows(y_PN, plan.expert_offsets)
            return y_PN
        num_rows, num_experts = y_PN.shape[0], call.w.shape[0]
        row = torch.arange(num_rows, device=y_PN.device, dtype=torch.int32)
        alive = torch.where(plan.row_expert < num_experts, row, -1)
        return k.gather_sum(y_PN, None, call.bias, plan.row_expert, TokenRows(alive, None, 1, num_rows))


def _backward(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    plan, offsets = call.plan, call.plan.expert_offsets
    dx, dw, dbias = (call.x.new_empty(0) for _ in range(3))
    with without_autocast(call.x):
        k = _kernels(call.x, call.w) if call.w_q_transposed is None else _fp8_kernels(call.x, call.w)
        call = aligned(call, k.ALIGNMENT, "x", "dy")
        if call.needs_x:
            dx = _dx_of_rows(k, call)
            if call.gather:
                dx = k.gather_sum(dx, None, None, plan.row_expert, plan.rows_of_tokens(call.x.shape[0]))
            else:
                k.zero_dead_rows(dx, offsets)
        if call.needs_w:
            dw = weight_gradient(is_turned(call.w), TRANSPOSED, functools.partial(_weight_gradient, k, call))
        if call.needs_bias:
            dbias = k.segment_sum(Rows(call.dy), None, offsets).to(call.x.dtype)
    return dx, dw, dbias


def _dx_of_rows(k: Experts, call: Backward) -> Tensor:
    """(P, C)"""
    if call.w_q_transposed is None or call.w_scale is None:
        w = aligned(call, k.ALIGNMENT, "w").w
        return k.grouped_mm(Rows(call.dy), w, call.plan.expert_offsets)
    fp8 = _fp8_kernels(call.x, call.w)
    dy = Rows(fp8.quantize_rows(call.dy, call.pow2, True))
    return fp8.grouped_mm_fp8(dy, Quantized(call.w_q_transposed, call.w_scale.mT), call.plan.expert_offsets)


def _weight_gradient(k: Experts, call: Backward, into: Into) -> Tensor:
    """In e4m3 both operands are transposed, each expert's rows padded to whole blocks of 128."""
    offsets, index = call.plan.expert_offsets, call.plan.gather_index
    if not call.fp8_wgrad:
        return k.grouped_mm_wgrad(Rows(call.x, index if call.gather else None), call.dy, offsets, into)
    fp8 = _fp8_kernels(call.x, call.w)
    segments = fp8.pad_segments(offsets, index, padded_capacity(index.shape[0], offsets.shape[0] - 1))
    if call.gather:
        x, source = fp8.quantize_columns(call.x, segments.token_index, call.pow2, segments=segments), segments.source
    else:
        x, source = fp8.quantize_columns(call.x, segments.row_index, call.pow2), None
    dy = fp8.quantize_columns(call.dy, segments.row_index, call.pow2, tiled=True)
    return fp8.grouped_mm_wgrad_fp8(x, dy, segments.offsets, into, source)


# ---- ops -------------------------------------------------------------------------------------------------------------


def _forward_fake(call: Forward) -> Tensor:
    return call.x.new_empty(call.plan.row_expert.shape[0], call.w.shape[1])


def _backward_fake(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    x, w = call.x, call.w
    dx, dbias = (
        x.new_empty(shape if needed else 0)
        for needed, shape in ((call.needs_x, x.shape), (call.needs_bias, w.shape[:2]))
    )
    return dx, empty_gradient(is_turned(w), x, w.shape) if call.needs_w else x.new_empty(0), dbias


_FORWARD, _BACKWARD = Fields(Forward), Fields(Backward)
for _name, _fields, _result, _run, _fake in (
    ("grouped_linear_forward", _FORWARD, "Tensor", _forward, _forward_fake),
    ("grouped_linear_backward", _BACKWARD, "Tensor dx, Tensor dw, Tensor dbias", _backward, _backward_fake),
):
    torch.library.define(f"supersonic_moe::{_name}", f"({_fields.schema}) -> ({_result})")
    torch.library.impl(f"supersonic_moe::{_name}", ("cpu", "cuda"))(on_flat(_run, _fields))
    torch.library.register_fake(f"supersonic_moe::{_name}")(on_flat(_fake, _fields))


class _Call(NamedTuple):
    """A call of the ops, but for its operands."""

    plan: Plan
    gather: bool
    numerics: Numerics | None
    copy: Fp8Weight | None
    """Of the weight, in FP8."""

    @property
    def pow2(self) -> bool:
        return self.numerics is not None and self.numerics.scale == "pow2"

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        w_q, _, w_scale = self.copy or (None, None, None)
        arguments = _FORWARD.flat(x, w, bias, w_q, w_scale, self.plan, self.gather, self.pow2)
        y: Tensor = torch.ops.supersonic_moe.grouped_linear_forward.default(*arguments)
        return y


class GroupedLinear(torch.autograd.Function):
    """``apply(x, w, bias, call)``: operands in the dtype of the computation."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        return call.forward(x, w, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, call = inputs
        _, transposed, scale = call.copy or (None, None, None)
        ctx.save_for_backward(x, w, transposed, scale, *call.plan[:-1])
        ctx.identity, ctx.gather, ctx.pow2 = call.plan.identity, call.gather, call.pow2
        ctx.fp8_wgrad = call.numerics is not None and call.numerics.wgrad == "fp8"

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, transposed, scale, *plan = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        arguments = _BACKWARD.flat(
            dy.contiguous(), x, w, transposed, scale, Plan._make((*plan, ctx.identity)), ctx.gather, ctx.pow2,
            ctx.fp8_wgrad, *needs,
        )  # fmt: skip
        grads = torch.ops.supersonic_moe.grouped_linear_backward.default(*arguments)
        if torch.is_grad_enabled():  # create_graph
            grads = refuse_second_derivatives(_ONCE, grads, (dy, x, w))
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


_ONCE = (
    "grouped_linear has no second derivatives. Leave create_graph out, or write the product in plain torch where its "
    "gradient is differentiated again."
)
