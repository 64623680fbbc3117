"""The cold-start suite: real child processes on a CPU, and whose caches they get."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from command_line import run

from supersonic_moe.bench import cold_start, first_call, readme
from supersonic_moe.bench.timing import NoResultError
from supersonic_moe.jit.cache import CACHE_DIR_VARIABLE
from supersonic_moe.perf_model import LayerShape

SHAPE = LayerShape(32, 16, 8, 2, 1)
STEPS = {"start_s", "import_s", "context_s", "backward_s", "library_s", "build_s", "call_s", "again_s"}


def test_command_measures_new_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the bytecode that this installation has: to compile that of torch would take as long as the rest."""
    start = cold_start.start
    bytecode = sys.pycache_prefix or ""  # "": beside the sources
    monkeypatch.setattr(cold_start, "start", lambda shape, device, caches, _: start(shape, device, caches, bytecode))
    file = tmp_path / "cold-start.json"
    arguments = ["bench", "cold-start", "--shape", "32,16,8,2,1", "--repeats", "1", "--device", "cpu"]
    result = run(*arguments, "--json", str(file), columns=80)
    assert result.exit_code == 0, result.output
    assert "first forward + backward, s" in result.output and "cold" in result.output and "warm" in result.output
    content = json.loads(file.read_text())
    assert content["suite"] == "cold-start" and {row["peer"] for row in content["rows"]} == {None}
    for state in ("cold", "warm"):
        seconds = {r["metric"]: r["value"] for r in content["rows"] if r["case"] == f"{SHAPE}_{state}"}
        assert seconds.keys() == STEPS | {"first_call_s", "total_s"}
        assert seconds["import_s"] > 0.1 and seconds["call_s"] > seconds["again_s"] > 0
        assert seconds["first_call_s"] == pytest.approx(
            seconds["library_s"] + seconds["build_s"] + seconds["call_s"], rel=1e-3
        )
        before = seconds["start_s"] + seconds["import_s"] + seconds["context_s"] + seconds["backward_s"]
        assert seconds["total_s"] == pytest.approx(before + seconds["first_call_s"], rel=1e-3)
    table = readme.results(tmp_path, tmp_path / "page.md")
    assert f"| `{SHAPE}_cold` |" in table and f"| `{SHAPE}_warm` |" in table and "*vs*" not in table


def test_half_of_the_kernels_in_the_package_is_no_state_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkout with only the CUDA kernels measures is neither a first call of a wheel nor one of a checkout."""
    shape, seen = LayerShape(8, 16, 8, 2, 1), {"call_s": 1.0}
    monkeypatch.setattr(cold_start, "start", lambda *_: seen)
    for kernels, state in (({"CUDA": 0, "Triton": 0}, "cold"), ({"CUDA": 262, "Triton": 90}, "shipped")):
        monkeypatch.setattr(cold_start, "carried", lambda kernels=kernels: kernels)
        assert state in cold_start.run_case(shape, torch.device("cpu"), 1).metrics
    monkeypatch.setattr(cold_start, "carried", lambda: {"CUDA": 262, "Triton": 0})
    with pytest.raises(NoResultError, match=r"it holds 262 of CUDA and 0 of Triton. `make wheel` compiles both"):
        cold_start.run_case(shape, torch.device("cpu"), 1)


def test_each_repeat_is_cold_then_warm_in_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def start(shape: LayerShape, device: torch.device, caches: Path, bytecode: Path) -> dict[str, float]:
        assert shape is SHAPE and device.type == "cpu" and caches.is_dir() and bytecode.is_dir()
        assert (bytecode / "left behind").exists() == bool(seen)
        (bytecode / "left behind").touch()
        assert list(caches.iterdir()) == ([caches / "left behind"] if caches in seen else [])
        (caches / "left behind").touch()
        seen.append(caches)
        return {"call_s": float(len(seen) ** 2)}

    monkeypatch.setattr(cold_start, "start", start)
    result = cold_start.run_case(SHAPE, torch.device("cpu"), repeats=3)
    assert len(set(seen)) == 4 and seen[1::2] == seen[2::2] and not any(caches.exists() for caches in seen)
    assert result.metrics == {"cold": {"call_s": 16.0}, "warm": {"call_s": 25.0}}  # of 4, 16, 36 and 9, 25, 49


def test_the_child_uses_the_caches_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in (CACHE_DIR_VARIABLE, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "argv", ["first_call.py", "0.0", "8,16,8,2,1", "cpu", "/kernels", "/triton"])
    first_call.main()
    assert os.environ[CACHE_DIR_VARIABLE] == "/kernels" and os.environ["TRITON_CACHE_DIR"] == "/triton"
    assert json.loads(capsys.readouterr().out).keys() >= STEPS


def test_a_process_that_fails_or_hangs_is_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has its bytecode where it should."""
    child = tmp_path / "child.py"
    monkeypatch.setattr(cold_start, "CHILD", child)
    child.write_text("import sys\nraise ValueError(sys.pycache_prefix)")
    said = re.escape(f"T32_H16_I8_E2_K1: the process ended with exit code 1: ValueError: {tmp_path}/bytecode")
    with pytest.raises(NoResultError, match=said):
        cold_start.start(SHAPE, torch.device("cpu"), tmp_path, tmp_path / "bytecode")
    child.write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(cold_start, "SLOWEST_START_S", 0.01)
    with pytest.raises(NoResultError, match="no result after"):
        cold_start.start(SHAPE, torch.device("cpu"), tmp_path, tmp_path / "bytecode")


@pytest.mark.gpu
def test_caches_of_a_process_on_a_gpu_serve_the_next(device: torch.device, tmp_path: Path) -> None:
    shape = LayerShape(256, 128, 64, 4, 2)
    cold = cold_start.start(shape, device, tmp_path, tmp_path / "bytecode")
    assert any((tmp_path / "triton").iterdir())
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert any((tmp_path / "supersonic_moe").glob("*.cubin"))
    warm = cold_start.start(shape, device, tmp_path, tmp_path / "bytecode")
    assert warm["first_call_s"] < cold["first_call_s"]
