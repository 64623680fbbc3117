"""examples/train_ep.py as its first lines say to run it: the loss is that of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_has_the_loss_of_one_process() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "examples/train_ep.py"), "--steps", "4", "--check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "8 experts over 2 ranks, 4 on each" in run.stdout
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss ([\d.]+)", run.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
