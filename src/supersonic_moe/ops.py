"""Calls of the package's ops that leave torch's dispatcher out where nobody listens to it.

An op makes a function opaque: to ``torch.compile``, and to whatever else looks at ops. For that torch packs each of its
arguments, asks who wants to see them, and unpacks them for a function in Python: 10 to 20 µs, five or six times in a
step of a layer, as long as three launches each. A plain eager call has nobody who looks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.jit import tape
from supersonic_moe.private_api import dispatch_modes, profiled, transforms_active

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str})


def caller(op: Callable[..., Any], kernel: Callable[..., Any], *, differentiable: bool = True) -> Callable[..., Any]:
    """``op(*args)``, or ``kernel(*args)``, which is what the op runs on a CPU and on CUDA, where that is the same.

    Args:
        op: an overload, ``torch.ops.namespace.name.default``; its first argument is a tensor.
        differentiable: whether an argument may require a gradient. The kernel would then record its own steps where the
            op records none: where gradients are recorded (``create_graph``) it is the op that is called.
    """

    def call(*args: Any) -> Any:
        if tape.state.recorder is not None:  # part of a call that is recorded
            return kernel(*args)
        if unobserved(*args) and not (differentiable and torch.is_grad_enabled()):
            return at_once(kernel, *args)
        return op(*args)

    return call


def at_once(kernel: Callable[..., Any], *args: Any) -> Any:
    """``kernel(*args)``; on CUDA a call of a kind that came before is only launched (``jit/tape.py``)."""
    return tape.play(kernel, args) if args[0].is_cuda else kernel(*args)


def unobserved(*args: Any) -> bool:
    """Whether a call with these arguments, a tensor first, is one that only its result tells from a function call: not
    traced by the compiler, under no dispatch mode (FLOP counters, fake tensors, selective checkpointing) or profiler,
    in no transform of ``torch.func``, without tensors of another class (DTensor) or sizes without a value, and on a
    device that computes.
    """
    if torch.compiler.is_compiling() or dispatch_modes() or transforms_active() or profiled():
        return False
    return PLAIN.issuperset(map(type, args)) and (args[0].is_cuda or args[0].is_cpu)
