"""A new user's first steps: packages that are not there and variables with typing errors get one sentence each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run, words

import supersonic_moe
from supersonic_moe import cli
from supersonic_moe.bench import gemm
from supersonic_moe.cli import health, output
from supersonic_moe.jit.cache import CACHE_DIR_VARIABLE, default_cache
from supersonic_moe.kernels import registry

LAYER_WITHOUT_EXTRAS = """
import sys
for name in ("typer", "rich", "matplotlib", "triton", "cuda"):
    sys.modules[name] = None  # to import it is an error, and find_spec finds nothing
import torch, supersonic_moe
for name in supersonic_moe.__all__:
    getattr(supersonic_moe, name)
layer = supersonic_moe.MoE(4, 2, 16, 8, "swiglu", False, 0.02)
out, aux_loss = layer(torch.randn(8, 16))
(out.sum() + aux_loss).backward()
from supersonic_moe.cli import main
main()
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(supersonic_moe.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_library_needs_torch_and_the_command_names_its_extra() -> None:
    done = python(LAYER_WITHOUT_EXTRAS)
    sentence = "The command line needs typer, rich, matplotlib: pip install 'supersonic-moe[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)


def test_a_wrong_log_level_is_named_and_changes_nothing() -> None:
    show = "import logging, supersonic_moe; print(logging.getLogger('supersonic_moe').level)"
    wrong, right = (python(show, SUPERSONIC_MOE_LOG_LEVEL=level) for level in ("NOPE", "debug"))
    assert wrong.returncode == 0 and wrong.stdout == "0\n"
    assert wrong.stderr == (
        "SUPERSONIC_MOE_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL; got 'NOPE', which changes "
        "nothing\n"
    )
    assert right.stdout == "10\n" and right.stderr == ""


def test_the_command_line_lets_openmp_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["supersonic-moe", "--version"])
    for before, after in (("ACTIVE", "ACTIVE"), (None, "PASSIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
        if before is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        with pytest.raises(SystemExit):
            cli.main()
        assert os.environ["OMP_WAIT_POLICY"] == after


def test_tables_in_a_file_or_a_narrow_terminal_lose_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", None)  # not a terminal, wherever the tests run
    assert output.console().width == output.FILE_COLUMNS
    monkeypatch.setenv("COLUMNS", "90")
    assert output.console().width == 90
    shown = run("explain", "--shape", "8192,3072,1536,8,8", "--recipe", "fp8", "--device", "cpu", columns=80)
    assert shown.exit_code == 0 and "…" not in shown.output


# ---- without Triton --------------------------------------------------------------------------------------------------


def test_without_triton_one_line_says_so_and_doctor_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    result = run("warmup", "--compile-only")
    assert result.exit_code == 1
    assert result.output == 'Kernels cannot be compiled without triton: pip install "supersonic-moe[cuda13]"\n'

    monkeypatch.setattr(health, "gpus", lambda: range(0))
    assert health.triton().status == "warn" and "(`warmup`) cannot be compiled" in health.triton().found
    monkeypatch.setattr(health, "gpus", lambda: range(1))
    assert health.triton().status == "fail"


def test_without_the_compiler_one_line_says_so_and_doctor_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("supersonic_moe.jit.nvrtc_version", lambda: raising_jit_error())
    assert run("warmup", "--compile-only").output.startswith("Kernels cannot be compiled without nvrtc: pip install")
    monkeypatch.setattr(health, "gpus", lambda: range(0))
    assert "layers on this machine do without" in health.nvrtc().found
    monkeypatch.setattr(health, "gpus", lambda: range(1))
    assert health.nvrtc().found == "cannot compile kernels: no library"


def raising_jit_error() -> None:
    from supersonic_moe.jit import JitError

    raise JitError("no library")


@pytest.mark.parametrize("package", ["triton", "cuda-bindings"])
def test_bench_gemm_on_hopper_names_the_missing_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "HAS_TRITON", package != "triton")
    monkeypatch.setattr(registry, "HAS_DRIVER_BINDINGS", package != "cuda-bindings")
    with pytest.raises(ValueError, match=rf"need {package}, which is not installed: pip install"):
        gemm.check_device(torch.device("cuda", 0))


# ---- variables and folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "fix"),
    [
        ("SUPERSONIC_MOE_JIT_POLICY", "foo", "must be one of allow, warn, error; got 'foo'. Change or unset it"),
        ("SUPERSONIC_MOE_LOG_LEVEL", "NOPE", "choose one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ],
)
def test_doctor_reports_a_variable_with_a_wrong_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, fix: str
) -> None:
    assert health.environment().status == "ok"
    monkeypatch.setenv(variable, value)
    check = health.environment()
    assert check.status == "warn" and f"{variable}={value}" in check.found and fix in check.fix
    monkeypatch.setattr(health, "gpus", lambda: range(1))
    assert health.environment().status == ("fail" if "POLICY" in variable else "warn"), "no kernel can be built"


@pytest.mark.parametrize("below", ["a file", "/proc"])
def test_doctor_reports_a_cache_directory_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, below: str
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / below / "kernels"))
    default_cache.cache_clear()
    try:
        content = json.loads(run("doctor", "--json").output)
    finally:
        default_cache.cache_clear()
    (check,) = (check for check in content["checks"] if check["name"] == "kernel cache")
    assert check["status"] == "warn" and f"set {CACHE_DIR_VARIABLE}" in check["fix"]


def test_demo_into_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("demo", "--out", str(tmp_path / "file" / "out"))
    assert result.exit_code == 2
    assert "'--out': cannot write to" in words(result) and "Choose another folder." in words(result)
