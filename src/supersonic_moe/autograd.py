"""``torch.autograd.Function``s: cheap calls, and second derivatives that are refused instead of wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from supersonic_moe.private_api import BASE_APPLIES, in_forward_mode, transforms_active, transforms_traced


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` where every argument of ``forward`` is passed, by position.

    For a Function with ``setup_context``, ``apply`` first binds its arguments to the signature of ``forward``, to fill
    in defaults: 10 µs of Python or more, four times in a step of a layer. Here nothing is left to fill in, so what it
    calls in the end is called at once, except under ``torch.compile`` and ``torch.func``, which have ways of their own,
    and in versions of torch that are built differently.
    """
    if torch.compiler.is_compiling():
        if in_traced_transform():  # a view has the ``requires_grad`` that autograd sees
            args = tuple([t.view_as(t) if isinstance(t, Tensor) else t for t in args])
        return function.apply(*args)  # type: ignore[no-untyped-call]
    try:
        transformed = transforms_active()
        if transformed and not (torch.is_grad_enabled() or in_forward_mode()):  # vmap refuses a Function even here
            return function.forward(*args)
        if transformed or not BASE_APPLIES:
            return function.apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    except RuntimeError as error:
        refuse_what_is_not_supported(error)
        raise


def in_traced_transform() -> bool:
    """Whether ``torch.compile`` traces a transform of ``torch.func``. There ``requires_grad`` and ``needs_input_grad``
    are False for what the transformed function was called with (torch 2.13): a gradient would be zeros.

    Raises NotImplementedError in one that is inside of another: torch then takes the derivative of the backward of any
    ``torch.autograd.Function`` for zero.
    """
    if not torch.compiler.is_compiling():
        return False
    level = transforms_traced()
    if level > 1:
        raise NotImplementedError(
            "torch.compile of a transform of torch.func inside of another, as grad of grad or vmap of grad, is not "
            "supported. Call it outside of torch.compile."
        )
    return level == 1


def refuse_what_is_not_supported(error: RuntimeError) -> None:
    """Raises NotImplementedError with a sentence, where the ``error`` of torch means a transform."""
    for words, sentence in _UNSUPPORTED.items():
        if words in str(error):
            raise NotImplementedError(sentence) from error


_BATCHED = (
    "batches of gradients, as of is_grads_batched=True and jacobian(..., vectorize=True), are not supported. Call "
    "torch.autograd.grad for each gradient, or leave vectorize out. torch.func.jacrev works where a layer runs in "
    "plain PyTorch: on a CPU or with backend='reference', in Bf16Recipe() and without accumulate_into_main_grad."
)
_UNSUPPORTED = {
    "Batching rule not implemented": _BATCHED,  # plain PyTorch
    "data pointer of Tensor that doesn't have storage": _BATCHED,  # a kernel that was given a batch
    "forward mode AD": (
        "forward-mode derivatives are not supported: torch.func.jvp, jacfwd and hessian, torch.autograd.forward_ad. "
        "Use reverse mode: backward, torch.func.grad, vjp or jacrev; jacrev of grad for a Hessian."
    ),
    "tried to vmap over": (
        "torch.func.vmap is not supported where gradients are recorded. The tokens of a batch are one call: reshape x "
        "from (B, T, H) to (B * T, H). Nor is torch.func.jacrev of grouped_linear: call torch.autograd.grad for each "
        "gradient."
    ),
}
"""What torch's own errors contain, and what they mean for a user of this package."""


def refuse_second_derivatives(
    why: str, grads: Sequence[Tensor | None], inputs: Iterable[Tensor | None]
) -> list[Tensor | None]:
    """``grads``, which no graph connects to the ``inputs`` that they depend on, in such a way that whoever
    differentiates them gets the RuntimeError ``why``, and not the derivative of a constant. ``once_differentiable``
    does not help: it raises on a path to copies of the inputs, which autograd does not take to the inputs themselves.
    """
    roots = [t for t in inputs if t is not None and t.requires_grad]
    given = [g for g in grads if g is not None]
    handed_on = iter(apply(_Once, why, len(given), *given, *roots))
    return [None if g is None else next(handed_on) for g in grads]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(why: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([t.detach() for t in tensors[:count]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(ctx.why)
