"""Every sm_90 kernel under compute-sanitizer: no access out of bounds, no race in shared memory, no misused barrier."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("large on a GPU")]  # the tool keeps a record of all memory

TOOL = shutil.which("compute-sanitizer") or next(
    (str(path) for path in [Path("/usr/local/cuda/bin/compute-sanitizer")] if path.is_file()), None
)


@pytest.mark.timeout(600)
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_kernels_are_clean(check: str) -> None:
    assert TOOL is not None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    quiet = ["--report-api-errors", "no"] if check == "memcheck" else []  # the driver is asked for symbols it lacks
    command = [TOOL, "--tool", check, *quiet, "--error-exitcode", "9", sys.executable, "-m", "sanitized_cases", check]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    report = run.stdout + run.stderr
    assert "all cases ran" in report, report[-4000:]
    assert run.returncode == 0, report[-4000:]
