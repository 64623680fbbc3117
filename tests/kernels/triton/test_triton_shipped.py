"""Triton kernels that the package carries compiled: found by what Triton would compile, launched with the same
arguments, and passed over whenever they might not fit. On a CPU that poses as a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("triton")

from pretended_gpu import Machine, pretend_hopper

from supersonic_moe.jit import LaunchError
from supersonic_moe.kernels.triton import launch as launch_module
from supersonic_moe.kernels.triton import shipped
from supersonic_moe.kernels.triton.launch import launch

SUPPORT = Path(__file__).parents[2] / "support"


class Parameter:
    def __init__(self, do_not_specialize: bool = False) -> None:
        self.do_not_specialize = do_not_specialize


class JitFunction:
    """Two tensors, a number of tokens, a stride and a factor; Triton is asked for it by a call."""

    params = (Parameter(), Parameter(), Parameter(do_not_specialize=True), Parameter(), Parameter(), Parameter())

    def __init__(self) -> None:
        def _kernel() -> None: ...

        self.fn, self.asked = _kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        def call(*args: Any, num_warps: int) -> None:
            self.asked += 1

        return call


KERNEL = JitFunction()
X, OUT = torch.zeros(8), torch.zeros(8)
ARGS, CONSTANTS = (X, None, OUT, 7, 2**40, 0.5), (128, True)
NAME = shipped.variant(KERNEL, ARGS, CONSTANTS, 2)
ENTRY = ("code.cubin", "_kernel", 64, 4096, [[0, "pointer"], [2, "pointer"], [3, "i32"], [4, "i64"], [5, "fp32"]], 2)


@pytest.fixture(name="machine")
def a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine()
    pretend_hopper(monkeypatch, machine)
    monkeypatch.setattr(launch_module, "_LAUNCHERS", {})
    monkeypatch.setattr(launch_module, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(KERNEL, "asked", 0)
    (tmp_path / "code.cubin").write_bytes(b"machine code")
    write_index(shipped.digest())
    shipped.index.cache_clear()
    yield machine
    shipped.index.cache_clear()


def write_index(digest: str) -> None:
    index = {"digest": digest, "variants": {NAME: ENTRY}}
    (Path(str(shipped.FOLDER)) / shipped.INDEX).write_text(json.dumps(index))


def test_a_carried_kernel_gets_its_arguments_and_triton_is_not_asked(machine: Machine) -> None:
    for _ in range(2):
        launch(KERNEL, (3, 2), ARGS, CONSTANTS, num_warps=2)
    launch(KERNEL, (0,), ARGS, CONSTANTS, num_warps=2)  # nothing
    want = ("at", X.data_ptr()), ("at", OUT.data_ptr()), 7, 2**40, 0.5, ("at", 0), ("at", 0)
    assert machine.launches == [("_kernel", (3, 2, 1), *want)] * 2
    assert KERNEL.asked == 0
    launch(KERNEL, (3, 2), (X, None, OUT, 8, 2**40, 0.25), CONSTANTS, num_warps=2)  # one code for all numbers of tokens
    assert machine.launches[2][4:7] == (8, 2**40, 0.25) and KERNEL.asked == 0


@pytest.mark.parametrize(
    ("args", "constants", "warps"),
    [
        ((X, OUT, OUT, 7, 2**40, 0.5), CONSTANTS, 2),
        ((X.bfloat16(), None, OUT, 7, 2**40, 0.5), CONSTANTS, 2),
        ((X[1:], None, OUT, 7, 2**40, 0.5), CONSTANTS, 2),
        ((X, None, OUT, 7, 2**40 + 1, 0.5), CONSTANTS, 2),
        ((X, None, OUT, 7, 1, 0.5), CONSTANTS, 2),
        ((X, None, OUT, 7, 16, 0.5), CONSTANTS, 2),
        ((X, None, OUT, 2**31, 2**40, 0.5), CONSTANTS, 2),
        (ARGS, (128, False), 2),
        (ARGS, CONSTANTS, 4),
    ],
)
def test_other_variants_are_triton_s(machine: Machine, args: Any, constants: Any, warps: int) -> None:
    launch(KERNEL, (1,), args, constants, num_warps=warps)
    assert KERNEL.asked == 1 and machine.launches == []


def test_what_may_not_fit_is_triton_s(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited sources, another GPU, a missing or damaged file, a driver that refuses: each alone."""

    def asked() -> bool:
        before = KERNEL.asked
        monkeypatch.setattr(launch_module, "_LAUNCHERS", {})
        shipped.index.cache_clear()
        launch(KERNEL, (1,), ARGS, CONSTANTS, num_warps=2)
        return KERNEL.asked > before

    def refuse(*_: Any) -> Any:
        raise LaunchError("an older driver")

    folder = Path(str(shipped.FOLDER))
    assert not asked()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        assert asked()
    with monkeypatch.context() as patch:
        patch.setattr(shipped.Kernel, "new_slots", refuse)
        assert asked()
    write_index("of other sources")
    assert asked()
    for damage in ("{", json.dumps({"digest": shipped.digest()}), "[]"):
        (folder / shipped.INDEX).write_text(damage)
        assert asked()
    write_index(shipped.digest())
    assert not asked()
    (folder / "code.cubin").unlink()
    assert asked()


@pytest.mark.slow
@pytest.mark.xdist_group("compiled triton kernels")
def test_what_make_wheel_compiles(tmp_path: Path) -> None:
    """Of a small layer: Triton compiles it with no GPU, and what it launches is in the index. In processes of their
    own, because this one may hold Triton's interpreter.
    """
    program = f"""
import pathlib, shipped_layers
from shipped_layers import Layer, compile_into, launches_of

if __name__ == "__main__":
    noted = [n for n in launches_of(Layer(256, 128, 4, 2)) if n.file in ("pick", "gather_sum")]
    assert len({{n.kernel for n in noted}}) == 2
    assert compile_into(pathlib.Path({str(tmp_path)!r}), noted) == len(noted)
"""
    script = tmp_path.parent / "program.py"
    script.write_text(program)
    src = Path(str(shipped.PACKAGE)).parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{src}:{SUPPORT}", "TRITON_CACHE_DIR": str(tmp_path.parent / "triton")}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    index = json.loads((tmp_path / shipped.INDEX).read_text())
    assert index["digest"] == shipped.digest()
    assert {name.split("(")[0] for name in index["variants"]} == {"pick._pick_kernel", "gather_sum._gather_sum_kernel"}
    for entry in index["variants"].values():
        assert (tmp_path / shipped.Entry(*entry).file).read_bytes()[:4] == b"\x7fELF"
