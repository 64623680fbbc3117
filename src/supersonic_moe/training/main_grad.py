"""Weight gradients added to ``weight.main_grad`` where they are computed: Megatron's gradient accumulation fusion.

``main_grad`` is an fp32 buffer that the caller, usually Megatron's DistributedDataParallel, hangs on a parameter, and
reduces and zeroes. Micro-batches accumulate there in fp32; on sm_90 the GEMM itself adds, so dW exists nowhere else.
Every backward pass through the layer adds, ``torch.autograd.grad`` too. What autograd gets instead of dW decides who
hears of it:

    weight                                   autograd gets                      then
    plain                                    None                               ``weight.grad`` stays as it is
    has ``grad_added_to_main_grad``          an uninitialised stand-in, and     Megatron's hook runs, does not add the
    (Megatron's parameters)                  the attribute is set to True       stand-in, drops it, counts the weight
                                                                                as ready for reduction

With ``zero_out_wgrad`` Megatron adds the stand-in all the same, so it is zeros then. A stand-in has the size of the
weight; it is allocated when the temporaries of backward are free and lives until Megatron's hook, so none is cached.

The buffer is looked up when backward runs, on the very tensor that the caller passed: it may be allocated after
forward, and autocast computes with a copy that has no attributes. ``torch.compile`` looks it up when forward runs, and
breaks the graph for Megatron's parameters. Parameters that FSDP shards have no ``main_grad`` and are refused.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.training.arguments import Inputs, MainGrads


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which gradients of ``weight`` are accumulated: fp32, or fp64 for an fp64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def fits(main: object, weight: Tensor) -> TypeGuard[Tensor]:
    """Whether ``main`` can hold gradients of ``weight``: a tensor of that dtype, with the weight's shape and device."""
    expected = (gradient_dtype(weight), weight.shape, weight.device)
    return isinstance(main, Tensor) and (main.dtype, main.shape, main.device) == expected


def main_grad_of(name: str, weight: Tensor) -> Tensor:
    """The buffer of ``weight``: contiguous, fp32 (fp64 for an fp64 weight)."""
    main = getattr(weight, "main_grad", None)
    dtype = gradient_dtype(weight)
    if not fits(main, weight) or not main.is_contiguous():
        strides = f" with strides {main.stride()}" if isinstance(main, Tensor) else ""
        raise ValueError(
            f"accumulate_into_main_grad needs {name}.main_grad to be a contiguous {str(dtype).removeprefix('torch.')} "
            f"tensor of shape {tuple(weight.shape)} on {weight.device}; got {checks.describe(main)}{strides}. Set it "
            "before backward, on the parameter itself (not on a view, a copy or a shard), e.g. to "
            f"torch.zeros(weight.shape, dtype={dtype}, device=weight.device)."
        )
    return main


_NO_BUFFERS = MainGrads(None, None)


def main_grads(parameters: tuple[Tensor, Tensor] | None, needs: Inputs[bool]) -> MainGrads:
    """Buffers of w1 and w2, for those that need a gradient; none without ``parameters``, which are w1 and w2 as they
    were passed, if the caller asked for accumulation.
    """
    if parameters is None:
        return _NO_BUFFERS
    w1, w2 = parameters
    return MainGrads(
        main_grad_of("w1", w1) if needs.w1 else None,
        main_grad_of("w2", w2) if needs.w2 else None,
    )


def stand_ins(
    parameters: tuple[Tensor, Tensor] | None,
    main: MainGrads,
    dw1: Tensor | None,
    dw2: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """What autograd gets for w1 and w2: dW, or its stand-in where dW was added to a buffer. ``dtype``: that of the
    weights in the layer, under autocast that of their copies.
    """
    if parameters is None:
        return dw1, dw2
    w1, w2 = parameters
    return (
        dw1 if main.w1 is None else _stand_in(w1, dtype),
        dw2 if main.w2 is None else _stand_in(w2, dtype),
    )


def _stand_in(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = weight.new_zeros if getattr(weight, "zero_out_wgrad", False) else weight.new_empty
    return make(weight.shape, dtype=dtype)
