"""The JIT without a GPU: keys, the disk cache under real processes and real damage, policies, progress."""

from __future__ import annotations

import concurrent.futures
import errno
import importlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

import forks
from cold_processes import build_at_once

from supersonic_moe.jit import (
    JitError,
    JitPolicyError,
    KernelSpec,
    NvrtcMissingError,
    compile_all,
    nvrtc_version,
    policy,
    set_policy,
)
from supersonic_moe.jit import build as build_module
from supersonic_moe.jit import cache as cache_module
from supersonic_moe.jit import nvrtc as nvrtc_module
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import CubinCache, cache_directory, encode_entry, entry_name
from supersonic_moe.jit.spec import resolve

SOURCE = """
#include "scale.cuh"
extern "C" __global__ void __launch_bounds__(128) scale(float* x, int n) {
    for (int i = threadIdx.x; i < n; i += FACTOR) x[i] = scaled(x[i]);
}
"""
HEADER = "__device__ float scaled(float value) { return value * FACTOR; }\n"


@pytest.fixture
def spec(tmp_path: Path) -> KernelSpec:
    return write_spec(tmp_path / "kernels")


def write_spec(folder: Path, factor: int = 2, name: str = "scale") -> KernelSpec:
    folder.mkdir(exist_ok=True)
    (folder / "scale.cu").write_text(SOURCE.replace("scale(", f"{name}("))
    (folder / "scale.cuh").write_text(HEADER)
    return KernelSpec(name, "scale.cu", constants=(("FACTOR", factor),), root=folder)


@pytest.fixture(autouse=True)
def _default_policy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(build_module.POLICY_VARIABLE, raising=False)
    yield
    set_policy(None)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files compiled so far in this process."""
    done: list[str] = []
    real = nvrtc_module.compile_cubin

    def counted(source: str, file_name: str, *rest: Any) -> Any:
        done.append(file_name)
        return real(source, file_name, *rest)

    monkeypatch.setattr(nvrtc_module, "compile_cubin", counted)
    return done


# ---- keys ----


def test_key_follows_content_and_nothing_else(spec: KernelSpec, tmp_path: Path) -> None:
    key = resolve(spec).digest("nvrtc 13.0")
    moved = tmp_path / "elsewhere"
    shutil.copytree(spec.root, moved)
    os.utime(moved / "scale.cu", (1, 1))
    assert resolve(replace(spec, root=moved)).digest("nvrtc 13.0") == key

    keys = {key, resolve(spec).digest("nvrtc 13.1"), resolve(spec).digest()}
    keys.add(resolve(replace(spec, constants=(("FACTOR", 3),))).digest("nvrtc 13.0"))
    keys.add(replace(resolve(spec), options=(*resolve(spec).options, "-lineinfo")).digest("nvrtc 13.0"))
    (moved / "scale.cuh").write_text(HEADER + "// changed\n")
    keys.add(resolve(replace(spec, root=moved)).digest("nvrtc 13.0"))
    (moved / "scale.cuh").write_text('#include "inner.cuh"\n' + HEADER)  # an include of an include
    for inner in ("", "// changed\n"):
        (moved / "inner.cuh").write_text(inner)
        keys.add(resolve(replace(spec, root=moved)).digest("nvrtc 13.0"))
    (moved / "scale.cu").write_text(SOURCE + "\n")
    keys.add(resolve(replace(spec, root=moved)).digest("nvrtc 13.0"))
    assert len(keys) == 9


def test_another_nvrtc_version_compiles_again(
    spec: KernelSpec, tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CubinCache(tmp_path / "cache")
    build(spec, cache)
    monkeypatch.setattr(nvrtc_module, "nvrtc_build", lambda: "nvrtc 99.0")
    build(spec, cache)
    assert len(compilations) == 2


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache_module.CACHE_DIR_VARIABLE, str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv(cache_module.CACHE_DIR_VARIABLE)
    assert cache_directory() == tmp_path / "xdg" / "supersonic_moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "supersonic_moe"


# ---- many processes ----


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[concurrent.futures.ProcessPoolExecutor, Any]]:
    """Eight processes that have compiled nothing, and a barrier on which all of them meet before they build."""
    with forks.context().Manager() as manager:
        barrier = manager.Barrier(8)
        with concurrent.futures.ProcessPoolExecutor(8, mp_context=forks.context()) as pool:
            yield pool, barrier


@pytest.mark.xdist_group("cold processes")
def test_eight_cold_processes_compile_one_kernel_once(spec: KernelSpec, tmp_path: Path, processes: Any) -> None:
    pool, barrier = processes
    futures = [pool.submit(build_at_once, spec, tmp_path / "cache", barrier) for _ in range(8)]
    results = [future.result() for future in futures]
    assert len({pid for pid, _, _ in results}) == 8
    assert sorted(origin for _, origin, _ in results) == ["compiled"] + ["disk"] * 7
    assert len({image for _, _, image in results}) == 1
    assert len(CubinCache(tmp_path / "cache").info().entries) == 1


@pytest.mark.xdist_group("cold processes")
def test_eight_cold_processes_compile_eight_kernels(tmp_path: Path, processes: Any) -> None:
    pool, barrier = processes
    specs = [write_spec(tmp_path / "kernels", factor=factor) for factor in range(1, 9)]
    futures = [pool.submit(build_at_once, spec, tmp_path / "cache", barrier) for spec in specs]
    results = [future.result() for future in futures]
    assert [origin for _, origin, _ in results] == ["compiled"] * 8
    info = CubinCache(tmp_path / "cache").info()
    assert len(info.entries) == 8 and not any(entry.damage for entry in info.entries)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_killed_compiler_does_not_block_others(spec: KernelSpec, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    lock = directory / f"{entry_name(spec.name, current_key(spec))}.lock"
    hold = "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
    script = f"import fcntl, sys, time; {hold}"
    with subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        holder.kill()
    started = time.perf_counter()
    assert build(spec, CubinCache(directory, lock_timeout_s=60)).origin == "compiled"
    assert time.perf_counter() - started < 30


def test_a_lock_that_is_never_released_delays_and_says_so(
    spec: KernelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    with CubinCache(directory).exclusive(spec.name, current_key(spec)):
        assert build(spec, CubinCache(directory, lock_timeout_s=0.1)).origin == "compiled"
    assert "compiling scale here as well" in caplog.text and ".lock" in caplog.text


# ---- damage and unusable directories ----


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "another kernel's file"])
def test_a_damaged_entry_is_compiled_again_and_said_once(
    damage: str, spec: KernelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    good = build(spec, CubinCache(directory))
    path = directory / entry_name(spec.name, current_key(spec))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-1]
    elif damage == "one bit":
        data[len(data) // 2] ^= 4
    elif damage == "empty":
        data = bytearray()
    else:
        data = bytearray(encode_entry(spec.name, "0" * 64, good))
    path.write_bytes(data)

    cache = CubinCache(directory)
    assert (cache.info().entries[0].damage != "") == (damage != "another kernel's file")
    assert build(spec, cache).origin == "compiled"
    assert caplog.text.count("is unusable") == 1 and str(path) in caplog.text
    again = build(spec, CubinCache(directory))
    assert (again.origin, again.image) == ("disk", good.image)
    assert len(caplog.records) == 1


def test_a_directory_that_cannot_be_made(
    spec: KernelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, compilations: list[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    check_works_in_memory(CubinCache(tmp_path / "file" / "cache"), spec, caplog, compilations)


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_still_serves_what_it_has(
    fault: int,
    spec: KernelSpec,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    compilations: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(fault, os.strerror(fault))

    real_open = Path.open
    directory = tmp_path / "cache"
    present = replace(spec, constants=(("FACTOR", 7),))
    build(present, CubinCache(directory))
    compilations.clear()
    if fault == errno.ENOSPC:  # strikes when the data is written out
        monkeypatch.setattr(os, "fsync", refuse)
    else:  # no file can be made
        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(
            Path, "open", lambda path, mode="r", **rest: (refuse if "x" in mode else real_open)(path, mode, **rest)
        )
    cache = CubinCache(directory)
    assert build(present, cache).origin == "disk"
    check_works_in_memory(cache, spec, caplog, compilations)
    assert os.strerror(fault) in caplog.text
    assert len(cache.info().entries) == 1 and not list(directory.glob("*.tmp"))


def check_works_in_memory(
    cache: CubinCache, spec: KernelSpec, caplog: pytest.LogCaptureFixture, compilations: list[str]
) -> None:
    other = replace(spec, constants=(("FACTOR", 5),))
    assert [build(s, cache).origin for s in (spec, other, spec)] == ["compiled", "compiled", "memory"]
    assert len(compilations) == 2
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage() and cache_module.CACHE_DIR_VARIABLE in record.getMessage()


def test_info_and_clear_touch_only_their_own_files(spec: KernelSpec, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    cache = CubinCache(directory)
    cubin = build(spec, cache)
    keep = [directory / name for name in ("notes.tmp", "mine.cubin", "my-own.cubin", "a.lock")]
    for path in keep:
        path.write_text("keep")
    (entry,) = cache.info().entries
    assert (entry.kernel, entry.key, entry.damage) == ("scale", current_key(spec), "")
    assert entry.registers == cubin.report.kernel("scale").registers and entry.file_bytes > len(cubin.image)
    assert cache.clear().total_bytes == entry.file_bytes
    assert sorted(directory.iterdir()) == sorted(keep)
    assert cache.info().entries == () and CubinCache(None).info().entries == ()
    assert build(spec, cache).origin == "compiled"


def test_shipped_cubins_come_first_and_need_no_compiler(
    spec: KernelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(build_module, "SHIPPED_CUBINS", shipped)
    cubin, key = build(spec, CubinCache(None)), resolve(spec).digest()
    path = shipped / entry_name(spec.name, key)
    path.write_bytes(encode_entry(spec.name, key, cubin))
    with monkeypatch.context() as without_compiler:
        without_compiler.delattr(nvrtc_module, "nvrtc_build")
        found = build(spec, CubinCache(None))
    assert (found.origin, found.image) == ("shipped", cubin.image)
    path.write_bytes(b"damaged")
    assert build(spec, CubinCache(None)).origin == "compiled"
    assert "reinstall supersonic-moe" in caplog.text


# ---- policy and progress ----


def test_policy_error_names_the_kernel_and_the_remedy(spec: KernelSpec, tmp_path: Path) -> None:
    set_policy("error")
    with pytest.raises(JitPolicyError, match=r"scale\[FACTOR=2\].*supersonic-moe warmup"):
        build(spec, CubinCache(tmp_path))
    (result,) = compile_all([spec], cache=CubinCache(tmp_path))  # an explicit request compiles under every policy
    assert result.cubin is not None and build(spec, CubinCache(tmp_path)).origin == "disk"


def test_policy_from_the_environment(spec: KernelSpec, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    assert policy() == "allow"
    monkeypatch.setenv(build_module.POLICY_VARIABLE, "warn")
    assert policy() == "warn"
    cache = CubinCache(None)
    build(spec, cache)
    build(spec, cache)
    assert [record.getMessage() for record in caplog.records] == ["compiling kernel scale[FACTOR=2]"]
    monkeypatch.setenv(build_module.POLICY_VARIABLE, "never")
    with pytest.raises(JitError, match="one of allow, warn, error; got 'never'"):
        build(spec, CubinCache(None))
    with pytest.raises(JitError, match="got 'sometimes'"):
        set_policy("sometimes")  # type: ignore[arg-type]


def test_a_slow_compilation_says_what_and_how_many(
    spec: KernelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = nvrtc_module.compile_cubin

    def slow(source: str, file_name: str, headers: Any, options: tuple[str, ...]) -> Any:
        time.sleep(0.5 if "-DFACTOR=3" in options else 0)
        return real(source, file_name, headers, options)

    monkeypatch.setattr(nvrtc_module, "compile_cubin", slow)
    monkeypatch.setattr(build_module, "PATIENCE_S", 0.3)
    specs = [replace(spec, constants=(("FACTOR", factor),)) for factor in (2, 3, 4)]
    with caplog.at_level(logging.WARNING):
        compile_all(specs, workers=1, cache=CubinCache(tmp_path))
    slow_messages = [r.getMessage() for r in caplog.records if "FACTOR=3" in r.getMessage()]
    assert len(slow_messages) == 1 and "(2 of 3)" in slow_messages[0] and str(tmp_path) in slow_messages[0]


def test_compile_all_goes_on_past_an_error_and_reports_progress(spec: KernelSpec, tmp_path: Path) -> None:
    broken = replace(spec, constants=(("FACTOR", "undefined_name"),))
    seen: list[tuple[int, int, str]] = []
    results = compile_all(
        [spec, broken, spec],
        progress=lambda done, total, result: seen.append((done, total, str(result.spec))),
        workers=2,
        cache=CubinCache(tmp_path),
    )
    assert [result.error is None for result in results] == [True, False, True]
    assert "undefined_name" in str(results[1].error)
    assert [done for done, _, _ in seen] == [1, 2, 3] and {total for _, total, _ in seen} == {3}


def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_binding(name: str) -> Any:
        raise ModuleNotFoundError(name)

    class WithoutLibrary:
        @staticmethod
        def nvrtcVersion() -> Any:
            raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    for replacement in (no_binding, lambda name: WithoutLibrary):
        nvrtc_module._load_nvrtc.cache_clear()
        with monkeypatch.context() as context:
            context.setattr(importlib, "import_module", replacement)
            with pytest.raises(NvrtcMissingError, match=r"pip install .*nvidia-cuda-nvrtc"):
                nvrtc_version()
    assert nvrtc_version()[0] >= 12


def current_key(spec: KernelSpec) -> str:
    return resolve(spec).digest(nvrtc_module.nvrtc_build())
