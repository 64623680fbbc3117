"""The library's own plans for expert, tensor and data parallelism with two processes on a CPU: logits and every
gradient are those of one process.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_plans
import pytest
import torch
from transformers_models import model_of, tokens, with_gradients

ROOT = Path(__file__).parents[3]


def test_two_processes_are_one(tmp_path: Path) -> None:
    for family in {family for family, *_ in distributed_plans.CASES}:
        model = model_of(family)
        model.save_pretrained(tmp_path / family)
        torch.save(with_gradients(model, "eager", tokens()), tmp_path / f"{family}.pt")
    found = {tuple(line["case"]): line for line in run_two(tmp_path)}
    assert set(found) == {(family, plan) for family, plan, _ in distributed_plans.CASES}
    for case, line in found.items():
        assert line["served"] and all(line["served"]), case
        assert line["sharded"] >= 2, case
        assert {name: error for name, error in line["errors"].items() if not error < 2e-5} == {}, case


def run_two(folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, distributed_plans.__file__, str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        pytest.fail("\n".join(err[-3000:] for _, err in outputs))
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]
