"""Cheap calls of ``torch.autograd.Function.apply``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def positional(forward: _Forward) -> _Forward:
    """Decorates the ``forward`` of a Function with ``setup_context`` whose callers pass every argument, by position.

    ``apply`` binds its arguments to ``inspect.signature(forward)`` to fill in defaults, at every call: 25 µs of Python
    where forward and backward of a small layer take 2 ms. ``inspect`` takes a ready signature from ``__signature__``;
    this one binds nothing, as there is nothing to fill in. A wrong number of arguments still fails, in ``forward``.
    """
    forward.__signature__ = _AllPassed(list(inspect.signature(forward).parameters.values()))  # type: ignore[attr-defined]
    return forward


class _AllPassed(inspect.Signature):
    def bind(self, /, *args: Any) -> Any:
        return _AsPassed(args)


class _AsPassed:
    """What ``apply`` uses of ``inspect.BoundArguments``."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.kwargs: dict[str, Any] = {}

    def apply_defaults(self) -> None:
        pass
