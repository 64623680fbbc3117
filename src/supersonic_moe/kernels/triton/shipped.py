"""Triton kernels that the package carries compiled: a first call for which Triton need not compile.

    variant     a kernel and all that Triton specializes it for: dtypes, alignment, integers, constants, warps
    carried     the machine code of variants, in ``cubins`` beside this file, with ``index.json``: where each variant's
                code is, its entry, shared memory, and which arguments are its parameters

``make wheel`` puts them there for the layers of published models (``tests/support/shipped_layers.py``); a checkout has
none. The index holds a digest of every Python file of the package, since a kernel follows from constants anywhere in
it: after an edit nothing here counts any more. Other variants, other GPUs than those of compute capability 9.0 and
whatever the driver refuses are Triton's to compile, as is everything where a tool listens to Triton's launches.

What is carried is launched as CUDA kernels are (``jit/launch.py``): without Triton's launcher, which is a C extension
that Triton compiles for each kind of arguments.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.jit import Kernel, KernelSpec, LaunchError
from supersonic_moe.jit.cache import Cubin
from supersonic_moe.jit.nvrtc import CompileReport, KernelResources
from supersonic_moe.jit.signature import FLOAT, POINTER, SCALARS, Parameter, Signature

log = logging.getLogger("supersonic_moe.jit")

PACKAGE = resources.files("supersonic_moe")
FOLDER = PACKAGE / "kernels" / "triton" / "cubins"
INDEX = "index.json"
KINDS = {"pointer": POINTER, "i32": SCALARS["i32"], "i64": SCALARS["i64"], "fp32": FLOAT}
Argument = Tensor | int | float | None


class Entry(NamedTuple):
    """How a variant is launched."""

    file: str
    function: str
    threads: int
    """Of a block."""
    smem_bytes: int
    parameters: list[tuple[int, str]]
    """Argument by argument that is no constant: which one, and a key of ``KINDS``."""
    scratch: int
    """Pointers to memory that Triton would provide and that this kernel does not use, behind the others."""


def variant(kernel: Any, args: Sequence[Argument], constants: Sequence[Any], num_warps: int) -> str:
    """What Triton compiles ``kernel[grid](*args, *constants, num_warps=num_warps)`` for, in words."""
    signs = [_sign(parameter, arg) for parameter, arg in zip(kernel.params, args, strict=False)]
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    return f"{name}({', '.join(signs)}; {', '.join(map(repr, constants))}; {num_warps} warps)"


def _sign(parameter: Any, arg: Argument) -> str:
    if arg is None:
        return "None"
    if isinstance(arg, Tensor):
        return f"{str(arg.dtype).removeprefix('torch.')}*{'/16' if arg.data_ptr() % 16 == 0 else ''}"
    if isinstance(arg, float):
        return "fp32"
    kind = "i32" if -(2**31) <= arg < 2**31 else "i64"
    if parameter.do_not_specialize:
        return kind
    return "1" if arg == 1 else kind + ("/16" if arg % 16 == 0 else "")


class Carried:
    """A variant on one device."""

    def __init__(self, entry: Entry, image: bytes, device: int) -> None:
        taken = [Parameter(f"argument_{i}", kind, KINDS[kind]) for i, kind in entry.parameters]
        taken += [Parameter(f"scratch_{i}", "pointer", POINTER) for i in range(entry.scratch)]
        report = CompileReport((KernelResources(entry.function, 0, 0, 0, 0, 0),), (), 0.0)
        spec = KernelSpec(entry.function, "", threads=entry.threads, smem_bytes=entry.smem_bytes)
        self._kernel = Kernel(spec, Cubin(image, report, "memory"), Signature(entry.function, tuple(taken)))
        self._device, self._taken, self._scratch = device, [i for i, _ in entry.parameters], (0,) * entry.scratch
        self._of_thread = threading.local()
        self._of_thread.slots = self._kernel.new_slots(device)

    def launch(self, grid: tuple[int, int, int], passed: Sequence[Any]) -> None:
        """``passed``: the arguments, tensors as addresses."""
        if 0 in grid:
            return
        slots = getattr(self._of_thread, "slots", None)
        if slots is None:
            slots = self._of_thread.slots = self._kernel.new_slots(self._device)
        slots.pack_into(slots.buffer, slots.offset, *[passed[i] for i in self._taken], *self._scratch)
        slots.enqueue(grid, None)


def find(
    kernel: Any, args: Sequence[Argument], constants: Sequence[Any], num_warps: int, device: int
) -> Carried | None:
    """The carried variant of this call on ``device``, loaded; None where Triton has to compile it."""
    known = index()
    if not known or not hasattr(kernel, "params"):  # Triton's interpreter has none
        return None
    entry = known.get(variant(kernel, args, constants, num_warps))
    if entry is None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        return Carried(entry, (FOLDER / entry.file).read_bytes(), device)
    except (OSError, LaunchError) as error:
        log.info("Triton compiles %s, because the package's copy cannot be used: %s", entry.function, error)
        return None


@functools.cache
def index() -> dict[str, Entry]:
    """Of all variants that are here and of these sources."""
    try:
        found = json.loads((FOLDER / INDEX).read_text())
        if found["digest"] == digest():
            return {name: Entry(*entry) for name, entry in found["variants"].items()}
        log.info("compiled Triton kernels in %s are older than the package's sources", FOLDER)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s of the installed package is unusable (%s); reinstall supersonic-moe", FOLDER / INDEX, error)
    return {}


def digest() -> str:
    """Of all Python files of the package."""
    hasher = hashlib.sha256()
    for name, file in sorted(_python_files(PACKAGE, "")):
        hasher.update(f"\n{name}\n".encode() + file.read_bytes())
    return hasher.hexdigest()


def _python_files(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _python_files(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".py"):
            yield prefix + item.name, item
