"""``bench mega`` on ranks as torchrun starts them, on a CPU: with DeepGEMM on some of them, and errors of some."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import deep_gemm_stand_in
import torch
import torch.distributed as dist
from command_line import outcome
from torch import Tensor

from supersonic_moe.bench import infer, infer_peers, mega, mega_ranks
from supersonic_moe.bench.mega_cases import DIRECT
from supersonic_moe.parallel import MegaMoE

QUICK = ("--device", "cpu", "--min-ms", "0", "--warm-ms", "0")


def measured(*args: str, peer_on: Sequence[int] = ()) -> tuple[int, str]:
    """Exit code and output, with a peer on the ranks ``peer_on``."""
    infer.HOST_CALLS = infer.EAGER_CALLS = 1
    if int(os.environ["RANK"]) in peer_on:
        sys.modules["deep_gemm"] = _over_ranks()
    return outcome("bench", "mega", *QUICK, *args)


def on_gpus(*args: str) -> tuple[int, str]:
    """Both of our ways, alone."""
    return outcome("bench", "mega", "--peers", DIRECT, *args)


def with_the_peer(ranks: Sequence[int], *args: str) -> tuple[int, str]:
    return measured(*args, peer_on=ranks)


def _over_ranks() -> ModuleType:
    """The stand-in, which computes with the weights of all ranks."""
    deep_gemm = deep_gemm_stand_in.module()

    def fused(out: Tensor, up: Any, down: Any, buffer: deep_gemm_stand_in.Buffer) -> None:
        every = [tuple(_of_all(t) for t in pair) for pair in (up, down)]
        assert len(every[0][0]) == buffer.experts, "the buffer is for the experts of all ranks"
        deep_gemm_stand_in.fused(out, *every, buffer)

    vars(deep_gemm)["fp8_mega_moe"] = fused
    return deep_gemm


def _of_all(t: Tensor) -> Tensor:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t)
    return torch.cat(found).view(t.dtype)


def wrong_on(rank: int, *args: str) -> tuple[int, str]:
    """With tokens of a rank that the layer gets wrong there."""
    call = MegaMoE.__call__

    def wrong(self: MegaMoE, *given: Any, **options: Any) -> Tensor:
        return call(self, *given, **options).mul_(1.2 if self.rank == rank else 1.0)

    MegaMoE.__call__ = wrong  # type: ignore[method-assign]
    return measured(*args)


def stuck_on(rank: int, where: str, *args: str) -> tuple[int, str]:
    """With a rank that does not come back from building the peer, or from looking at an output."""
    mega_ranks.LIMIT_S = 2.0
    if int(os.environ["RANK"]) == rank:
        setattr(*((infer_peers, "mega_moe") if where == "the peer" else (mega, "worst_row")), _stay)
    return measured(*args, peer_on=(0, 1))


def _stay(*args: Any, **options: Any) -> Any:
    time.sleep(60)
