"""What a kernel configuration is, and the exact text that NVRTC sees for it.

A `KernelSpec` names one `extern "C" __global__` entry of one .cu file, the `-D` constants that specialise it and the
launch attributes that go with that specialisation. It holds no run-time size: token counts never reach a compiler
option. All specs of the package are listed in `supersonic_moe.kernels.sm90.registered_specs()`.

`resolve(spec)` reads the source and, following `#include "..."` lines, every header it needs. Only headers of our own
folders are allowed: a kernel is closed under its includes, so the digest of that text is the digest of everything that
is compiled.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from supersonic_moe.jit.nvrtc import BASE_OPTIONS, JitError

KERNEL_ROOT = Path(__file__).resolve().parent.parent / "kernels" / "sm90"
MAX_SMEM_BYTES = 232448  # 227 KiB: what one block of sm_90 may have
MAX_CLUSTER = 8  # portable cluster size
_DIGEST_FORMAT = b"supersonic-moe program 1"


class SpecError(JitError):
    """A kernel configuration that cannot be compiled or launched as written."""


@dataclass(frozen=True)
class KernelSpec:
    """One compiled configuration of one kernel."""

    name: str
    """The `extern "C"` entry point."""
    source: str
    """Path of the .cu file below `root`."""
    constants: tuple[tuple[str, int | str], ...] = ()
    """Passed as `-DNAME=VALUE`, in this order."""
    threads: int = 128
    """Threads of a block; the same number stands in the kernel's `__launch_bounds__`."""
    smem_bytes: int = 0
    """Dynamic shared memory of a block."""
    cluster: int = 1
    """Blocks of a cluster, along x."""
    opcodes: tuple[str, ...] = ()
    """SASS instructions that the compiled kernel must contain (HGMMA: bf16 wgmma, QGMMA: fp8 wgmma, UTMALDG: TMA load,
    ...)."""
    cooperative: bool = False
    """All blocks of the grid are resident at once, so that they may wait for each other."""
    pdl: bool = False
    """May start before the previous kernel of the stream ends; the kernel itself waits with `griddepcontrol.wait`."""
    root: Path = KERNEL_ROOT

    def __post_init__(self) -> None:
        if not 32 <= self.threads <= 1024 or self.threads % 32:
            raise SpecError(f"{self.name}: threads must be a multiple of 32 in [32, 1024], got {self.threads}")
        if not 0 <= self.smem_bytes <= MAX_SMEM_BYTES:
            raise SpecError(
                f"{self.name}: a block of sm_90 has at most {MAX_SMEM_BYTES} bytes of dynamic shared memory, got "
                f"{self.smem_bytes}; use fewer pipeline stages or a smaller tile"
            )
        if not 1 <= self.cluster <= MAX_CLUSTER:
            raise SpecError(f"{self.name}: a cluster has 1 to {MAX_CLUSTER} blocks, got {self.cluster}")

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.name}[{constants}]" if constants else self.name


@dataclass(frozen=True)
class Program:
    """The complete input of one compilation."""

    source: str
    file_name: str
    headers: dict[str, str]
    options: tuple[str, ...]

    def digest(self, *extra: str) -> str:
        """SHA-256 over source, headers, options and `extra`. Each part is preceded by its length, so parts cannot run
        together."""
        hasher = hashlib.sha256(_DIGEST_FORMAT)
        header_parts = [part for name in sorted(self.headers) for part in (name, self.headers[name])]
        for group in ([self.source], header_parts, self.options, extra):
            hasher.update(f"\n{len(group)}".encode())
            for part in group:
                data = part.encode()
                hasher.update(f"\n{len(data)}\n".encode() + data)
        return hasher.hexdigest()


def resolve(spec: KernelSpec) -> Program:
    """Read the source of `spec` and its headers, transitively."""
    source = source_of(spec)
    headers: dict[str, str] = {}
    pending = [(spec.source, name) for name in _includes(source, spec.source)]
    while pending:
        includer, name = pending.pop()
        if name not in headers:
            local = spec.root / name
            headers[name] = _read(local if local.is_file() else KERNEL_ROOT / name, f"included by {includer}")
            pending += [(name, inner) for inner in _includes(headers[name], name)]
    constants = tuple(f"-D{name}={value}" for name, value in spec.constants)
    return Program(source, spec.source, headers, (*BASE_OPTIONS, *constants))


def source_of(spec: KernelSpec) -> str:
    """The text of its .cu file."""
    return _read(spec.root / spec.source, f"the source of {spec}")


_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">]', re.MULTILINE)


def _includes(text: str, includer: str) -> list[str]:
    names = []
    for bracket, name in _INCLUDE.findall(text):
        if bracket == "<":
            raise SpecError(
                f'{includer} includes <{name}>; kernels include only headers of their own folder, as "name.cuh", '
                "so that they compile where no CUDA toolkit is installed"
            )
        names.append(name)
    return names


def _read(path: Path, role: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot read {path} ({role}): {error.strerror}") from error
