"""What two processes run: models under the library's own plans for tensor, expert and data parallelism."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import rel_fro
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers_models import tokens

from supersonic_moe.integrations.transformers import served

PLANS = {
    "expert parallelism": {"tp_size": 2, "enable_expert_parallel": True},
    "tensor parallelism": {"tp_size": 2},
    "FSDP2": {"fsdp_size": 2},
}
CASES = [
    *((family, "expert parallelism") for family in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")),
    *((family, "tensor parallelism") for family in ("mixtral", "qwen3_moe")),
    *((family, "FSDP2") for family in ("mixtral", "gpt_oss")),
]


def whole(tensor: Any) -> torch.Tensor:
    """Of all processes: a collective call."""
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach()


def compare(folder: str) -> list[dict[str, Any]]:
    """For each case, of the model in ``folder``/<family> with what one process found for it in ``folder``/<family>.pt:
    layers that are served, how many expert weights are sharded, relative errors of logits, loss and every gradient.
    """
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}  # the library asks
    ids, results = tokens(), []
    for family, plan in CASES:
        model = AutoModelForCausalLM.from_pretrained(
            Path(folder) / family,
            dtype=torch.float32,
            distributed_config=DistributedConfig(**PLANS[plan]),
            experts_implementation="supersonic",
        )
        found = model(ids, labels=ids)
        found.loss.backward()
        wanted = torch.load(Path(folder) / f"{family}.pt")
        got = {"logits": whole(found.logits), "loss": whole(found.loss)}
        got |= {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        sharded = [name for name, p in model.named_parameters() if "experts." in name and hasattr(p, "full_tensor")]
        errors = {name: rel_fro(got[name], wanted[name]) for name in wanted}
        layers = [layer.served for layer in served(model)]
        results.append({"case": (family, plan), "served": layers, "sharded": len(sharded), "errors": errors})
    return results
