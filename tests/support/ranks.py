"""Several processes on this machine that form a group of ``torch.distributed``.

    run_ranks(4, some_module.function, "argument")      [function("argument") of rank 0, of rank 1, ...]

By default over gloo with tensors on the CPU; ``backend="nccl"`` gives each rank a GPU, ``gpu=True`` lets them share
those that there are, over gloo.

The function lies in a module that a fresh process can import: in tests/support. Ranks are forked from a server that has
imported it (forks.py). This process holds the store, as torchrun's agent does, so it outlives a rank that dies.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from forks import context

_device = torch.device("cpu")


def device() -> torch.device:
    """Where the tensors of this rank are."""
    return _device


class Ended(NamedTuple):
    """How a rank ended."""

    result: Any
    """What the function returned; None if it did not."""
    error: str
    """Its traceback, if it raised."""
    exit_code: int | None
    """None: still there when time was up."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any, **where: Any) -> list[Any]:
    """What ``function(*args)`` returns on each rank, in a process group of all; an AssertionError if one raised."""
    ended = end_ranks(size, function, *args, **where)
    errors = [f"rank {rank} (exit code {e.exit_code}): {e.error}" for rank, e in enumerate(ended) if e.exit_code != 0]
    assert not errors, "\n".join(errors)
    return [e.result for e in ended]


def end_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    gpu: bool = False,
    timeout_s: float = 120,
) -> list[Ended]:
    """How each rank ended, however it did; none is left after ``timeout_s``."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        receive, send = context.Pipe(duplex=False)
        place = (rank, size, store.port, backend, gpu or backend == "nccl")
        process = context.Process(target=_rank, args=(*place, send, function, args), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    ended, end = [], time.monotonic() + timeout_s
    for pipe, process in zip(pipes, processes, strict=True):
        result, error = None, ""
        if pipe.poll(max(0.0, end - time.monotonic())):
            try:
                result, error = pipe.recv()
            except EOFError:
                error = "died without a word"
        process.join(max(0.5, end - time.monotonic()))
        ended.append(Ended(result, error, process.exitcode))
        if process.exitcode is None:
            process.kill()
    return ended


def _rank(
    rank: int,
    size: int,
    port: int,
    backend: str,
    gpu: bool,
    send: Connection,
    function: Callable[..., Any],
    args: Any,
) -> None:
    global _device
    torch.set_num_threads(1)
    if gpu:
        _device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(_device)
    store = dist.TCPStore("127.0.0.1", port, None, False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        send.send((function(*args), ""))
        code = 0
    except BaseException:
        send.send((None, traceback.format_exc()))
        code = 1
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        os._exit(code)
