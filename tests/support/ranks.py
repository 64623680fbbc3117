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
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from forks import context

from supersonic_moe.private_api import default_store

_device = torch.device("cpu")
_of_thread = threading.local()


def device() -> torch.device:
    """Where the tensors of this rank are."""
    found: torch.device = getattr(_of_thread, "device", _device)
    return found


@contextmanager
def on(place: torch.device) -> Iterator[None]:
    """The tensors of this thread are there, wherever those of the process are."""
    _of_thread.device = place
    try:
        yield
    finally:
        del _of_thread.device


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
    (ended,) = end_groups(size, function, [args], backend=backend, gpu=gpu, timeout_s=timeout_s)
    return ended


def end_groups(
    size: int,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    backend: str | None = "gloo",
    gpu: bool = False,
    timeout_s: float = 120,
) -> list[list[Ended]]:
    """``end_ranks`` for the arguments of each call, all groups at the same time: for those that do little but wait."""
    stores, groups, on_gpu = [], [], gpu or backend == "nccl"
    with tempfile.TemporaryDirectory() as folder:
        for number, args in enumerate(calls):
            stores.append(dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False))
            where = size, stores[-1].port, backend, on_gpu
            files = [Path(folder) / f"{number}.{rank}" for rank in range(size)]
            groups.append([_started(file, rank, *where, function, args) for rank, file in enumerate(files)])
        end = time.monotonic() + timeout_s
        return [[_end_of(*rank, end) for rank in ranks] for ranks in groups]


def _started(stderr: Path, *args: Any) -> tuple[Connection, Any, Path]:
    receive, send = context().Pipe(duplex=False)
    process = context().Process(target=_rank, args=(send, stderr, *args), daemon=True)
    process.start()
    send.close()
    return receive, process, stderr


def _end_of(pipe: Connection, process: Any, stderr: Path, end: float) -> Ended:
    result, error = None, ""
    if pipe.poll(max(0.0, end - time.monotonic())):
        try:
            result, error = pipe.recv()
        except EOFError:
            error = "died without a word"
    process.join(max(0.5, end - time.monotonic()))
    ended = Ended(result, error, process.exitcode, stderr.read_text() if stderr.exists() else "")
    if process.exitcode is None:
        process.kill()
    return ended


def _rank(
    send: Connection,
    stderr: Path,
    rank: int,
    size: int,
    port: int,
    backend: str | None,
    gpu: bool,
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
