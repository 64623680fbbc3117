"""Triton launches at a third of their host time: what `kernel[grid](...)` works out again in every call is kept.

Triton compiles a variant of a kernel for each combination of what it specialises on: the dtype and the alignment to 16
bytes of a tensor, whether an integer is 1, a multiple of 16, or wider than 32 bits, and the values of constants. Each
call binds the arguments, asks each for these signs, turns compile options and signs into a string, and looks it up: 10
to 19 µs on a core of 2.5 GHz, before the driver does its part, and 4 to 5 this way. A training step of a layer has some
twenty such launches and, with few tokens, waits for them.

Here the same signs are a tuple, looked up in a dictionary of launchers that Triton's own first call returned. The tuple
tells apart at least what Triton tells apart, so a launcher found by it is the one that Triton would find
(``tests/kernels/triton/test_triton_launch.py``). Options that Triton reads from its environment (``TRITON_DEBUG``)
count as of a variant's first call.

Tensors are passed on as addresses: of a tensor Triton's launcher would ask the address once more, and the driver
whether it can be reached.

Variants that the package carries compiled are not asked of Triton at all (``shipped.py``).

Launches report to ``jit/tape.py``, which plays them again. A tool that begins to listen to Triton's launches after a
call was recorded does not hear what is played (``without_tapes`` stops that).

How a launcher is called is no public interface of Triton. The minor versions in ``KNOWN`` are those for which the test
above has shown that it is called as Triton calls it; with any other one every launch is Triton's own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from supersonic_moe.jit.tape import state
from supersonic_moe.kernels.triton import shipped
from supersonic_moe.private_api import current_device, raw_stream

KNOWN = ("3.6", "3.7", "3.8", "3.9")
_LAUNCHER_IS_KNOWN = ".".join(triton.__version__.split(".")[:2]) in KNOWN
_LAUNCHERS: dict[tuple[Any, ...], tuple[Any, Any, Any] | shipped.Carried] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Tensor | int | float | None, ...],
    constants: tuple[int | float | str | bool | None, ...],
    *,
    num_warps: int = 4,
) -> None:
    """``kernel[grid](*args, *constants, num_warps=num_warps)`` on the current stream of the device of the first
    argument, a tensor. ``constants`` are the kernel's ``tl.constexpr`` parameters, which come last.
    """
    first: Any = args[0]
    device = first.get_device()
    if device < 0:  # on a CPU: Triton's interpreter
        kernel[grid](*args, *constants, num_warps=num_warps)
        return
    if device != current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, args, constants, num_warps=num_warps)
        return
    signs: list[Any] = [kernel.fn, device, num_warps, constants]
    passed: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            arg_dtype, arg = arg.dtype, arg.data_ptr()
            signs.append((arg_dtype, arg % 16 == 0))
        elif arg is None:
            signs.append(None)
        elif type(arg) is int:
            signs.append((arg == 1, arg % 16 == 0, arg >> 31))
        else:
            signs.append(type(arg))  # a float: not specialised on
        passed.append(arg)
    key = tuple(signs)
    launcher = _LAUNCHERS.get(key)
    hooks = knobs.runtime
    listening = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls  # a tool, to launches
    if launcher is None and not listening:
        launcher = shipped.find(kernel, args, constants, num_warps, device)
        if launcher is not None:
            _LAUNCHERS[key] = launcher
    if launcher is None or listening:
        compiled = kernel[grid](*args, *constants, num_warps=num_warps)
        if state.recorder is not None:
            state.recorder.refuse()
        if _LAUNCHER_IS_KNOWN and compiled is not None:  # None: interpreted
            _LAUNCHERS[key] = compiled.run, compiled.function, compiled.packed_metadata
        return
    x, y, z = (*grid, 1, 1)[:3]
    if isinstance(launcher, shipped.Carried):
        launcher.launch((x, y, z), passed)
        return
    run, function, metadata = launcher
    run(x, y, z, raw_stream(device), function, metadata, None, None, None, *passed, *constants)
    recorder = state.recorder
    if recorder is not None:
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                recorder.place(passed, i, arg.data_ptr())
        recorder.launched(
            lambda tensors: run(x, y, z, raw_stream(device), function, metadata, None, None, None, *passed, *constants)
        )
