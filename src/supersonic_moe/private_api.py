"""Names of torch that are not public and that this package uses, each with a public way for the day it is gone.

Nothing else in the package touches a private name of torch: ``tests/docs/test_private_api.py`` searches for them, and
runs every substitute here. They are in use because the public way costs host time that a small layer waits for, or
because there is none. Those of Triton are in ``kernels/triton/launch.py``, which takes them only from versions whose
launcher it knows.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_never_twice = itertools.count(-1, -1)


def current_device() -> int:
    """Index of the current CUDA device; the public call asks first whether CUDA is initialised."""
    try:
        return torch._C._cuda_getDevice()
    except AttributeError:
        return torch.cuda.current_device()


def raw_stream(device: int) -> int:
    """Address of torch's current stream on a device, at a tenth of the time of a ``torch.cuda.Stream`` object."""
    try:
        raw: int = torch._C._cuda_getCurrentRawStream(device)
    except AttributeError:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return raw


_BASE_APPLIES = hasattr(torch.autograd.Function.__base__, "apply")


def base_applies() -> bool:
    """Whether ``apply`` of an autograd function only binds arguments before it calls that of its base class: no
    transform of ``torch.func`` is active. False where torch does not say.
    """
    try:
        return _BASE_APPLIES and not torch._C._are_functorch_transforms_active()
    except AttributeError:
        return False


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that a view looks into, else the tensor itself. A view counts as itself where torch does not say."""
    base: Tensor | None = getattr(tensor, "_base", None)
    return tensor if base is None else base


def version_of(tensor: Tensor) -> int:
    """How many times a tensor was changed in place, by torch's count; where there is none, another number each time, so
    that nothing counts as unchanged.
    """
    version: int | None = getattr(tensor, "_version", None)
    return next(_never_twice) if version is None else version


def add_each(targets: list[Tensor], summands: list[Tensor]) -> None:
    """``target += summand`` for each pair, on a GPU in few launches."""
    try:
        torch._foreach_add_(targets, summands)
    except AttributeError:
        for target, summand in zip(targets, summands, strict=True):
            target.add_(summand)


def copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    """``target.copy_(source)`` for each pair, on a GPU in few launches."""
    try:
        torch._foreach_copy_(targets, sources)
    except AttributeError:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def gpu_sleep(cycles: int) -> None:
    """Keep the current CUDA stream busy for so many clock cycles. There is no public way.

    Raises:
        RuntimeError: this torch has none.
    """
    try:
        sleep = torch.cuda._sleep
    except AttributeError:
        raise RuntimeError(
            f"timing single kernels needs torch.cuda._sleep, which torch {torch.__version__} does not have; "
            "use a torch that has been tested (README.md, Install)."
        ) from None
    sleep(cycles)  # type: ignore[no-untyped-call]
