"""Several processes on this machine that form a group of ``torch.distributed``.

    run_ranks(4, some_module.function, "argument")      [function("argument") of rank 0, of rank 1, ...]

By default over gloo with tensors on the CPU; ``backend="nccl"`` gives each rank a GPU, ``gpu=True`` lets them share
those that there are, over gloo. ``backend=None`` leaves the group to the function, which finds what torchrun sets.

The function lies in a module that a fresh process can import: in tests/support. Ranks are forked from a server that has
imported it (forks.py). This process holds the store, as torchrun's agent does, so it outlives a rank that dies.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from forks import context

from supersonic_moe.private_api import default_store

_device = torch.device("cpu")


def device() -> torch.device:
    """Where the tensors of this rank are."""
    return _device


def stay(stays: bool, limit_s: float = 10.0) -> None:
    """Where all ranks come, the one that ``stays`` until all others are here, too: its end would end their waits."""
    store = default_store("tests of ranks")
    if not stays:
        store.add("here", 1)
        return
    end = time.monotonic() + limit_s
    while store.add("here", 0) < dist.get_world_size() - 1 and time.monotonic() < end:
        time.sleep(0.01)


class Ended(NamedTuple):
    """How a rank ended."""

    result: Any
    """What the function returned; None if it did not."""
    error: str
    """Its traceback, if it raised."""
    exit_code: int | None
    """None: still there when time was up."""
    stderr: str
    """What it wrote there until it was gone."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any, **where: Any) -> list[Any]:
    """What ``function(*args)`` returns on each rank, in a process group of all; an AssertionError if one raised."""
    ended = end_ranks(size, function, *args, **where)
    errors = [f"rank {rank} (exit code {e.exit_code}): {e.error}{e.stderr}" for rank, e in enumerate(ended)]
    assert all(e.exit_code == 0 for e in ended), "\n".join(errors)
    return [e.result for e in ended]


def end_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    backend: str | None = "gloo",
    gpu: bool = False,
    timeout_s: float = 120,
) -> list[Ended]:
    """How each rank ended, however it did; none is left after ``timeout_s``."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes, files = [], [], [Path(folder) / str(rank) for rank in range(size)]
        for rank, file in enumerate(files):
            receive, send = context().Pipe(duplex=False)
            place = (rank, size, store.port, backend, gpu or backend == "nccl", file)
            process = context().Process(target=_rank, args=(*place, send, function, args), daemon=True)
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        ended, end = [], time.monotonic() + timeout_s
        for pipe, process, file in zip(pipes, processes, files, strict=True):
            result, error = None, ""
            if pipe.poll(max(0.0, end - time.monotonic())):
                try:
                    result, error = pipe.recv()
                except EOFError:
                    error = "died without a word"
            process.join(max(0.5, end - time.monotonic()))
            ended.append(Ended(result, error, process.exitcode, file.read_text() if file.exists() else ""))
            if process.exitcode is None:
                process.kill()
    return ended


def _rank(
    rank: int,
    size: int,
    port: int,
    backend: str | None,
    gpu: bool,
    stderr: Path,
    send: Connection,
    function: Callable[..., Any],
    args: Any,
) -> None:
    global _device
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)  # else that of the server
    torch.set_num_threads(1)
    if gpu:
        _device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(_device)
    if backend is None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": 0}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    else:
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
