"""Triton's interpreter in two thirds of its time: the rest goes into preparing the language for each call of a device
function, which it already is within a kernel.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """In this process, for good."""
    interpreter.InterpretedFunction.__call__ = _call_device_function


def _call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Its kernel has prepared ``tl``; ``tl.core``, which Triton's own library uses, stays prepared once it is."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@functools.cache
def _languages(function: Any) -> list[ModuleType]:
    """What the function sees of ``tl`` and ``tl.core``."""
    seen = list(function.fn.__globals__.values())
    return [language for language in (tl, tl.core) if any(value is language for value in seen)]
