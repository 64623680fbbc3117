"""Cache directories as other people have them: no home, another user's files, another version's entries, file systems
without locks or fsync, the package inside a zip. None of it may stop a run, or be said wrongly.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run, words

import supersonic_moe
from supersonic_moe.cli import health
from supersonic_moe.jit import cache as cache_module
from supersonic_moe.jit import nvrtc as nvrtc_module
from supersonic_moe.jit.cache import (
    CACHE_DIR_VARIABLE,
    Cubin,
    CubinCache,
    cache_directory,
    decode_entry,
    default_cache,
    encode_entry,
    entry_name,
)
from supersonic_moe.jit.nvrtc import CompileReport, KernelResources

KEY = "5" * 64
CUBIN = Cubin(b"machine code", CompileReport((KernelResources("scale", 40, 0, 0, 0, 16),), (), 1.5))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache with one entry, which is also the one of the command line."""
    directory = tmp_path / "cache"
    CubinCache(directory).store("scale", KEY, CUBIN)
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(directory))
    default_cache.cache_clear()
    yield directory
    default_cache.cache_clear()


def refuse(fault: int) -> Any:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(fault, os.strerror(fault))

    return refused


# ---- where it is ----


def test_home_in_the_path_of_a_user_without_home(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", no_home)
    for chosen, reason in (
        ("~/x", "home directory in SUPERSONIC_MOE_CACHE_DIR=~/x"),
        ("", "this user has no home"),
    ):
        monkeypatch.setenv(CACHE_DIR_VARIABLE, chosen)
        monkeypatch.setenv("XDG_CACHE_HOME", "~/y")
        assert cache_directory() is None
        default_cache.cache_clear()
        result = run("cache", "info")
        assert result.exit_code == 0 and reason in words(result)
        assert "to an absolute path" in words(result)
        assert not caplog.records
        default_cache().store("scale", KEY, CUBIN)
        default_cache().store("other", KEY, CUBIN)
        assert [reason in record.getMessage() for record in caplog.records] == [True]
        caplog.clear()
        assert health.kernel_cache().status == "warn"
        default_cache.cache_clear()


def test_home_and_relative_paths_in_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for variable, value, expected in (
        (CACHE_DIR_VARIABLE, "~/x", tmp_path / "home" / "x"),
        (CACHE_DIR_VARIABLE, "x", tmp_path / "x"),
        ("XDG_CACHE_HOME", "~/x", tmp_path / "home" / "x" / "supersonic_moe"),
        ("XDG_CACHE_HOME", "relative paths are invalid", tmp_path / "home" / ".cache" / "supersonic_moe"),
    ):
        monkeypatch.delenv(CACHE_DIR_VARIABLE, raising=False)
        monkeypatch.setenv(variable, value)
        assert cache_directory() == expected


# ---- another user's files ----


def test_info_and_clear_of_files_that_cannot_be_read_or_removed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CubinCache(directory).store("other", KEY, CUBIN)
    theirs = directory / entry_name("scale", KEY)
    read, unlink = Path.read_bytes, Path.unlink
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(errno.EACCES)() if path == theirs else read(path))
    monkeypatch.setattr(
        Path, "unlink", lambda path, **rest: refuse(errno.EPERM)() if path == theirs else unlink(path, **rest)
    )
    shown = run("cache", "info", columns=200)
    assert shown.exit_code == 0 and "2 compiled kernels (1 damaged)" in shown.output
    assert "it cannot be read: Permission denied; compiled again when needed" in words(shown)

    removed = run("cache", "clear", columns=200)
    assert removed.exit_code == 1
    assert removed.stdout.startswith("Removed 1 compiled kernels")
    assert f"1 files in {directory} cannot be removed: Operation not permitted. Their owner can." in removed.stderr
    assert list(directory.glob("*.cubin")) == [theirs]


def test_info_and_clear_of_a_directory_that_cannot_be_listed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", refuse(errno.EACCES))
    for command in ("info", "clear"):
        result = run("cache", command)
        assert result.exit_code == 1 and result.stderr == f"{directory} cannot be listed: Permission denied.\n"
    check = health.kernel_cache()
    assert check.status == "warn" and "cannot be listed" in check.fix


def test_entries_that_cannot_be_read_are_said_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "read_bytes", refuse(errno.EACCES))
    cache = CubinCache(directory)
    assert [cache.load("scale", key) for key in (KEY, "6" * 64, "7" * 64)] == [None, None, None]
    (record,) = caplog.records
    assert "Permission denied" in record.getMessage()


# ---- another version's entries ----


def rewritten(data: bytes, **report: Any) -> bytes:
    """An entry whose kernels have these report fields, None for none, with a digest that is right."""
    magic, _, body = data.split(b"\n", 2)
    text, _, image = body.partition(b"\n")
    header = json.loads(text)
    for kernel in header["report"]["kernels"]:
        kernel.update(report)
        for name in [name for name, value in report.items() if value is None]:
            del kernel[name]
    body = json.dumps(header).encode() + b"\n" + image
    return b"\n".join((magic, hashlib.sha256(body).hexdigest().encode(), body))


def test_an_entry_with_fields_that_only_a_later_version_knows(directory: Path) -> None:
    path = directory / entry_name("scale", KEY)
    path.write_bytes(rewritten(path.read_bytes(), barriers=3))
    assert CubinCache(directory).load("scale", KEY) == replace(CUBIN, origin="disk")
    assert CubinCache(directory).info().entries[0].damage == ""


@pytest.mark.parametrize("change", [{"registers": None}, {"name": None}])
def test_an_entry_without_fields_of_this_version(
    directory: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = directory / entry_name("scale", KEY)
    path.write_bytes(rewritten(path.read_bytes(), **change))
    assert CubinCache(directory).load("scale", KEY) is None
    assert "another version of supersonic-moe wrote it" in caplog.text
    assert "another version" in CubinCache(directory).info().entries[0].damage


def test_updates_of_one_nvrtc_release_do_not_share_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    assert len(nvrtc_module.nvrtc_build()) > len("nvrtc 13.0 ") and nvrtc_module._loaded_libraries()
    builds = set()
    for update in (b"build of 13.0.48", b"build of 13.0.88"):
        library = tmp_path / "libnvrtc.so.13"
        library.write_bytes(update)
        monkeypatch.setattr(nvrtc_module, "_loaded_libraries", lambda library=library: {str(library)})
        nvrtc_module.nvrtc_build.cache_clear()
        builds.add(nvrtc_module.nvrtc_build())
    nvrtc_module.nvrtc_build.cache_clear()
    assert len(builds) == 2


# ---- file systems ----


@pytest.mark.parametrize("fault", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES])
def test_a_file_system_without_locks_stores_all_the_same(
    fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or, with EACCES, a lock file of another user."""
    if fault == errno.EACCES:
        monkeypatch.setattr(os, "open", refuse(fault))
    else:
        monkeypatch.setattr(fcntl, "flock", refuse(fault))
    cache = CubinCache(tmp_path / "cache", lock_timeout_s=60)
    with caplog.at_level(logging.INFO), cache.exclusive("scale", KEY):
        monkeypatch.undo()
        cache.store("scale", KEY, CUBIN)
    assert CubinCache(tmp_path / "cache").load("scale", KEY) == replace(CUBIN, origin="disk")
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "cannot be locked" in record.getMessage()
    assert os.strerror(fault) in record.getMessage()


@pytest.mark.parametrize("fault", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_fsync_stores_all_the_same(
    fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module.os, "fsync", refuse(fault))
    CubinCache(tmp_path / "cache").store("scale", KEY, CUBIN)
    assert CubinCache(tmp_path / "cache").load("scale", KEY) == replace(CUBIN, origin="disk")
    assert not caplog.records


def test_the_lock_is_free_again_after_the_body_and_after_an_error(tmp_path: Path) -> None:
    cache = CubinCache(tmp_path, lock_timeout_s=0)
    with pytest.raises(KeyError), cache.exclusive("scale", KEY):
        raise KeyError
    with open(tmp_path / f"{entry_name('scale', KEY)}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)
        with cache.exclusive("scale", KEY), pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_decoding_is_the_inverse_of_encoding() -> None:
    assert decode_entry(encode_entry("scale", KEY, CUBIN)) == ("scale", KEY, CUBIN)


# ---- imported from a zip ----

COMPILE_FROM_ZIP = """
import supersonic_moe
assert ".zip" in supersonic_moe.__file__
from supersonic_moe.jit import compile_all
from supersonic_moe.jit.build import build
from supersonic_moe.jit.spec import resolve
from supersonic_moe.kernels.sm90 import registered_specs, self_test
for spec in registered_specs():
    resolve(spec)
for result in compile_all(self_test.SPECS[:1]):
    print(result.error or result.cubin.origin)
"""


def test_imported_from_a_zip(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings.nvrtc")
    source = Path(supersonic_moe.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as package:
        for path in source.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                package.write(path, path.relative_to(source.parent))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "package.zip"), CACHE_DIR_VARIABLE: str(tmp_path / "c")}
    command = [sys.executable, "-c", COMPILE_FROM_ZIP]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr
