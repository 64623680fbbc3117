"""Triton's interpreter in two thirds of its time: the rest goes into preparing the language for each call of a device
function, which it already is within a kernel. And with products of bf16, which it stores as 16-bit integers and would
multiply as such.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """In this process, for good."""
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.InterpreterBuilder.create_dot = _dot


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


_dot_of_numbers = interpreter.InterpreterBuilder.create_dot


def _dot(builder: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
    return _dot_of_numbers(builder, _widened(a), _widened(b), total, *options)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
