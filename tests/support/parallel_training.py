"""Training with expert parallelism beside data parallelism, and the same by one process, in fp64, or in fp32 with
experts in bf16.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_cases import E, H, I, K, error_of
from ranks import device
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from supersonic_moe import MoE
from supersonic_moe.parallel import ExpertParallel, shard_experts

STEPS, TOKENS = 20, 19
LIMIT = 0.1
"""Of the norm of all gradients, which is larger in every step."""


class Setting(NamedTuple):
    dtype: torch.dtype = torch.float64
    """Of weights."""
    bf16: bool = False
    """Whether products are in bf16."""
    top_k: int = K
    transport: Any = "auto"


EXACT = Setting()
ALL_EXPERTS = Setting(top_k=E)
BF16 = Setting(torch.float32, True, E, "gather")
"""All experts take part: a rounding would else choose others now and then, and training go another way."""


class Model(nn.Module):
    def __init__(self, ep: ExpertParallel | None = None, top_k: int = K) -> None:
        super().__init__()
        self.first = nn.Linear(H, H)
        self.moe = MoE(E, top_k, H, I, "swiglu", True, 0.3, expert_parallel=ep)
        self.last = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.moe(self.first(x))[0])
        return out


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(TOKENS + 3 * rank, H, generator=g, dtype=torch.float64)
    return x.to(device()), torch.randn(len(x), 3, generator=g, dtype=torch.float64).to(device())


def whole_model(how: Setting = EXACT) -> Model:
    torch.manual_seed(11)
    return Model(top_k=how.top_k).to(device(), how.dtype)


def loss_of(model: nn.Module, step: int, rank: int, how: Setting) -> Tensor:
    x, y = (t.to(how.dtype) for t in batch(step, rank))
    with torch.autocast(device().type, torch.bfloat16, enabled=how.bf16):
        out = model(x)
    loss: Tensor = (out.to(how.dtype) - y).square().mean()
    return loss


def trained_by_one(ranks: int, clips: bool = False, how: Setting = EXACT) -> Model:
    model = whole_model(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(STEPS):
        torch.stack([loss_of(model, step, rank, how) for rank in range(ranks)]).mean().backward()
        if clips:
            assert clip_grad_norm_(model.parameters(), LIMIT) > LIMIT
        optimizer.step()
        optimizer.zero_grad()
    return model


def spread_model(mesh: Any, divisor: int, how: Setting = EXACT) -> tuple[Model, list[nn.Parameter]]:
    sizes: dict[str, Any] = {"num_experts": E, "top_k": how.top_k, "hidden": H, "max_tokens": 64, "timeout_s": 60}
    model = Model(ExpertParallel(mesh, transport=how.transport, **sizes), how.top_k).to(device(), how.dtype)
    experts = shard_experts(model, mesh, gradient_divisor=divisor)
    whole = whole_model(how).state_dict()
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
    return model, experts


def averaged(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def clip(model: nn.Module, experts: list[nn.Parameter], limit: float) -> Tensor:
    """torch's ``clip_grad_norm_`` for DTensors of experts beside plain weights: a norm of each, then of both."""
    spread = set(experts)
    kinds = [p for p in model.parameters() if p in spread], [p for p in model.parameters() if p not in spread]
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    total = get_total_norm([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
    for kind in kinds:
        clip_grads_with_norm_(kind, limit, total)
    return total


def train(how: str) -> float:
    """The largest difference of any weight from that of one process, after training on all ranks in fp64."""
    got, want = trained(how, EXACT), trained_by_one(dist.get_world_size(), how == "ddp, clipped").state_dict()
    if not got:
        return 0.0
    assert got.keys() == want.keys() and want["moe.c_fc.weight"].shape[0] == E
    return max(float((got[name] - want[name]).abs().max()) for name in want)


def train_in_bf16() -> tuple[float, float]:
    """Beside FSDP2, through copies where there are any: how far what has been learned is from that of one process in
    fp64, in relation to it, with ranks and with one process in bf16.
    """
    ranks = dist.get_world_size()
    start, exact = whole_model(ALL_EXPERTS).state_dict(), trained_by_one(ranks, how=ALL_EXPERTS).state_dict()
    one, got = trained_by_one(ranks, how=BF16).state_dict(), trained("fsdp", BF16)

    def error(state: dict[str, Any]) -> float:
        off, all_of_it = (
            torch.cat([(of[name].double() - exact[name]).flatten() for name in exact]) for of in (state, start)
        )
        return float(off.norm() / all_of_it.norm())

    return (error(got), error(one)) if got else (0.0, 0.0)


def trained(how: str, setting: Setting) -> dict[str, Any]:
    """On rank 0 all weights after training on all ranks; nothing on others."""
    ranks = dist.get_world_size()
    whole_mesh = init_device_mesh(device().type, (ranks,))
    copies = 2 if how == "copies" else 1  # of each expert
    mesh = init_device_mesh(device().type, (copies, ranks // copies), mesh_dim_names=("copies", "ep"))
    model, experts = spread_model(mesh["ep"], 1 if how == "copies" else ranks, setting)
    forward: nn.Module = model
    if how in ("ddp", "ddp, clipped"):
        forward = DistributedDataParallel(model)
    elif how == "copies":
        router = model.moe.router.weight
        fully_shard(model.moe, mesh=mesh["copies"], ignored_params={router})
        router.register_hook(averaged)
        fully_shard(model, mesh=whole_mesh)
        for unit in (model.moe, model):
            unit.set_gradient_divide_factor(ranks)
            unit.set_force_sum_reduction_for_comms(True)
    else:
        fully_shard(model, mesh=whole_mesh, ignored_params=set(experts))
        model.set_gradient_divide_factor(ranks)
        model.set_force_sum_reduction_for_comms(True)  # gloo has no average
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    if how == "ddp, clipped":  # in groups of their own, loops of optimizers take both kinds
        others = [p for p in model.parameters() if p not in set(experts)]
        optimizer = torch.optim.SGD([{"params": experts}, {"params": others}], lr=0.2, foreach=True)
    for step in range(STEPS):
        loss_of(forward, step, dist.get_rank(), setting).backward()
        if how == "ddp, clipped":
            clip(model, experts, LIMIT)
        optimizer.step()
        optimizer.zero_grad()
    got: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.moe.expert_parallel.close()
    return {} if dist.get_rank() else got  # only rank 0 gets the whole


def plain_experts_in(how: str) -> str:
    """What a rank raises whose experts are no DTensors, in data parallelism over both ranks or over itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    ep = ExpertParallel(mesh, num_experts=E, top_k=K, hidden=H, max_tokens=64, timeout_s=60)
    model = Model(ep).double()
    before = model.moe.c_fc.weight.detach().clone()

    def step() -> None:
        forward: nn.Module = model
        if how == "ddp":
            forward = DistributedDataParallel(model)
        elif how == "ddp, each its own":
            groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
            forward = DistributedDataParallel(model, process_group=groups[dist.get_rank()])
        else:
            fully_shard(model, mesh=mesh)
        for _ in range(2):
            forward(batch(0, dist.get_rank())[0]).sum().backward()
        assert torch.equal(before, model.moe.c_fc.weight)

    found = error_of(step)
    ep.close()
    return found


def divisions() -> dict[str, float]:
    """How much larger gradients of experts are without a divisor of 2, after what models go through."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    x, y = batch(0, dist.get_rank())

    def gradient(model: Model) -> Tensor:
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        grads = [p.grad.to_local() for p in model.parameters() if isinstance(p.grad, DTensor)]
        assert len(grads) == 4
        return torch.cat([g.flatten() for g in grads])

    def loaded(model: Model) -> Model:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        return model

    def emptied(model: Model) -> Model:
        state = copy.deepcopy(model.state_dict())
        model.to("meta").to_empty(device="cpu").load_state_dict(state)
        return model

    def frozen(model: Model) -> Model:
        bare = Model(model.moe.expert_parallel).double().requires_grad_(False)
        shard_experts(bare, mesh, gradient_divisor=2)
        bare.load_state_dict(model.state_dict())
        return bare.requires_grad_(True)

    want, found = gradient(spread_model(mesh, 1)[0]), {}
    ways: dict[str, Any] = {
        "as it is": lambda model: model,
        "copied": copy.deepcopy,
        "converted": lambda model: model.float().double(),
        "assigned": loaded,
        "emptied": emptied,
        "frozen when sharded": frozen,
    }
    for name, way in ways.items():
        got = gradient(way(spread_model(mesh, 2)[0]))
        found[name] = float(want.norm() / got.norm())
    return found


def drawn() -> tuple[bool, float]:
    """On ranks that are seeded alike: whether sharded experts are drawn as others are, and a sum of what is drawn for
    those that FSDP2 shards, too.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "ep"))
    ep = ExpertParallel(mesh["ep"], num_experts=E, top_k=K, hidden=H, max_tokens=64, timeout_s=60)
    plain, sharded = Model(ep), Model(ep)
    shard_experts(sharded, mesh["ep"])

    def draw(model: nn.Module) -> Tensor:
        torch.manual_seed(3)
        model.moe.reset_parameters()
        weight = model.moe.c_fc.weight.detach()
        return weight.to_local().clone() if isinstance(weight, DTensor) else weight

    same = torch.equal(draw(plain), draw(sharded))
    ep.close()
    return same, float(draw(fully_shard(sharded, mesh=mesh["copies"])).sum())


def save(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    model, _ = spread_model(mesh, 1)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    model.moe.expert_parallel.close()


def load(folder: Path) -> bool:
    """Into another number of ranks: does each have the experts that it should?"""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    model, _ = spread_model(mesh, 1)
    with torch.no_grad():
        for p in model.parameters():
            (p.to_local() if isinstance(p, DTensor) else p).fill_(torch.nan)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    want, ep = whole_model().state_dict(), model.moe.expert_parallel
    ep.close()
    own = slice(ep.first_expert, ep.first_expert + ep.experts_here)
    return all(
        torch.equal(t.to_local(), want[name][own]) if isinstance(t, DTensor) else torch.equal(t, want[name])
        for name, t in model.state_dict().items()
    )
