"""The only place that picks a backend, and says why (``supersonic-moe explain`` prints the reason).

A backend is a module for each capability of ``kernels/interface.py``; :func:`kernels` puts it together.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from supersonic_moe.kernels.interface import Backend, Fp8Experts

log = logging.getLogger("supersonic_moe")

BACKENDS = ("auto", "reference", "triton", "sm90")
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_DRIVER_BINDINGS = (
    importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
)

_WHAT = {
    "triton": "Triton kernels around torch's grouped GEMM, or in fp16 our own",
    "sm90": "our sm_90 grouped GEMMs, Triton for what is bound by memory",
}
_NO_FP8 = (
    "backend {!r} cannot run an Fp8Recipe: it has no FP8 products. Use backend='auto' on a Hopper GPU, or "
    "recipe=Bf16Recipe()."
)


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str


@functools.cache
def kernels(name: str) -> Backend:
    """The backend of that name, imported at the first call."""
    if name == "sm90":
        from supersonic_moe.kernels import triton
        from supersonic_moe.kernels.sm90 import backend as sm90

        return Backend(routing=triton, experts=sm90, quantizers=sm90, fp8=sm90)
    if name == "triton":
        from supersonic_moe.kernels import triton

        return Backend(routing=triton, experts=triton, quantizers=triton, fp8=None)
    from supersonic_moe.kernels import reference

    return Backend(routing=reference, experts=reference, quantizers=reference, fp8=reference)


def fp8_kernels(name: str) -> Fp8Experts:
    """The FP8 kernels of a backend that :func:`choose_fp8` picked."""
    found = kernels(name).fp8
    if found is None:
        raise ValueError(_NO_FP8.format(name))
    return found


_Chooser = TypeVar("_Chooser", bound=Callable[..., Choice])


def _once(choose: _Chooser) -> _Chooser:
    """Remembers a choice for a GPU and the same sizes: all that it depends on is fixed in a process. A step of a layer
    asks up to ten times. Refusals, and devices that stand for another, are thought over each time.
    """
    remembered = functools.lru_cache(maxsize=1024)(choose)

    @functools.wraps(choose)
    def chosen(device: torch.device, *args: object, **sizes: object) -> Choice:
        one_gpu = device.type == "cuda" and device.index is not None
        return (remembered if one_gpu else choose)(device, *args, **sizes)

    return chosen  # type: ignore[return-value]


@_once
def choose(
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    hidden: int = 0,
    intermediate: int = 0,
    backend: str = "auto",
) -> Choice:
    """Pick the backend of one call.

    Args:
        device: where the tensors are.
        dtype: dtype of the grouped GEMMs; None for routing and metadata, which have none.
        hidden, intermediate: H and I of the experts; 0 where no GEMM is involved.
        backend: ``"auto"`` or a name of :data:`BACKENDS`, which is then used or refused, never replaced.

    Raises:
        ValueError: an explicit backend that cannot run this call, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend == "reference":
        return Choice("reference", "asked for: per-expert torch loop, the truth that kernels are tested against")
    obstacle = _triton_obstacle(device, dtype, hidden, intermediate)
    sm90_obstacle = obstacle or _sm90_obstacle(device, dtype)
    if backend == "sm90":
        if sm90_obstacle:
            raise ValueError(f"backend 'sm90' cannot run this call: {sm90_obstacle}. Use backend='auto'.")
        return Choice("sm90", f"asked for: {_WHAT['sm90']}")
    if backend == "triton":
        if obstacle:
            raise ValueError(f"backend 'triton' cannot run this call: {obstacle}. Use backend='auto'.")
        return Choice("triton", f"asked for: {_WHAT['triton']}")
    if sm90_obstacle is None and dtype is not None:
        return Choice("sm90", f"sm_90 device: {_WHAT['sm90']}")
    if obstacle is None and device.type == "cuda":
        why = f" ({sm90_obstacle})" if sm90_obstacle else ""
        return Choice("triton", f"CUDA device: {_WHAT['triton']}{why}")
    if device.type == "cuda":
        if not torch.compiler.is_compiling():
            _warn_once(
                f"slow path on {device}: {obstacle}. Using the reference loop, which synchronises with the host."
            )
        return Choice("reference", f"slow path: {obstacle}")
    return Choice("reference", f"{device.type} device: per-expert torch loop")


@_once
def choose_fp8(device: torch.device, *, hidden: int, intermediate: int, backend: str = "auto") -> Choice:
    """Pick the backend of one call of an FP8 layer: sm_90 on Hopper, the reference on a CPU or where it is asked for.

    Raises:
        ValueError: any other device, or a backend without the FP8 products; nothing falls back to a slow path.
    """
    if backend == "triton":
        raise ValueError(_NO_FP8.format(backend))
    if backend == "auto" and device.type == "cuda":
        obstacle = _triton_obstacle(device, torch.bfloat16, hidden, intermediate) or _sm90_obstacle(device, None)
        if obstacle:
            raise ValueError(
                f"Fp8Recipe cannot run on {device}: {obstacle}. Use recipe=Bf16Recipe(), or backend='reference', which "
                "is slow."
            )
    return choose(device, torch.bfloat16, hidden=hidden, intermediate=intermediate, backend=backend)


def _triton_obstacle(device: torch.device, dtype: torch.dtype | None, hidden: int, intermediate: int) -> str | None:
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a CUDA device, the tensors are on {device}"
    if dtype is None:
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the grouped GEMMs need bfloat16 or float16, the inputs are {str(dtype).removeprefix('torch.')}"
    if hidden % 8 or intermediate % 8:
        return f"the grouped GEMMs need H and I to be multiples of 8, they are {hidden} and {intermediate}"
    return None


def _sm90_obstacle(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if device.type != "cuda":
        return f"the sm_90 kernels need a CUDA device, the tensors are on {device}"
    if dtype not in (None, torch.bfloat16):
        return f"the sm_90 kernels need bfloat16, the inputs are {str(dtype).removeprefix('torch.')}"
    if not HAS_DRIVER_BINDINGS:
        return "the package cuda-bindings is not installed (pip install cuda-bindings)"
    capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
    if capability != (9, 0):
        return f"the sm_90 kernels need compute capability 9.0, {device} has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU; asking torch takes longer than the rest of a choice."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
