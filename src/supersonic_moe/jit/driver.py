"""The few conventions that all calls into the CUDA driver share. Importing this needs no driver; calling does."""

import ctypes
import functools
import importlib
from typing import Any

from supersonic_moe.jit.nvrtc import JitError


class LaunchError(JitError):
    """The driver refused to load or launch a kernel, or the arguments do not fit its parameters."""


@functools.lru_cache(maxsize=1)
def binding() -> Any:
    """The module `cuda.bindings.driver`."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise LaunchError(
            "launching kernels needs the CUDA driver's Python binding: pip install cuda-bindings"
        ) from error


def call(purpose: str, function: Any, *args: Any) -> Any:
    """Call a function of `cuda.bindings.driver`; return its one result value, if any. `purpose` starts the error
    message."""
    result, *values = function(*args)
    if result != 0:
        raise LaunchError(f"{purpose} failed: {error_text(result)}")
    return values[0] if values else None


def error_text(result: Any) -> str:
    """`CUDA_ERROR_INVALID_VALUE (invalid argument)` for a CUresult."""
    driver = binding()
    status, text = driver.cuGetErrorString(driver.CUresult(int(result)))
    return f"{driver.CUresult(int(result)).name} ({text.decode()})" if status == 0 else str(result)


def make_context_current(device: int) -> None:
    """PyTorch binds the primary context of a device to a thread lazily; driver calls need it bound."""
    driver = binding()
    result, bound = driver.cuCtxGetDevice()
    if result != 0 or int(bound) != device:
        ordinal = call(f"finding cuda:{device}", driver.cuDeviceGet, device)
        context = call(f"opening cuda:{device}", driver.cuDevicePrimaryCtxRetain, ordinal)
        call(f"selecting cuda:{device}", driver.cuCtxSetCurrent, context)


def copy_bytes(to: int, source: int, count: int, stream: int | None) -> None:
    """Between any two addresses that a GPU reaches, in the order of a ``stream`` of the current device. None: memory of
    the host, at once. What the addresses belong to has to live until then.
    """
    if not count:
        return
    if stream is None:
        ctypes.memmove(to, source, count)
        return
    (result,) = binding().cuMemcpyAsync(to, source, count, stream)
    if result != 0:
        raise LaunchError(f"copying {count} bytes failed: {error_text(result)}")


def fill_bytes(to: int, value: int, count: int, stream: int | None) -> None:
    """``count`` bytes of ``value``, as ``copy_bytes`` does it."""
    if not count:
        return
    if stream is None:
        ctypes.memset(to, value, count)
        return
    call(f"filling {count} bytes", binding().cuMemsetD8Async, to, value, count, stream)
