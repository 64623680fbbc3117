"""``parallel.symmetric`` and copies between two processes without a GPU: CUDA is pretended, symmetric memory is a file
that both have mapped, and flags are those of ``virtual_ranks.ThreadFlags``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parallel_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from virtual_ranks import ThreadFlags

from supersonic_moe.parallel import symmetric

CALLS = [((33, 7), torch.bfloat16, routing, True) for routing in ("random", "masked", "nobody")]


def two_gpus(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """What this process, one of two, sees of a host where GPUs reach each other."""
    rank = dist.get_rank()

    def block(size: int, device: torch.device) -> Tensor:
        assert device == torch.device("cuda", rank)
        return torch.from_file(str(folder / str(rank)), shared=True, size=size, dtype=torch.uint8)

    def views(mine: Tensor, group: dist.ProcessGroup) -> tuple[list[Tensor], Any]:
        dist.barrier(group)  # all files are there
        size = mine.shape[0]
        others = [torch.from_file(str(folder / str(r)), shared=True, size=size, dtype=torch.uint8) for r in range(2)]
        return [mine if r == rank else other for r, other in enumerate(others)], None

    patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: rank)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    patch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one != other)
    patch.setattr(torch.cuda, "synchronize", lambda device: None)
    patch.setattr(symmetric, "symmetric_block", block)
    patch.setattr(symmetric, "symmetric_views", views)
    patch.setattr(symmetric, "ExchangeFlags", ThreadFlags)


@contextmanager
def copies_through(folder: Path) -> Iterator[list[str]]:
    """What ``cases.make`` makes finds two GPUs then, and nothing else does: rows are copied through files, products are
    of the CPU. What the objects say of themselves.
    """
    make, numbers, said = cases.make, itertools.count(), list[str]()

    def of_two_gpus(**changes: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            (place := folder / str(next(numbers))).mkdir(exist_ok=True)
            two_gpus(patch, place)
            made = make(**changes)
        said.append(made.explain())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "make", of_two_gpus)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        yield said


def same_as_one_process(folder: Path, transport: str) -> tuple[list[str], list[str]]:
    """What a layer over such copies says of itself, and where it has other bits than one process."""
    with copies_through(folder) as said:
        return said, cases.same_as_one_process(CALLS, {"transport": transport})


def obstacles(folder: Path) -> list[str]:
    """Why there is no such memory, where something is missing on rank 1 alone."""
    found = []
    for change in (_one_gpu, _hidden, _older, _no_peers, _no_torch, _no_memory, _no_views, _elsewhere):
        with pytest.MonkeyPatch.context() as patch:
            two_gpus(patch, folder)
            if dist.get_rank() == 1 or change is _one_gpu:
                change(patch)
            found.append(str(symmetric.shared_memory(dist.group.WORLD, 4096, 1.0)))
    return found


def _one_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU-0"))


def _hidden(patch: pytest.MonkeyPatch) -> None:
    names = {0: "GPU-7", 1: "GPU-1"}
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=names[index]))


def _older(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))


def _no_peers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: False)


def _no_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(symmetric, "has_symmetric_memory", lambda: False)


def _no_memory(patch: pytest.MonkeyPatch) -> None:
    def refused(size: int, device: torch.device) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    patch.setattr(symmetric, "symmetric_block", refused)


def _no_views(patch: pytest.MonkeyPatch) -> None:
    views = symmetric.symmetric_views

    def failing(mine: Tensor, group: dist.ProcessGroup) -> Any:
        views(mine, group)
        raise RuntimeError("no such handle")

    patch.setattr(symmetric, "symmetric_views", failing)


def _elsewhere(patch: pytest.MonkeyPatch) -> None:
    views = symmetric.symmetric_views
    patch.setattr(symmetric, "symmetric_views", lambda mine, group: (views(mine, group)[0][::-1], None))
