"""Memory that all ranks reach: when it is taken, why not, and copies through it between two processes."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import symmetric_cases as cases
import torch
from ranks import run_ranks

from supersonic_moe.parallel.symmetric import owner_of


@pytest.mark.parametrize(
    ("transport", "how"),
    [("auto", "gather, by copies between"), ("push", "push, by kernels that write what is needed to")],
)
def test_two_processes_that_share_memory_have_the_bits_of_one(transport: str, how: str, tmp_path: Path) -> None:
    for (said,), found in run_ranks(2, cases.same_as_one_process, tmp_path, transport):
        assert f"transport: {how} GPUs that reach each other's memory, through 0.131 MB" in said
        assert found == []


def test_every_rank_has_the_same_reason_against_it(tmp_path: Path) -> None:
    first, second = run_ranks(2, cases.obstacles, tmp_path)
    assert (
        first
        == second
        == [
            "ranks 0 and 1 share a GPU",
            "rank 1 does not see the GPU of rank 0: another host, or CUDA_VISIBLE_DEVICES hides it",
            "flags between GPUs are compiled for compute capability 9.0",
            "the GPU of rank 1 cannot read that of rank 0 (`supersonic-moe doctor` shows the matrix)",
            f"torch {torch.__version__} has no symmetric memory",
            "0.00512 MB of symmetric memory were refused: CUDA out of memory.",
            "GPUs do not reach each other's memory: no such handle",
            "memory of other GPUs is not where torch says: instead of all ranks, rank 1 found [1, 0]",
        ]
    )


@pytest.mark.parametrize("gpu", ["works", "has failed"])
def test_shared_memory_is_freed_only_while_the_gpu_works(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    """torch ends the process where it cannot wait for the GPU before it frees such memory."""

    class Block:
        pass

    def synchronize(device: torch.device) -> None:
        assert device == torch.device("cuda", 1)
        if gpu == "has failed":
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    owner = owner_of([block := Block()], torch.device("cuda", 1))
    block, kept = None, weakref.ref(block)
    assert kept() is not None
    del owner
    assert (kept() is not None) == (gpu == "has failed")
