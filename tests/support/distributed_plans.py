"""Run by two processes: models under the library's own plans for tensor, expert and data parallelism, on a CPU.

    python distributed_plans.py FOLDER      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

FOLDER/<family> is a saved model and FOLDER/<family>.pt what one process found for it. Prints a JSON line for each case:
layers of experts that are served, and relative errors of the logits and of every gradient.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import rel_fro
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers_models import tokens

from supersonic_moe.integrations.transformers import served

CASES = [
    *((family, "expert parallelism", {"tp_size": 2, "enable_expert_parallel": True})
      for family in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")),
    *((family, "tensor parallelism", {"tp_size": 2}) for family in ("mixtral", "qwen3_moe")),
    *((family, "FSDP2", {"fsdp_size": 2}) for family in ("mixtral", "gpt_oss")),
]  # fmt: skip


def whole(tensor: Any) -> torch.Tensor:
    """Of all processes: a collective call."""
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ids = tokens()
    for family, plan, sizes in CASES:
        model = AutoModelForCausalLM.from_pretrained(
            folder / family,
            dtype=torch.float32,
            distributed_config=DistributedConfig(**sizes),
            experts_implementation="supersonic",
        )
        found = model(ids, labels=ids)
        found.loss.backward()
        wanted = torch.load(folder / f"{family}.pt")
        got = {"logits": whole(found.logits), "loss": whole(found.loss)}
        got |= {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        errors = {name: rel_fro(got[name].detach(), wanted[name]) for name in wanted}
        sharded = [name for name, p in model.named_parameters() if "experts." in name and hasattr(p, "full_tensor")]
        if dist.get_rank() == 0:
            layers = [layer.served for layer in served(model)]
            print(json.dumps({"case": [family, plan], "served": layers, "sharded": len(sharded), "errors": errors}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
