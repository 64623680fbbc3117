"""Cheap calls of ``torch.autograd.Function``s."""

from __future__ import annotations

from typing import Any

import torch

from supersonic_moe.private_api import BASE_APPLIES, transforms_active


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` where every argument of ``forward`` is passed, by position.

    For a Function with ``setup_context``, ``apply`` first binds its arguments to the signature of ``forward``, to fill
    in defaults: 10 µs of Python or more, four times in a step of a layer. Here nothing is left to fill in, so what it
    calls in the end is called at once, except under ``torch.compile`` and ``torch.func``, which have ways of their own,
    and in versions of torch that are built differently.
    """
    if torch.compiler.is_compiling() or transforms_active() or not BASE_APPLIES:
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
