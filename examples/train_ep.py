"""The model of `make demo` with its experts spread over ranks, trained beside data parallelism.

    torchrun --nproc-per-node 2 examples/train_ep.py                 two processes, gloo on CPUs or NCCL on GPUs
    torchrun --nproc-per-node 2 examples/train_ep.py --check         and the same by one process: is the loss equal?

Every rank reads its own half of each batch; experts see the tokens of all ranks. What it takes:

1. an ExpertParallel of the group, and `expert_parallel=` for each MoE;
2. `shard_experts`: DDP leaves experts alone, and their gradients, sums over all ranks, are divided as the others are;
3. the same initial weights everywhere, loaded from a whole model, experts by shard.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from supersonic_moe.demo.data import sample_batch, split, standard_library
from supersonic_moe.demo.model import ByteTransformer, ModelConfig
from supersonic_moe.parallel import ExpertParallel, shard_experts

SEED, BATCH = 0, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--check", action="store_true", help="train one process as well, and compare the losses")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if "RANK" not in os.environ:
        parser.error("torchrun starts the processes; see above")

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = ModelConfig(context=128, hidden=128, layers=2, experts=8, intermediate=128)
    text = split(standard_library(), train_bytes=1 << 20, held_out_bytes=1 << 16).train

    torch.manual_seed(SEED)
    whole = ByteTransformer(config).to(device)
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("ep",))
    ep = ExpertParallel(
        mesh["ep"],
        num_experts=config.experts,
        top_k=config.experts_per_token,
        hidden=config.hidden,
        max_tokens=BATCH * config.context,
    )
    model = ByteTransformer(config, ep).to(device)
    shard_experts(model, mesh["ep"], gradient_divisor=ranks)
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))

    losses = train(DistributedDataParallel(model), text, arguments.steps, rank, ranks)
    if rank == 0:
        print(ep.explain())
        for step, loss in enumerate(losses):
            print(f"step {step:3d}  loss {loss:.4f}")
    if arguments.check:
        alone = train(whole, text, arguments.steps, 0, 1)
        worst = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
        if rank == 0:
            print(f"largest difference from one process: {worst:.1e}")
        if worst > 1e-3:
            raise SystemExit(f"rank {rank}: the loss is not that of one process")
    ep.close()
    dist.destroy_process_group()


def train(model: nn.Module, text: Tensor, steps: int, rank: int, ranks: int) -> list[float]:
    """The loss of each step, over the whole batch, of which this rank reads its share of ``ranks``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    generator = torch.Generator().manual_seed(SEED)
    device = next(model.parameters()).device
    losses = []
    model.train()
    for _ in range(steps):
        batch_BL = sample_batch(text, BATCH, 128, generator).tensor_split(ranks)[rank].to(device)
        logits_BLV, _ = model(batch_BL[:, :-1])
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), batch_BL[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    return losses


if __name__ == "__main__":
    main()
