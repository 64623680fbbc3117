"""Compiled kernels on disk: content-addressed, self-checking, safe when many processes start cold.

The key of an entry is a SHA-256 over everything that decides its bytes (source, headers, options, NVRTC version; see
`Program.digest`), never a path or a time stamp, so a copied, restored or shared directory stays valid. An entry is one
file,

    supersonic-moe cubin 1\\n <sha256 of the rest> \\n <JSON: key, kernel, report> \\n <cubin bytes>

written to a temporary name, synced and renamed, so a reader sees a whole file or none, and a file damaged later fails
its digest and is compiled again. One file lock per key makes processes that miss the same kernel compile it once; the
operating system releases the lock of a process that dies. No failure of the directory (read-only, full, gone) stops a
run: kernels then live in the memory of the process, and one warning says so.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from supersonic_moe.jit.nvrtc import CompileReport, KernelResources
from supersonic_moe.jit.spec import KERNEL_ROOT

log = logging.getLogger("supersonic_moe.jit")

CACHE_DIR_VARIABLE = "SUPERSONIC_MOE_CACHE_DIR"
SHIPPED_CUBINS = KERNEL_ROOT / "cubins"
LOCK_TIMEOUT_S = 120.0
_MAGIC = b"supersonic-moe cubin 1"
_OWN_FILE = re.compile(r"\w+-[0-9a-f]{32}\.cubin(\.lock|\.[0-9a-f]{32}\.tmp)?")

Origin = Literal["compiled", "memory", "disk", "shipped"]


@dataclass(frozen=True)
class Cubin:
    """Machine code of one program, what ptxas said about it, and where this copy came from."""

    image: bytes
    report: CompileReport
    origin: Origin = "compiled"


@dataclass(frozen=True)
class CacheEntry:
    """One line of `supersonic-moe cache info`; `damage` says why an entry will be compiled again."""

    kernel: str
    key: str
    file_bytes: int
    registers: int
    damage: str = ""


@dataclass(frozen=True)
class CacheInfo:
    directory: Path | None
    entries: tuple[CacheEntry, ...]

    @property
    def total_bytes(self) -> int:
        return sum(entry.file_bytes for entry in self.entries)


class DamagedEntryError(ValueError):
    """A cache file that is not what was written."""


def encode_entry(kernel: str, key: str, cubin: Cubin) -> bytes:
    """The bytes of a cache file."""
    header = json.dumps({"key": key, "kernel": kernel, "report": asdict(cubin.report)}, sort_keys=True)
    body = header.encode() + b"\n" + cubin.image
    return b"\n".join((_MAGIC, hashlib.sha256(body).hexdigest().encode(), body))


def decode_entry(data: bytes) -> tuple[str, str, Cubin]:
    """(kernel, key, cubin) of a cache file; DamagedEntryError unless it is byte for byte what `encode_entry` made."""
    magic, _, rest = data.partition(b"\n")
    digest, _, body = rest.partition(b"\n")
    if magic != _MAGIC:
        raise DamagedEntryError("it does not start as a cache entry of this version")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedEntryError("its content does not match its digest (truncated or altered)")
    header, _, image = body.partition(b"\n")
    fields = json.loads(header)
    report = fields["report"]
    kernels = tuple(KernelResources(**kernel) for kernel in report["kernels"])
    return (
        fields["kernel"],
        fields["key"],
        Cubin(image, CompileReport(kernels, tuple(report["remarks"]), report["seconds"])),
    )


def read_entry(path: Path, key: str, origin: Origin) -> Cubin | None:
    """The cubin in `path`, None when there is no such file. Raises DamagedEntryError or OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    _, found, cubin = decode_entry(data)
    if found != key:
        raise DamagedEntryError("it holds another key than its name says")
    return replace(cubin, origin=origin)


def entry_name(kernel: str, key: str) -> str:
    return f"{kernel}-{key[:32]}.cubin"


class CubinCache:
    """Memory in front of one directory (None: memory only). Use `default_cache()` unless you need another directory."""

    def __init__(self, directory: Path | None, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self.directory = directory
        self._lock_timeout_s = lock_timeout_s
        self._memory: dict[str, Cubin] = {}
        self._warned: set[str] = set()

    def load(self, kernel: str, key: str) -> Cubin | None:
        """The entry, from memory or disk; None when it has to be compiled."""
        if (held := self._memory.get(key)) is not None:
            return replace(held, origin="memory")
        if self.directory is None:
            return None
        path = self.directory / entry_name(kernel, key)
        try:
            cubin = read_entry(path, key, "disk")
        except NotADirectoryError:
            return None  # `exclusive` and `store` say that the directory is unusable
        except (DamagedEntryError, OSError) as error:
            self._warn_once(f"damaged {key}", f"compiling {kernel} again: cache entry {path} is unusable, {error}")
            return None
        if cubin is not None:
            self._memory[key] = cubin
        return cubin

    def store(self, kernel: str, key: str, cubin: Cubin) -> None:
        """Keep the entry in memory and, where possible, on disk; a reader never sees a partial file."""
        self._memory[key] = cubin
        if self.directory is None:
            return
        path = self.directory / entry_name(kernel, key)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(encode_entry(kernel, key, cubin))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            self._warn_unusable(error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    @contextlib.contextmanager
    def exclusive(self, kernel: str, key: str) -> Iterator[None]:
        """Let one process at a time compile this key.

        The body runs in any case: where locking fails, processes compile the same bytes twice, and the rename in
        `store` keeps that harmless.
        """
        if self.directory is None:
            yield
            return
        lock = FileLock(self.directory / f"{entry_name(kernel, key)}.lock", timeout=self._lock_timeout_s)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(poll_interval=0.02)
        except Timeout:
            log.warning(
                "waited %.0f s for the process that holds %s; compiling %s here as well (delete the file if no such "
                "process runs)",
                self._lock_timeout_s,
                lock.lock_file,
                kernel,
            )
        except (OSError, NotImplementedError) as error:
            self._warn_unusable(error)
        try:
            yield
        finally:
            lock.release()  # does nothing when the lock is not held

    def info(self) -> CacheInfo:
        """What is on disk, every entry checked."""
        entries = []
        for path in self._files():
            if path.suffix != ".cubin":
                continue
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                try:
                    kernel, key, cubin = decode_entry(data)
                    registers = max((k.registers for k in cubin.report.kernels), default=0)
                    entries.append(CacheEntry(kernel, key, len(data), registers))
                except DamagedEntryError as error:
                    entries.append(CacheEntry(path.stem, "", len(data), 0, str(error)))
        return CacheInfo(self.directory, tuple(entries))

    def clear(self) -> CacheInfo:
        """Remove the files of this cache and no others from its directory; returns what was there."""
        removed = self.info()
        self._memory.clear()
        for path in self._files():
            path.unlink(missing_ok=True)
        return removed

    def _files(self) -> list[Path]:
        if self.directory is None or not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _OWN_FILE.fullmatch(path.name))

    def _warn_unusable(self, error: Exception) -> None:
        self._warn_once(
            "unusable",
            f"the kernel cache {self.directory} cannot be written ({error}); compiled kernels stay in the memory of "
            f"this process, and the next one compiles them again. Set {CACHE_DIR_VARIABLE} to a writable directory",
        )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning("%s", message)


def cache_directory() -> Path | None:
    """$SUPERSONIC_MOE_CACHE_DIR, else supersonic_moe in the XDG cache; None where the user has no home directory."""
    if chosen := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(chosen).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "supersonic_moe"
    try:
        return Path.home() / ".cache" / "supersonic_moe"
    except RuntimeError:
        return None


@functools.lru_cache(maxsize=1)
def default_cache() -> CubinCache:
    """The cache of this process; its directory is fixed at the first call."""
    return CubinCache(cache_directory())
