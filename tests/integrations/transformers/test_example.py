"""The example trains: a loss that falls, in FP8, and a speed."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "finetune_transformers.py"


def test_finetune_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    arguments = ["--experts", "supersonic_fp8", "--steps", "6", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    found = re.search(r"loss ([\d.]+) -> ([\d.]+) nats a byte, [\d,]+ tokens/s", printed)
    assert found, printed
    assert float(found[2]) < float(found[1]) < 6
    assert "the fused layer in FP8" in printed
