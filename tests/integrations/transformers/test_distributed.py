"""The library's own plans for expert, tensor and data parallelism with two processes on a CPU: logits and every
gradient are those of one process.
"""

from __future__ import annotations

from pathlib import Path

import distributed_plans
import pytest
import torch
from ranks import run_ranks
from transformers_models import model_of, tokens, with_gradients


@pytest.mark.skipif(torch.cuda.is_available(), reason="the library would put the model on the GPUs")
def test_two_processes_are_one(tmp_path: Path) -> None:
    for family in {family for family, _ in distributed_plans.CASES}:
        model = model_of(family)
        model.save_pretrained(tmp_path / family)
        torch.save(with_gradients(model, "eager", tokens()), tmp_path / f"{family}.pt")
    for found in run_ranks(2, distributed_plans.compare, str(tmp_path), timeout_s=240):
        assert [result["case"] for result in found] == distributed_plans.CASES
        for result in found:
            case = result["case"]
            assert result["served"] and all(result["served"]), case
            assert result["sharded"] >= 2, case
            assert {name: error for name, error in result["errors"].items() if not error < 2e-5} == {}, case
