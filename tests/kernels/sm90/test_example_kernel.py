"""The example of docs/adding-a-kernel.md: the page shows its files, they compile, and on a GPU they multiply."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import oracle
import pytest
import torch
from grouped_cases import CUDA, GROUPS, case, segments
from sass import compiled

pytest.importorskip("cuda.bindings.nvrtc")

from supersonic_moe.kernels.interface import Rows

FOLDER = Path(__file__).parent / "example"
PAGE = Path(__file__).parents[3] / "docs" / "adding-a-kernel.md"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("row_scaled_gemm", FOLDER / "row_scaled_gemm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_files() -> None:
    shown = re.findall(r"^```(?:cuda|python)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    files = [(FOLDER / f"row_scaled_gemm.{suffix}").read_text(encoding="utf-8") for suffix in ("cu", "py")]
    assert shown == files
    assert len(files[0].splitlines()) < 60


def test_it_compiles_without_spills() -> None:
    compiled(*example().SPECS)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_it_multiplies(counts: list[int]) -> None:
    offsets, (a,) = case(counts, 3, 136)
    b = torch.randn(len(counts), 264, 136, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)
    scale = torch.rand(a.shape[0], device=CUDA)
    got = example().row_scaled_mm(Rows(a), b, scale, offsets)
    for e, rows in segments(offsets):
        want = scale[rows, None].double() * (a[rows].double() @ b[e].double())
        assert rows.start == rows.stop or oracle.rel_fro(got[rows], want) < 3e-3, f"expert {e}"
