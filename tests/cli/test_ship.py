"""Kernels compiled into the package before a wheel is built."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from supersonic_moe.cli.ship import ship
from supersonic_moe.jit import CubinCache, build, nvrtc
from supersonic_moe.kernels.sm90 import launch_probe


def test_the_package_finds_what_was_shipped_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(build, "default_cache", lambda: CubinCache(None))  # each time all are compiled
    directory, specs = tmp_path / "cubins", launch_probe.SPECS[:2]
    size = ship(specs, directory, Console(quiet=True))
    files = {file: file.read_bytes() for file in directory.iterdir()}
    assert len(files) == len(set(specs)) and sum(map(len, files.values())) == size

    (directory / "gone-0123456789abcdef0123456789abcdef.cubin").write_bytes(b"of a kernel that is no more")
    assert ship(specs, directory, Console(quiet=True)) == size
    assert {file: file.read_bytes() for file in directory.iterdir()} == files

    monkeypatch.setattr(build, "SHIPPED_CUBINS", directory)
    monkeypatch.delattr(nvrtc, "compile_cubin")
    assert [build.build(spec, CubinCache(None)).origin for spec in specs] == ["shipped"] * len(specs)
