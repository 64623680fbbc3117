"""Compile CUDA C++ text to an sm_90a cubin with NVRTC: no GPU, no driver, no toolkit on the machine.

NVRTC is a shared library (pip package `nvidia-cuda-nvrtc`, already installed next to CUDA builds of PyTorch) that holds
the whole compiler, ptxas included. It gets the source and every header as text in memory, so nothing about the result
depends on where files lie, which is what makes the content-addressed cache in `jit/cache.py` sound.

With `-Xptxas -v` ptxas reports registers, stack and spills of each kernel in NVRTC's log; `CompileReport` holds them
parsed. Some of its remarks mean that a kernel is right and slow (tensor-core instructions serialised, `setmaxnreg`
ignored because the kernel has no `__launch_bounds__(threads, 1)`). They are marked "Potential Performance Loss", and
are errors here.
"""

import functools
import hashlib
import importlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCH = "sm_90a"
# Where a driver is installed, NVRTC keeps a cache of its own, and a hit comes without the ptxas report: --no-cache.
BASE_OPTIONS = ("-std=c++20", f"-arch={ARCH}", "-Xptxas", "-v", "--no-cache")


class JitError(RuntimeError):
    """Base of every error that the JIT raises on purpose."""


class NvrtcMissingError(JitError):
    """NVRTC or its Python binding is not installed."""


class CompileError(JitError):
    """NVRTC or ptxas rejected a kernel, or ptxas said that it will be slow; the message carries the log."""


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reported about one `__global__` function."""

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_smem_bytes: int


@dataclass(frozen=True)
class CompileReport:
    """Resources of every kernel in one cubin, and ptxas's remarks on them (an empty tuple is what we want)."""

    kernels: tuple[KernelResources, ...]
    remarks: tuple[str, ...]
    seconds: float

    def kernel(self, name: str) -> KernelResources:
        """Resources of the kernel `name`; KeyError when the cubin has none of that name."""
        for resources in self.kernels:
            if resources.name == name:
                return resources
        raise KeyError(f"no kernel {name!r} in this cubin; it has {[k.name for k in self.kernels]}")


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC library that `compile_cubin` uses."""
    return _load_nvrtc()[1]


@functools.lru_cache(maxsize=1)
def nvrtc_build() -> str:
    """Names the exact build of NVRTC; part of every cache key.

    The version is the same in all updates of a release (13.0 in 13.0.48 and 13.0.88). What differs is the first page of
    the library's file, which has its ELF headers and the build ID that the linker wrote: read in microseconds, where
    asking the compiler itself, by compiling an empty file, takes 50 ms of every process.
    """
    version = "nvrtc {}.{}".format(*nvrtc_version())
    return " ".join([version, *sorted({_first_page(path) for path in _loaded_libraries()} - {""})])


def compile_cubin(
    source: str, file_name: str, headers: Mapping[str, str], options: Sequence[str]
) -> tuple[bytes, CompileReport]:
    """Compile `source` (called `file_name` in messages) with `headers` {include name: text}; return the cubin and its
    report.

    `options` are complete (see BASE_OPTIONS). Thread safe; the GIL is released while NVRTC works.
    """
    nvrtc, _ = _load_nvrtc()
    started = time.perf_counter()
    result, program = nvrtc.nvrtcCreateProgram(
        source.encode(),
        file_name.encode(),
        len(headers),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
    )
    _require(nvrtc, result, "nvrtcCreateProgram", file_name)
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _program_text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if int(result) != 0:
            raise CompileError(f"{file_name} does not compile for {ARCH} with {' '.join(options)}:\n{log}")
        cubin = _program_bytes(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    report = parse_ptxas_log(log, time.perf_counter() - started)
    slow = [remark for remark in report.remarks if "Potential Performance Loss" in remark]
    if slow:
        raise CompileError(f"{file_name} compiles to a slow kernel with {' '.join(options)}:\n" + "\n".join(slow))
    return cubin, report


_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)'")
_FUNCTION = re.compile(r"Function properties for (?P<name>\w+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
_REMARK = re.compile(r"\(C75\d\d\).*")


def parse_ptxas_log(log: str, seconds: float = 0.0) -> CompileReport:
    """Read the lines that `-Xptxas -v` writes: one block for each kernel, and remarks numbered C75xx anywhere."""
    kernels: list[KernelResources] = []
    entry, function, frame = "", "", (0, 0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, frame = match["name"], (0, 0, 0)
        elif match := _FUNCTION.search(line):
            function = match["name"]
        elif (match := _FRAME.search(line)) and function == entry:  # other functions are ones that were not inlined
            frame = (int(match[1]), int(match[2]), int(match[3]))
        elif match := _USED.search(line):
            smem = _SMEM.search(line)
            kernels.append(KernelResources(entry, int(match[1]), *frame, int(smem[1]) if smem else 0))
    return CompileReport(tuple(kernels), tuple(_REMARK.findall(log)), seconds)


@functools.lru_cache(maxsize=1)
def _load_nvrtc() -> tuple[Any, tuple[int, int]]:
    """The `cuda.bindings.nvrtc` module with libnvrtc behind it (importing the module alone does not load the
    library)."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise NvrtcMissingError(
            "compiling kernels needs the Python binding of NVRTC: pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from error
    try:
        result, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # RuntimeError or the loader's own class, by version of the binding
        raise NvrtcMissingError(
            f"compiling kernels needs the NVRTC library, and loading it failed ({error}): pip install "
            "nvidia-cuda-nvrtc of the CUDA version that torch.version.cuda shows"
        ) from error
    _require(nvrtc, result, "nvrtcVersion", "")
    return nvrtc, (int(major), int(minor))


def _loaded_libraries() -> set[str]:
    """Files of libnvrtc in the memory of this process; more than one where torch brought another than the binding's."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux: releases are told apart, their updates are not
        return set()
    return set(re.findall(r"/\S.*/libnvrtc\.so\S*$", maps, re.MULTILINE))


def _first_page(path: str) -> str:
    try:
        with open(path, "rb") as library:
            return hashlib.sha256(library.read(4096)).hexdigest()[:16]
    except OSError:  # replaced on disk while it is in use
        return ""


def _program_bytes(nvrtc: Any, program: Any, get_size: Any, get: Any) -> bytes:
    result, size = get_size(program)
    _require(nvrtc, result, get_size.__name__, "")
    buffer = bytearray(size)
    (result,) = get(program, buffer)
    _require(nvrtc, result, get.__name__, "")
    return bytes(buffer)


def _program_text(nvrtc: Any, program: Any, get_size: Any, get: Any) -> str:
    return _program_bytes(nvrtc, program, get_size, get).rstrip(b"\0").decode(errors="replace").strip()


def _require(nvrtc: Any, result: Any, call: str, file_name: str) -> None:
    if int(result) != 0:
        _, message = nvrtc.nvrtcGetErrorString(result)
        raise CompileError(f"{call}({file_name}) failed: {message.decode()}")
