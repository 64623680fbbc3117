"""Several ranks in one process: threads that reach each other's memory, on one GPU, on several, or on the CPU.

    run_virtual(4, some_module.function, "argument")      [function("argument") of rank 0, of rank 1, ...]

Each rank is a thread with a process group of torch's own tests, and on a GPU with a stream of its own, so it runs
``ExpertParallel`` as it is; only ``shared_memory`` is replaced. On a GPU the flags are those of the package, on the CPU
:class:`ThreadFlags` does the same in Python. Run it in a process of its own (``ranks.run_ranks(1, ...)``): a wait that
fails traps, and then nothing more runs on that GPU context.

On several GPUs the first ranks are on the first one, as many on each. Blocks are torch's plain memory of each GPU,
which the others reach since torch has let them (``on_a_gpu``). So copies and flags between ranks of two GPUs cross
NVLink, and memory is ordered between GPUs. This leaves out torch's symmetric memory, copies beside products
(``Memory.apart``) and processes: two of these on two GPUs are tested over NCCL.

What virtual ranks of one GPU prove is the protocol and the arithmetic. They say nothing of the order of memory between
two GPUs, and none of them anything of speed.
"""

from __future__ import annotations

import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg

from supersonic_moe.kernels.sm90.exchange_flags import LATE, MAX_RANKS, OTHER_CALL, STOPPED, ExchangeFlags, Failure
from supersonic_moe.parallel import transport
from supersonic_moe.parallel.symmetric import HEAD, Memory

ONE_AT_A_TIME = pytest.mark.xdist_group("virtual ranks on a GPU")
"""Ranks that wait for each other fill the GPU with waiting, which processes of other tests then share."""
ON = [pytest.param(False, id="CPU"), pytest.param(True, id="GPU", marks=[pytest.mark.gpu, ONE_AT_A_TIME])]

_places = [torch.device("cpu")]
"""Where ranks are, from the first one on."""


def on_a_gpu(gpus: int = 1) -> None:
    """Or on several, which reach each other's memory from now on. Before CUDA starts: a stream for each rank that does
    not share a queue, where one wait would hold up another.
    """
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    ranks._device = torch.device("cuda", 0)
    _places[:] = [torch.device("cuda", index) for index in range(gpus)]
    for one in _places:
        for other in _places:
            if one != other:
                assert torch.cuda.can_device_access_peer(one, other), f"{one} does not reach the memory of {other}"
                assert float(torch.ones(1, device=one).to(other)) == 1  # torch asks for access when it first copies


def times_on(gpus: int) -> int:
    """How often the same is done: on a GPU, the second time everything is loaded, and nobody waits for the host."""
    return 2 if gpus else 1


def end_processes(gpu: bool, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[list[ranks.Ended]]:
    """Of virtual ranks that wait in vain: a process for the arguments of each call, all at once but on a GPU."""
    together = [[args] for args in calls] if gpu else [calls]
    return [process for some in together for process in ranks.end_groups(1, function, some)]


def run_virtual(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each rank, in a process group of all; raises what the first one raised."""
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size
    memory, store = SharedBlocks(size), dist.HashStore()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # names of groups belong to a thread
    multi_threaded_pg._install_threaded_pg()

    def work(rank: int) -> None:
        place, stream = _places[rank * len(_places) // size], nullcontext()
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            if place.type == "cuda":
                torch.cuda.set_device(place)
                stream = torch.cuda.stream(torch.cuda.Stream())
            # backward in this thread, which has the group
            with ranks.on(place), torch.autograd.set_multithreading_enabled(False), stream:
                results[rank] = function(*args)
        except BaseException as error:
            errors[rank] = error
            memory.meeting.abort()

    before, transport.shared_memory = transport.shared_memory, memory.shared_memory
    try:
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        transport.shared_memory = before
        multi_threaded_pg._uninstall_threaded_pg()
        multi_threaded_pg.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    raised = [
        f"rank {rank}: {''.join(traceback.format_exception(e))}" for rank, e in enumerate(errors) if e is not None
    ]
    assert not raised, "\n".join(raised)
    return results


class SharedBlocks:
    """Memory of all ranks of one run, each block made by its rank."""

    def __init__(self, size: int) -> None:
        self.meeting = threading.Barrier(size)
        self._size, self._blocks, self._lock = size, list[list[Tensor | None]](), threading.Lock()
        self._made = [0] * size

    def shared_memory(self, group: dist.ProcessGroup, size: int, limit_s: float) -> Memory:
        """In place of ``parallel.symmetric.shared_memory``."""
        rank = dist.get_rank(group)
        with self._lock:
            if self._made[rank] == len(self._blocks):
                self._blocks.append([None] * self._size)
            found = self._blocks[self._made[rank]]
            self._made[rank] += 1
        block = torch.full((HEAD + size,), 0xFF, dtype=torch.uint8, device=ranks.device())  # NaN where nobody writes
        block[:HEAD].zero_()
        if block.is_cuda:
            torch.cuda.synchronize()
        found[rank] = block
        self.meeting.wait()
        blocks: Any = found
        if not block.is_cuda:
            return Memory(blocks, ThreadFlags(blocks, rank, limit_s), None)  # type: ignore[arg-type]
        return Memory(blocks, CarefulFlags(blocks, rank, limit_s, self.meeting), None, apart=False)


class CarefulFlags(ExchangeFlags):
    """The first ``CAREFUL`` exchanges meet on the host before and after each wait: loading a kernel may wait for the
    whole GPU, and so for a wait of another rank. By then everything has been loaded.
    """

    CAREFUL = 0
    delays: random.Random | None = None

    def __init__(self, blocks: Sequence[Tensor], rank: int, limit_s: float, meeting: threading.Barrier) -> None:
        super().__init__(blocks, rank, limit_s)
        self._meeting, self._left = meeting, 2 * self.CAREFUL
        self._delays = random.Random(rank)
        torch.cuda._sleep(1)  # loaded now, while nobody waits

    def begin(self, bank: int, call: int, phase: int) -> None:
        self.around(lambda: ExchangeFlags.begin(self, bank, call, phase))

    def meet(self, kind: int, call: int, phase: int) -> None:
        self.around(lambda: ExchangeFlags.meet(self, kind, call, phase))

    def around(self, launch: Callable[[], None]) -> None:
        """A launch that waits for others."""
        if self._left:
            self._left -= 1
            torch.cuda.current_stream().synchronize()
            self._meeting.wait(60)
            launch()
            torch.cuda.current_stream().synchronize()
            self._meeting.wait(60)
        else:
            torch.cuda._sleep(self._delays.randrange(200_000))  # up to 0.1 ms
            launch()


class ThreadFlags:
    """``ExchangeFlags`` in Python, word for word, with a random rest before each flag."""

    def __init__(self, blocks: Sequence[Tensor], rank: int, limit_s: float) -> None:
        self._words = [block[:HEAD].view(torch.int64) for block in blocks]
        self._rank, self._limit_s = rank, limit_s
        self._others = [p for p in range(len(blocks)) if p != rank]
        self._epoch, self._last, self._told, self._in = 0, [0, 0], 0, 0
        self._failure: Failure | None = None
        self._delays = random.Random(rank)

    def begin(self, bank: int, call: int, phase: int) -> None:
        self._tell(0, self._epoch << 32)
        for peer in self._others:
            self._wait(peer, peer, self._last[bank] << 32, call, phase)
        self._epoch += 1
        self._last[bank] = self._epoch

    def advance(self, epochs: int) -> None:
        """An exchange of so many begins, for which nobody is asked."""
        self._epoch += epochs

    def tell(self, left: int) -> None:
        """What kernels do: this rank has written what belongs to the epoch that ``left`` more follow."""
        self._tell(MAX_RANKS, self._epoch - left << 32)

    def wait(self, left: int, call: int, phase: int) -> None:
        for peer in self._others:
            self._wait(peer, MAX_RANKS + peer, self._epoch - left << 32, call, phase)

    def meet(self, kind: int, call: int, phase: int) -> None:
        flag = self._epoch << 32 | kind
        self._tell(MAX_RANKS, flag)
        for peer in self._others:
            seen = self._wait(peer, MAX_RANKS + peer, flag, call, phase)
            if seen >> 32 == self._epoch and seen != flag:
                self._fail(Failure(OTHER_CALL, call, phase, peer, flag, seen))

    def mark(self) -> Any:
        return SimpleNamespace(query=lambda: True)

    def synchronize(self) -> None:
        pass

    def failure(self) -> Failure | None:
        return self._failure

    def waits_in(self) -> int:
        return self._in

    def stop(self, rank: int) -> None:
        self._told = 1 + rank

    def _tell(self, flag: int, value: int) -> None:
        for peer in self._others:
            time.sleep(self._delays.random() * 0.001)
            self._words[peer][flag + self._rank] = value

    def _wait(self, peer: int, flag: int, wanted: int, call: int, phase: int) -> int:
        start, mine = time.monotonic(), self._words[self._rank]
        while True:
            seen = int(mine[flag])
            if seen >> 32 >= wanted >> 32:
                self._in = 0
                return seen
            self._in = call
            if told := int(mine[2 * MAX_RANKS]) or self._told:
                self._fail(Failure(STOPPED, call, phase, told - 1, wanted >> 32, seen >> 32))
            if time.monotonic() - start > self._limit_s:
                self._fail(Failure(LATE, call, phase, peer, wanted >> 32, seen >> 32))
            time.sleep(1e-4)

    def _fail(self, failure: Failure) -> None:
        self._failure = failure
        if failure.why != STOPPED:
            for peer in self._others:
                self._words[peer][2 * MAX_RANKS] = 1 + self._rank
        raise RuntimeError("trap")
