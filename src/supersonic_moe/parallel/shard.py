"""Expert weights as DTensors, so that checkpoints and optimizers see the whole layer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from supersonic_moe import checks


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Make the expert weights of every expert-parallel ``MoE`` of ``model`` DTensors of the whole layer, sharded by
    expert over ``mesh``: (E, N1, H) instead of (E/R, N1, H). Nothing is copied. Checkpoints of ``torch.distributed``
    then hold all experts, and load on another number of ranks.

    Args:
        mesh: one dimension, the ranks of the layers' ExpertParallel in the same order.

    Returns the new parameters: what DDP and FSDP2 must leave alone.
    """
    found: list[Any] = [m for m in model.modules() if getattr(m, "expert_parallel", None) is not None]
    if not found:
        raise ValueError(
            f"shard_experts needs a model with at least one MoE(..., expert_parallel=...); {type(model).__name__} has "
            "none."
        )
    sharded: list[nn.Parameter] = []
    for layer in found:
        checks.size("mesh", "ranks", mesh.size(), layer.expert_parallel.size, "those of the layer's ExpertParallel")
        for experts in (layer.c_fc, layer.c_proj):
            for name, parameter in list(experts.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    whole = DTensor.from_local(parameter.detach(), mesh, [Shard(0)], run_check=False)
                    parameter = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                    setattr(experts, name, parameter)
                sharded.append(parameter)
    return sharded
