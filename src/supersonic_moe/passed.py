"""Calls that have passed their checks: an equal call passes them again.

Some fifty questions to tensors take the host as long as several launches. All that they look at is metadata, so a call
on a GPU is known by that: shapes, strides, dtypes and devices of its tensors, and options.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from supersonic_moe.autocast import autocast_dtype
from supersonic_moe.jit.tape import reader
from supersonic_moe.ops import PLAIN
from supersonic_moe.training import layer
from supersonic_moe.training.options import Options

Key: TypeAlias = tuple[Any, ...]

KEPT = 1024  # then all are forgotten
_passed: set[Key] = set()


def key_of(tensors: tuple[Tensor | None, ...], options: Options, *more: Any) -> Key | None:
    """What the checks of a call look at, hashable things all of them; None where the call is none for
    ``training/layer.py``, or where autocast computes in another dtype.

    Args:
        tensors: x first.
    """
    if torch.compiler.is_compiling():
        return None
    x, types = tensors[0], tuple(map(type, tensors))
    if not isinstance(x, Tensor) or not PLAIN.issuperset(types) or options.validate or type(options.backend) is not str:
        return None
    if not (type(options.inference) is type(options.accumulate_into_main_grad) is bool):
        return None
    if not layer.suits(x, options.backend) or autocast_dtype(x) is not None:
        return None
    try:
        signs, *_ = reader(types)(*tensors)
    except RuntimeError:  # a layout without strides, which no check lets pass
        return None
    return signs, options.activation, options.layout, options.recipe, options.inference, options.backend, more


def has_passed(key: Key) -> bool:
    return key in _passed


def remember(key: Key) -> None:
    if len(_passed) >= KEPT:
        _passed.clear()
    _passed.add(key)
