"""``bench exchange`` on ranks as torchrun starts them, on a CPU: over memory that processes share, or with errors."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from command_line import QUICK, outcome
from torch import Tensor
from virtual_ranks import ThreadFlags

from supersonic_moe.bench import exchange, exchange_ranks
from supersonic_moe.parallel.symmetric import HEAD, Memory


def measured(*args: str) -> tuple[int, str]:
    """Exit code and output."""
    return outcome("bench", "exchange", *QUICK, *args)


def on_gpus(*args: str) -> tuple[int, str]:
    return outcome("bench", "exchange", *args)


def with_memory(folder: Path, *args: str) -> tuple[int, str]:
    """Over files of ``folder`` in place of memory of GPUs that reach each other."""
    exchange_ranks.shared_memory = partial(_files, folder)  # type: ignore[assignment]
    return measured(*args)


def _files(folder: Path, group: dist.ProcessGroup, size: int, limit_s: float) -> Memory:
    rank, paths = dist.get_rank(group), [folder / str(r) for r in range(dist.get_world_size(group))]

    def of(path: Path) -> Tensor:
        return torch.from_file(str(path), shared=True, size=HEAD + size, dtype=torch.uint8)

    of(paths[rank])
    dist.barrier(group)  # all files are there
    blocks = [of(path) for path in paths]
    return Memory(blocks, ThreadFlags(blocks, rank, limit_s), None)  # type: ignore[arg-type]


def wrong_on(rank: int, folder: Path, *args: str) -> tuple[int, str]:
    """With a rank whose copies leave out a byte."""
    if int(os.environ["RANK"]) == rank:
        whole = exchange_ranks.by_copy_engines
        exchange_ranks.by_copy_engines = lambda to, source, times: whole(to[1:], source[1:], times)
    return with_memory(folder, *args)


def stuck_on(rank: int, *args: str) -> tuple[int, str]:
    """With a rank that never has operands of the product."""
    exchange.LIMIT_S = 2.0
    if int(os.environ["RANK"]) == rank:
        exchange_ranks.Runner._product = _stay  # type: ignore[method-assign]
    return measured(*args)


def _stay(*args: Any) -> Any:
    time.sleep(60)
