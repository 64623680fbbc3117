"""Memory of each rank's GPU that all ranks of a group reach, if there is such: one NVLink domain, a GPU for each rank.

It is torch's symmetric memory, whose API may change: ``private_api`` alone touches it, and this file alone calls that.
Only plain loads, stores and copies are used, no multicast, none of torch's signals.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from supersonic_moe.kernels.sm90.exchange_flags import MAX_RANKS, WORDS, ExchangeFlags
from supersonic_moe.private_api import has_symmetric_memory, symmetric_block, symmetric_views

HEAD = 1024
"""Bytes of a block in front of its data, for flags and, last, the number of its rank."""
assert 8 * (WORDS + 1) <= HEAD


class Memory(NamedTuple):
    blocks: list[Tensor]
    """uint8, of each rank: those of others are their memory, as this GPU reads and writes it."""
    flags: ExchangeFlags
    owner: Any
    """What has to live as long as the blocks are used."""
    apart: bool = True
    """Each block is of another GPU, so that copy engines carry what goes from one to another. Copies within a GPU need
    its multiprocessors: there nothing is copied beside products, and no product waits for rows.
    """


class _Owner:
    """Of memory that ranks share."""


def owner_of(parts: Sequence[Any], device: torch.device) -> Any:
    """What keeps ``parts`` as long as it lives, and for ever if the GPU has failed by then: torch waits for the GPU
    before it frees memory that ranks share, and an error there ends the process before anyone reads the one that it has
    raised.
    """
    owner = _Owner()
    weakref.finalize(owner, _let_go, parts, device)
    return owner


def _let_go(parts: Sequence[Any], device: torch.device) -> None:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        for part in parts:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))


def shared_memory(group: dist.ProcessGroup, size: int, limit_s: float) -> Memory | str:
    """HEAD + ``size`` bytes of each rank of ``group``, with flags of zero; or why there are none, the same on every
    rank. Collective.
    """
    rank = dist.get_rank(group)
    if "nccl" not in (backend := dist.get_backend_config(group)):
        return f"the group runs over {backend}, not over NCCL"
    if (obstacle := _agreed(_obstacle(group), group)) is not None:
        return obstacle
    device = torch.device("cuda", torch.cuda.current_device())
    mine: Tensor | None = None
    failed = None
    try:
        mine = symmetric_block(HEAD + size, device)
    except RuntimeError as error:
        failed = f"{(HEAD + size) / 1e6:.3g} MB of symmetric memory were refused: {_first_line(error)}"
    if (failed := _agreed(failed, group)) is not None:
        return failed
    assert mine is not None
    blocks, handle = list[Tensor](), None
    try:
        blocks, handle = symmetric_views(mine, group)
        mine[:HEAD].zero_()
        mine[HEAD - 1] = rank
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        failed = f"GPUs do not reach each other's memory: {_first_line(error)}"
    if (failed := _agreed(failed, group)) is not None:  # all have written theirs before any looks
        return failed
    found = [int(block[HEAD - 1]) for block in blocks]
    if found != list(range(len(blocks))):
        failed = f"memory of other GPUs is not where torch says: instead of all ranks, rank {rank} found {found}"
    if (failed := _agreed(failed, group)) is not None:
        return failed
    owner = owner_of((mine, handle, *blocks), device)
    return Memory(blocks, ExchangeFlags(blocks, rank, limit_s), owner)


def _obstacle(group: dist.ProcessGroup) -> str | None:
    """Why this rank cannot take part."""
    here = _uuid(torch.cuda.current_device()) if torch.cuda.is_available() else ""
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, here, group=group)
    if len(places) > MAX_RANKS:
        return f"a group of {len(places)} ranks is larger than {MAX_RANKS}"
    if not here or torch.cuda.get_device_capability() != (9, 0):
        return "flags between GPUs are compiled for compute capability 9.0"
    if not has_symmetric_memory():
        return f"torch {torch.__version__} has no symmetric memory"
    rank = dist.get_rank(group)
    visible = {_uuid(i): i for i in range(torch.cuda.device_count())}
    for peer, place in enumerate(places):
        if peer == rank:
            continue
        if place == here:
            return f"ranks {min(rank, peer)} and {max(rank, peer)} share a GPU"
        if place not in visible:
            return f"rank {rank} does not see the GPU of rank {peer}: another host, or CUDA_VISIBLE_DEVICES hides it"
        if not torch.cuda.can_device_access_peer(visible[here], visible[place]):
            return f"the GPU of rank {rank} cannot read that of rank {peer} (`supersonic-moe doctor` shows the matrix)"
    return None


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _agreed(obstacle: str | None, group: dist.ProcessGroup) -> str | None:
    """The first obstacle of any rank. Nobody returns before all have come."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, obstacle, group=group)
    return next((one for one in found if one is not None), None)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
