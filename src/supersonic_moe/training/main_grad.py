"""Weight gradients added to ``weight.main_grad`` where they are computed: Megatron's gradient accumulation fusion.

``main_grad`` is an fp32 buffer that the caller, usually Megatron's DistributedDataParallel, hangs on a parameter, and
reduces and zeroes. Micro-batches accumulate there in fp32; on sm_90 the GEMM itself adds, so dW exists nowhere else.
What Megatron and Transformer Engine agree on holds here too:

    ``get_main_grad()``              is called instead of reading ``main_grad`` (Megatron-FSDP allocates there)
    ``overwrite_main_grad = True``   dW replaces what is in the buffer
    ``main_grad`` in bf16            (``--grad-reduce-in-bf16``) gets the fp32 dW added with one rounding

A buffer that kernels do not write themselves, because of its dtype or strides, gets dW from scratch memory.

**Which passes add.** Those that would accumulate into ``.grad``: ``backward()`` adds, ``backward(inputs=[...])`` adds
for the weights that it names, ``torch.autograd.grad`` adds nothing and returns the gradients that it is asked for. So a
schedule that takes dX first and dW later (zero bubble) adds each dW once, and computes no dW in the first pass. What
autograd gets instead of a dW that was added decides who hears of it:

    weight                                   autograd gets                      then
    plain                                    None                               ``weight.grad`` stays as it is
    has ``grad_added_to_main_grad``          an uninitialised stand-in, and     Megatron's hook runs, does not add the
    (Megatron's parameters)                  the attribute is set to True       stand-in, drops it, counts the weight
                                                                                as ready for reduction

With ``zero_out_wgrad`` Megatron adds the stand-in all the same, so it is zeros then, and under anomaly detection, which
looks for NaN. A stand-in has the size of the weight; it is allocated when the temporaries of backward are free and
lives until Megatron's hook, so none is cached.

The buffer is looked up when backward runs, on the very tensor that the caller passed: it may be allocated after
forward, and autocast computes with a copy that has no attributes. ``torch.compile`` looks it up when forward runs,
breaks the graph for Megatron's parameters, and adds in every pass. Parameters that FSDP2 shards have no ``main_grad``
and are refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.private_api import reaches, transforms_active
from supersonic_moe.training.arguments import Inputs, MainGrads

# ---- the buffer of a weight ------------------------------------------------------------------------------------------


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which gradients of ``weight`` are summed: fp32, or fp64 for an fp64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def main_grad_of(weight: Tensor) -> object:
    """The buffer of ``weight``, if it has one; :func:`fits` says whether it can be used."""
    get = getattr(weight, "get_main_grad", None)
    return getattr(weight, "main_grad", None) if get is None else get()


def fits(main: object, weight: Tensor) -> TypeGuard[Tensor]:
    """Whether ``main`` can hold gradients of ``weight``: a tensor of its shape and device, in ``gradient_dtype`` or the
    weight's own dtype.
    """
    dtypes, place = (gradient_dtype(weight), weight.dtype), (weight.shape, weight.device)
    return isinstance(main, Tensor) and main.dtype in dtypes and (main.shape, main.device) == place


def overwrites(weight: Tensor) -> bool:
    """Whether the gradient replaces what is in the buffer, instead of being added to it."""
    return bool(getattr(weight, "overwrite_main_grad", False))


def _checked(name: str, weight: Tensor) -> Tensor:
    main = main_grad_of(weight)
    if not fits(main, weight):
        dtype, own = [str(d).removeprefix("torch.") for d in (gradient_dtype(weight), weight.dtype)]
        raise ValueError(
            f"accumulate_into_main_grad needs {name}.main_grad to be a {dtype} {'' if own == dtype else f'or {own} '}"
            f"tensor of shape {tuple(weight.shape)} on {weight.device}; got {checks.describe(main)}. Set it before "
            "backward, on the parameter itself (not on a view, a copy or a shard), e.g. to "
            f"torch.zeros(weight.shape, dtype=torch.{dtype}, device=weight.device)."
        )
    return main


# ---- one backward pass -----------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Where the gradient of one weight goes."""

    main: Tensor
    written: Tensor
    """What kernels write: ``main``, or scratch memory of its shape."""
    adds: bool

    def finish(self, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        """After the kernels. Returns what autograd gets instead of the gradient, in ``dtype``: that of the weight in
        the layer, under autocast that of its copy.
        """
        if self.written is not self.main:
            if self.adds:
                self.main.add_(self.written)
            else:
                self.main.copy_(self.written)
        return _stand_in(parameter, dtype)


class Targets(NamedTuple):
    """Where dW1 and dW2 go; None: to autograd."""

    w1: Target | None = None
    w2: Target | None = None

    def of_kernels(self) -> MainGrads:
        (w1, overwrite_w1), (w2, overwrite_w2) = _for_kernels(self.w1), _for_kernels(self.w2)
        return MainGrads(w1, w2, overwrite_w1, overwrite_w2)

    def finish(self, grads: list[Tensor | None], parameters: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        """After the kernels. ``grads``, in the order of :class:`Inputs`, get what autograd gets instead of dW1 and dW2
        where these went elsewhere.
        """
        for at, target, parameter in zip((2, 4), self, parameters, strict=True):
            if target is not None:
                grads[at] = target.finish(parameter, dtype)


def targets_of(parameters: tuple[Tensor, Tensor], needs: Inputs[bool], ctx: Any) -> tuple[Inputs[bool], Targets]:
    """(what the pass that runs asks for, where dW1 and dW2 go).

    Args:
        parameters: w1 and w2 as the caller passed them.
        needs: what requires a gradient.
        ctx: of the autograd function of the experts.
    """
    into_main = needs.w1, needs.w2
    if not (torch.compiler.is_compiling() or transforms_active()):
        edges, tensors = ctx.next_functions, ctx.are_tensors  # an edge for each input that is a tensor
        (asked_w1, main_w1), (asked_w2, main_w2) = (
            _asked_for(need, edges[sum(tensors[:i])][0], parameter)
            for need, i, parameter in zip(into_main, (2, 4), parameters, strict=True)
        )
        needs, into_main = needs._replace(w1=asked_w1, w2=asked_w2), (main_w1, main_w2)
    # no generator: the tracer of torch 2.14 cannot unpack one here
    w1, w2 = [_target(name, p) if on else None for name, p, on in zip(("w1", "w2"), parameters, into_main, strict=True)]
    return needs, Targets(w1, w2)


def _asked_for(need: bool, node: Any, parameter: Tensor) -> tuple[bool, bool]:
    """(does the pass that runs want a gradient of ``parameter``, would it accumulate it). ``node``: where the gradient
    goes next.
    """
    if not need:
        return False, False
    if hasattr(parameter, "in_every_pass"):
        return True, True
    if parameter.is_leaf and not hasattr(node, "variable"):  # autocast: what undoes its copy comes before
        node = node.next_functions[0][0]
    reached = reaches(node)
    return reached is not False, reached is True


def _target(name: str, weight: Tensor) -> Target:
    main = _checked(name, weight)
    kernels_write = main.dtype is gradient_dtype(weight) and main.is_contiguous()
    return Target(main, main if kernels_write else _scratch(main, weight), not overwrites(weight))


def _scratch(main: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(main.shape, dtype=gradient_dtype(weight), device=main.device)


def _for_kernels(target: Target | None) -> tuple[Tensor | None, bool]:
    if target is None:
        return None, False
    return target.written, not target.adds or target.written is not target.main


def _stand_in(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    is_read = getattr(parameter, "zero_out_wgrad", False) or torch.is_anomaly_enabled()
    make = parameter.new_zeros if is_read else parameter.new_empty
    return make(parameter.shape, dtype=dtype)
