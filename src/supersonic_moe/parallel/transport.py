"""Which way rows take between ranks, and why: ``ExpertParallel(transport=..., capacity=...)``."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.distributed as dist

from supersonic_moe.parallel.collectives import Collectives, Ranks
from supersonic_moe.parallel.copies import Copies, bank_of, shares
from supersonic_moe.parallel.push import Push
from supersonic_moe.parallel.symmetric import shared_memory
from supersonic_moe.parallel.traffic import share_of_ranks
from supersonic_moe.parallel.watch import Watch

TRANSPORTS = ("auto", "all_to_all", "gather", "push")
ENOUGH = 0.8
"""Share of tokens that a rank needs, from which on copies of all of them are faster than sending those: copy engines
reach 346 to 387 GB/s between two H200s where NCCL's all-to-all reaches 288, and nothing is packed or counted."""


class Transport(NamedTuple):
    name: Literal["all_to_all", "gather", "push"]
    ranks: Ranks
    why: str
    """How rows travel, in words."""


def choose(
    wanted: str,
    collectives: Collectives,
    watch: Watch,
    *,
    num_experts: int,
    top_k: int,
    places: int,
    row_bytes: int,
    largest_bank: int | None,
) -> Transport:
    """The same on every rank; collective. ``places`` and ``row_bytes`` are the most that a rank sends to another one in
    a call; with ``wanted="auto"``, places are ``max_tokens``. ``largest_bank``: bytes of one of the two buffers that
    copies go through, at most.
    """
    group = collectives.group
    size, backend = dist.get_world_size(group), dist.get_backend(group)
    over = f"by collectives of torch.distributed ({backend}), on any number of nodes"
    if wanted == "all_to_all":
        return Transport("all_to_all", collectives, over)
    share = share_of_ranks(num_experts, top_k, size)
    if wanted == "auto" and share < ENOUGH:
        why = f"a rank needs {share:.0%} of the tokens of another, below {ENOUGH:.0%}: sending all would take longer"
        return Transport("all_to_all", collectives, f"{over}; {why}")
    bank = bank_of(size, places, row_bytes, largest_bank)
    found = shared_memory(group, 2 * bank, watch.limit_s)
    if isinstance(found, str):
        if wanted == "push":
            why = f"instead of push, {over}; kernels do not write to other GPUs: {found}"
        else:
            why = f"{over}; no copies between GPUs: {found}"
        return Transport("all_to_all" if wanted == "auto" else "gather", collectives, why)
    watch.flags = found.flags
    push = wanted == "push"
    how = "kernels that write what is needed to" if push else "copies between"
    copies = (Push if push else Copies)(found, dist.get_rank(group), places, row_bytes, bank, watch, collectives)
    why = f"by {how} GPUs that reach each other's memory, through {2 * bank / 1e6:.3g} MB on each"
    if len(of_widest := shares(places, row_bytes, size, bank)) > 1:
        why += f"; the widest rows go in {len(of_widest)} exchanges, {of_widest[0].stop} of a rank at a time"
    return Transport("push" if push else "gather", copies, why)
