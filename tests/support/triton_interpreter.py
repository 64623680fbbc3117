"""Triton's interpreter in a quarter of its time. The rest goes into preparing the language for each call of a device
function, which it already is within a kernel, into describing types and shapes anew for each tensor, and into looking
for overflows without saying what was found. And with products of bf16, which it stores as 16-bit integers and would
multiply as such.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    """In this process, for good."""
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._get_np_dtype = _dtype_of_numpy
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # without which overflows are looked for, and then not said
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    tl.tensor.__init__ = _init_tensor
    tl.block_type.__init__ = _init_block_type
    TritonSemantic.broadcast_impl_value = _broadcast


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


_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)


def _dtype_of_numpy(dtype: Any) -> Any:
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _dtype_of_scalar(dtype.scalar)


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _sizes(tuple(type.shape.values) if type.is_block() else ())


@functools.cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """As a tensor has them: nobody changes them."""
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape, self.numel, name = _block(tuple(getattr(size, "value", size) for size in shape))
    self.name = f"<{name}, {element_ty}>"


@functools.cache
def _block(shape: tuple[int, ...]) -> tuple[Any, int, str]:
    if not shape:
        raise TypeError("0d block_type is forbidden")
    found = tl.tuple(list(shape))
    return found, tl.core.validate_block_shape(shape), str(found)


_broadcast_of_shapes = TritonSemantic.broadcast_impl_value


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
        return lhs, rhs
    return _broadcast_of_shapes(self, lhs, rhs)


_dot_of_numbers = interpreter.InterpreterBuilder.create_dot


def _dot(builder: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
    return _dot_of_numbers(builder, _widened(a), _widened(b), total, *options)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
