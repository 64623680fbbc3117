"""Expert weights beside data parallelism: DTensors of the whole layer, out of the way of DDP and FSDP2.

    shard_experts(model, mesh["ep"], gradient_divisor=D)          then one of

    DistributedDataParallel(model)
    fully_shard(model, mesh=..., ignored_params=set(experts))     ``experts``: what ``shard_experts`` returned

The gradient of an expert is a sum over the tokens of all R ranks of its group. Data parallelism averages everything
else over the D ranks that have tokens of their own, so that each loss counts 1/D: ``gradient_divisor=D`` does the same
to experts. Where D > R, several ranks hold the same experts, and their gradients are to be added up besides.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from supersonic_moe import checks
from supersonic_moe.private_api import ignored_by_ddp


def shard_experts(model: nn.Module, mesh: DeviceMesh, *, gradient_divisor: int = 1) -> list[nn.Parameter]:
    """Make the expert weights of every expert-parallel ``MoE`` of ``model`` DTensors of the whole layer, sharded by
    expert over ``mesh``: (E, N1, H) instead of (E/R, N1, H). Nothing is copied. Checkpoints of
    ``torch.distributed.checkpoint`` then hold all experts, and load on another number of ranks.

    Args:
        mesh: one dimension, the ranks of the layers' ExpertParallel in the same order.
        gradient_divisor: what gradients of experts are divided by. ``c_fc`` and ``c_proj`` keep it, so copies of the
            model divide, too, and what ``.to()`` or a checkpoint puts in the place of a weight. Layers whose weights
            are sharded already keep what they have.

    Returns the new parameters. DDP of ``model`` will leave them alone; FSDP2 does if they are its ``ignored_params``.
    Not for layers with ``accumulate_into_main_grad``, whose backward refuses DTensors.
    """
    checks.positive("gradient_divisor", gradient_divisor)
    layers = {name: m for name, m in model.named_modules() if getattr(m, "expert_parallel", None) is not None}
    if not layers:
        raise ValueError(
            f"shard_experts needs a model with at least one MoE(..., expert_parallel=...); {type(model).__name__} has "
            "none."
        )
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f'mesh must be a DeviceMesh; got {checks.describe(mesh)}. Make one with init_device_mesh("cuda", (ranks,), '
            'mesh_dim_names=("ep",)).'
        )
    sharded: dict[str, nn.Parameter] = {}
    for path, module in layers.items():
        layer: Any = module
        ranks = dist.get_process_group_ranks(layer.expert_parallel.group)
        checks.size("mesh", "ranks", mesh.mesh.tolist(), ranks, "those of the layer's ExpertParallel, in one dimension")
        for projection in ("c_fc", "c_proj"):
            experts = getattr(layer, projection)
            if not hasattr(experts, "gradient_divisor"):
                raise TypeError(
                    f"{'.'.join(filter(None, (path, projection)))} must be what the MoE was made with; got "
                    f"{type(experts).__name__}. Shard experts before anything replaces it."
                )
            for name, parameter in list(experts.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    parameter = _whole(parameter, mesh)
                    experts.register_parameter(name, parameter)
                    experts.gradient_divisor = gradient_divisor
                sharded[".".join(filter(None, (path, projection, name)))] = parameter
    ignored_by_ddp(model, list(sharded))
    return list(sharded.values())


def _whole(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    whole = DTensor.from_local(parameter.detach(), mesh, [Shard(0)], run_check=False)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
