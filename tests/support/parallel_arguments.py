"""Arguments of expert parallelism of the wrong kind, each on all ranks: what each says. And what right ones do."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import parallel_cases as cases
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from supersonic_moe import Bf16Recipe, Fp8Recipe, MoE
from supersonic_moe.parallel import ExpertParallel, fp8_wire, shard_experts
from supersonic_moe.parallel.collectives import name_of


def layer(expert_parallel: Any) -> MoE:
    return MoE(cases.E, cases.K, cases.H, cases.I, "swiglu", False, 0.02, expert_parallel=expert_parallel)


def errors_of_groups() -> list[str]:
    """A layer of a group, a group of other ranks."""
    outside = [dist.new_group([rank]) for rank in range(2)][1 - dist.get_rank()]
    return [
        cases.error_of(lambda: layer(dist.group.WORLD)),
        cases.error_of(lambda: layer(2)),
        cases.error_of(lambda: cases.ExpertParallel(outside, num_experts=8, top_k=2, hidden=64, max_tokens=8)),
    ]


def errors_of_meshes() -> list[str]:
    """A group in the place of a mesh; meshes of other dimensions, in another order; the right one; then a layer whose
    experts lie in another module.
    """
    size = dist.get_world_size()
    model = layer(ep := cases.make())
    meshes = (
        dist.group.WORLD,
        init_device_mesh("cpu", (size, 1), mesh_dim_names=("ep", "tp")),
        DeviceMesh("cpu", list(reversed(range(size)))),
        init_device_mesh("cpu", (size,)),
    )
    found = [cases.error_of(lambda mesh=mesh: shard_experts(model, mesh)) for mesh in meshes]
    model.c_fc = torch.nn.Sequential(model.c_fc)
    found.append(cases.error_of(lambda: shard_experts(model, meshes[-1])))
    ep.close()
    return found


def errors_of_handles() -> list[str]:
    """What dispatch returned in the place of its handle, no handle, the right one; then a sparse x."""
    ep = cases.make()
    ids = torch.arange(cases.K).expand(3, cases.K)
    got = ep.dispatch(torch.ones(3, cases.H), ids, torch.ones(3, cases.K))
    found = [cases.error_of(lambda h=h: ep.combine(got.x, h)) for h in (got, None, got.handle)]
    found.append(cases.error_of(lambda: ep.dispatch(got.x.to_sparse(), ids, torch.ones(3, cases.K))))
    ep.close()
    return found


def errors_of_routers() -> list[str]:
    """A router's weight in another dtype than x, a router of another number of experts; and the right one."""
    model, x = layer(ep := cases.make()), torch.ones(3, cases.H)
    right = model.router
    found = []
    for router in (copy.deepcopy(right).double(), torch.nn.Sequential(torch.nn.Linear(cases.H, cases.E + 1)), right):
        model.router = router
        found.append(cases.error_of(lambda: model(x)))
    ep.close()
    return found


def errors_of_wires() -> list[list[str]]:
    """Of experts that do not fit each other or x, over each wire; then of right ones."""
    x, w1, w2 = torch.randn(5, 128).bfloat16(), torch.randn(4, 256, 128).bfloat16(), torch.randn(4, 128, 128).bfloat16()
    ids, scores = torch.arange(15).view(5, 3) % 8, torch.rand(5, 3)
    calls: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = [
        (w1, w2[:, :64].contiguous(), {}),
        (w1, w2[:, :, :64].contiguous(), {}),
        (w1.float(), w2, {}),
        (w1, w2, {"b1": x}),
        (w1, w2, {"b2": x[:3]}),
        (w1, w2, {"activation": "silu"}),
        (w1, w2, {"backend": "cublas"}),
        (w1, w2, {}),
    ]
    found = []
    for wire in ("exact", "fp8"):
        ep = cases.make(wire=wire, hidden=128)
        found.append([])
        for w1, w2, options in calls:
            call = functools.partial(ep.experts, x, ids, scores, w1, w2, recipe=Fp8Recipe(scale="pow2"), **options)
            found[-1].append(cases.error_of(call))
        ep.close()
    return found


def errors() -> tuple[list[str], ...]:
    return errors_of_groups(), errors_of_meshes(), errors_of_handles(), errors_of_routers()


def warnings_of_steps() -> dict[str, list[str]]:
    """What Python warns of in a step, forward and backward, of each way."""
    found = {}
    tokens = [3] * dist.get_world_size()
    for name, way in {"exact": {}, "capacity": {"capacity": 8}, "gather": {"transport": "gather"}}.items():
        ep = cases.make(**way)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cases.run(ep, cases.here(cases.inputs(tokens, torch.float32), tokens))
        ep.close()
        found[name] = [str(w.message) for w in caught]
    return found


def explanations() -> list[str]:
    """Of each way, for ranks without a name of their own."""
    ranks = dist.new_group()
    said = []
    for way in ({}, {"capacity": 512}, {"capacity": 64}, {"transport": "gather"}, {"transport": "push"}):
        ep = ExpertParallel(ranks, num_experts=8, top_k=2, hidden=64, max_tokens=512, **way)  # type: ignore[arg-type]
        said.append(ep.explain())
        ep.close()
    return [*said, name_of(ranks)]


def wires_of_auto() -> list[bool]:
    """Whether ``wire="auto"`` sends e4m3, for four kinds of layers."""
    used: list[bool] = []
    ep, experts = cases.make(wire="auto", hidden=128), fp8_wire.experts

    def recorded(*args: Any, **how: Any) -> Any:
        used[-1] = True
        return experts(*args, **how)

    fp8_wire.experts = recorded
    x, w1, w2 = torch.randn(5, 128), torch.randn(4, 256, 128), torch.randn(4, 128, 128)
    ids, scores = torch.arange(15).view(5, 3) % 8, torch.rand(5, 3)
    recipes = (Fp8Recipe(scale="pow2"), Fp8Recipe(), Fp8Recipe(scale="pow2", wgrad="bf16"), Bf16Recipe())
    for recipe in recipes:
        used.append(False)
        ep.experts(x.bfloat16(), ids, scores, w1.bfloat16(), w2.bfloat16(), recipe=recipe)
    fp8_wire.experts = experts
    ep.close()
    return used
