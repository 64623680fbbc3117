"""Compiled kernels on disk: content-addressed, self-checking, safe when many processes start cold.

The key of an entry is a SHA-256 over everything that decides its bytes (source, headers, options, build of NVRTC; see
`Program.digest`), never a path or a time stamp, so a copied, restored or shared directory stays valid. An entry is one
file,

    supersonic-moe cubin 1\\n <sha256 of the rest> \\n <JSON: key, kernel, report> \\n <cubin bytes>

written to a temporary name, synced and renamed, so a reader sees a whole file or none, and a file damaged later fails
its digest and is compiled again. One file lock per key makes processes that miss the same kernel compile it once; the
operating system releases the lock of a process that dies. No failure of the directory (read-only, full, gone, another
user's, without locks or fsync) stops a run: what works is used, and where nothing can be written kernels live in the
memory of the process, and one warning says so.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from supersonic_moe.jit.nvrtc import CompileReport, KernelResources
from supersonic_moe.jit.spec import KERNEL_ROOT

log = logging.getLogger("supersonic_moe.jit")

CACHE_DIR_VARIABLE = "SUPERSONIC_MOE_CACHE_DIR"
SHIPPED_CUBINS = KERNEL_ROOT / "cubins"
LOCK_TIMEOUT_S = 120.0
LOCK_POLL_S = 0.02
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

    path: Path
    kernel: str
    key: str
    file_bytes: int
    registers: int
    damage: str = ""


@dataclass(frozen=True)
class CacheInfo:
    """Entries of a cache directory. `problem` says what could not be listed or removed, and why."""

    directory: Path | None
    entries: tuple[CacheEntry, ...]
    problem: str = ""

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
    text, _, image = body.partition(b"\n")
    try:
        header = json.loads(text)
        report = header["report"]
        kernels = tuple(_resources(kernel) for kernel in report["kernels"])
        cubin = Cubin(image, CompileReport(kernels, tuple(report["remarks"]), report["seconds"]))
        return header["kernel"], header["key"], cubin
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedEntryError("another version of supersonic-moe wrote it") from error


def _resources(kernel: dict[str, Any]) -> KernelResources:
    """Fields that only a later version knows are left out: versions that share a directory read each other's entries,
    and do not overwrite them in turn."""
    return KernelResources(**{field.name: kernel[field.name] for field in fields(KernelResources)})


def read_entry(path: Traversable, key: str, origin: Origin) -> Cubin | None:
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
    """Memory in front of one directory (None: memory only; `why_none` is then said when the first kernel is lost). Use
    `default_cache()` unless you need another directory."""

    def __init__(
        self, directory: Path | None, lock_timeout_s: float = LOCK_TIMEOUT_S, *, why_none: str | None = None
    ) -> None:
        self.directory = directory
        self._why_none = why_none
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
        except DamagedEntryError as error:
            self._warn_once(f"damaged {key}", f"compiling {kernel} again: cache entry {path} is unusable, {error}")
            return None
        except OSError as error:
            self._warn_once("unreadable", f"compiling kernels again that {self.directory} may hold: {error}")
            return None
        if cubin is not None:
            self._memory[key] = cubin
        return cubin

    def store(self, kernel: str, key: str, cubin: Cubin) -> None:
        """Keep the entry in memory and, where possible, on disk; a reader never sees a partial file."""
        self._memory[key] = cubin
        if self.directory is None:
            if self._why_none:
                self._warn_once("unusable", self._why_none)
            return
        path = self.directory / entry_name(kernel, key)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(encode_entry(kernel, key, cubin))
                file.flush()
                _sync(file.fileno())
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
        path = self.directory / f"{entry_name(kernel, key)}.lock"
        descriptor = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(descriptor, self._lock_timeout_s):
                log.warning(
                    "waited %.0f s for the process that holds %s; compiling %s here as well (delete the file if no "
                    "such process runs)",
                    self._lock_timeout_s,
                    path,
                    kernel,
                )
        except OSError as error:  # no locks on this file system, or another user's file; `store` says if nothing works
            log.info("%s cannot be locked (%s); processes that start together may all compile %s", path, error, kernel)
        try:
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has a copy
                os.close(descriptor)

    def info(self) -> CacheInfo:
        """What is on disk, every entry checked."""
        try:
            paths = self._files()
        except OSError as error:
            return CacheInfo(self.directory, (), f"{self.directory} cannot be listed: {error.strerror}")
        entries = (_checked(path) for path in paths if path.suffix == ".cubin")
        return CacheInfo(self.directory, tuple(entry for entry in entries if entry is not None))

    def clear(self) -> CacheInfo:
        """Remove the files of this cache and no others from its directory; returns the entries that are gone."""
        found, kept = self.info(), dict[Path, str]()
        self._memory.clear()
        for path in [] if found.problem else self._files():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                kept[path] = error.strerror or str(error)
        if not kept:
            return found
        removed = tuple(entry for entry in found.entries if entry.path not in kept)
        reasons = ", ".join(sorted(set(kept.values())))
        problem = f"{len(kept)} files in {self.directory} cannot be removed: {reasons}. Their owner can"
        return CacheInfo(self.directory, removed, problem)

    def _files(self) -> list[Path]:
        if self.directory is None:
            return []
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [self.directory / name for name in sorted(names) if _OWN_FILE.fullmatch(name)]

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


def _checked(path: Path) -> CacheEntry | None:
    """The entry in a file, checked; None when another process has just removed it."""
    size = 0
    try:
        size = path.stat().st_size
        kernel, key, cubin = decode_entry(path.read_bytes())
    except FileNotFoundError:
        return None
    except DamagedEntryError as error:
        return CacheEntry(path, path.stem, "", size, 0, str(error))
    except OSError as error:
        return CacheEntry(path, path.stem, "", size, 0, f"it cannot be read: {error.strerror}")
    return CacheEntry(path, kernel, key, size, max((k.registers for k in cubin.report.kernels), default=0))


def _lock(descriptor: int, timeout_s: float) -> bool:
    """Lock a file, waiting for its holder; False after `timeout_s`, OSError where the file system has no locks."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # how file systems say that another process has it
                raise
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOCK_POLL_S)


def _sync(descriptor: int) -> None:
    """fsync where the file system has it. Elsewhere (FUSE, some network mounts) a crash may leave a file that is not
    whole; its digest tells."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def cache_directory() -> Path | None:
    """$SUPERSONIC_MOE_CACHE_DIR, else supersonic_moe in the XDG cache; None where that is in a home directory and the
    user has none."""
    if chosen := os.environ.get(CACHE_DIR_VARIABLE):
        return _expanded(chosen)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # "If an implementation encounters a relative path it should consider the path invalid and ignore it" (XDG)
    base = (_expanded(xdg) if xdg.startswith(("/", "~")) else None) or _expanded("~/.cache")
    return base and base / "supersonic_moe"


def _expanded(path: str) -> Path | None:
    """With `~` resolved and made absolute, so that a later chdir changes nothing; None where it cannot be."""
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError):
        return None


@functools.lru_cache(maxsize=1)
def default_cache() -> CubinCache:
    """The cache of this process; its directory is fixed at the first call."""
    directory = cache_directory()
    return CubinCache(directory, why_none=no_directory() if directory is None else None)


def no_directory() -> str:
    """Why `cache_directory` is None, and what helps."""
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    reason = f"nobody knows the home directory in {CACHE_DIR_VARIABLE}={chosen}" if chosen else "this user has no home"
    return f"no kernel cache on disk: {reason}. Set {CACHE_DIR_VARIABLE} to an absolute path to keep compiled kernels"
