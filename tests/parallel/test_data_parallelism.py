"""Expert parallelism beside DDP and FSDP2, and checkpoints, against one process."""

from __future__ import annotations

from pathlib import Path

import parallel_training as training
import pytest
from ranks import run_ranks


@pytest.mark.parametrize(
    ("how", "ranks"), [("ddp", 2), ("ddp", 4), ("ddp, clipped", 2), ("fsdp", 2), ("fsdp", 4), ("copies", 4)]
)
def test_training_is_that_of_one_process(how: str, ranks: int) -> None:
    assert max(run_ranks(ranks, training.train, how)) < 1e-12


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_what_would_mix_the_experts_of_ranks_is_refused(how: str) -> None:
    for rank, error in enumerate(run_ranks(2, training.plain_experts_in, how)):
        assert f"of ranks [{1 - rank}], which hold other experts" in error, error
        assert "Call parallel.shard_experts(model, mesh)" in error


def test_data_parallelism_over_ranks_of_the_same_experts_is_not() -> None:
    assert run_ranks(2, training.plain_experts_in, "ddp, each its own") == ["no error"] * 2


def test_gradients_of_experts_are_divided_whatever_becomes_of_the_weights() -> None:
    for found in run_ranks(2, training.divisions):
        assert found == pytest.approx(dict.fromkeys(found, 2.0), rel=1e-6), found


def test_no_two_ranks_draw_the_same_experts() -> None:
    same, sums = zip(*run_ranks(4, training.drawn), strict=True)
    assert all(same) and len(set(sums)) == 4


@pytest.mark.parametrize(("saved", "loaded"), [(2, 4), (4, 1)])
def test_a_checkpoint_loads_on_another_number_of_ranks(saved: int, loaded: int, tmp_path: Path) -> None:
    run_ranks(saved, training.save, tmp_path)
    assert all(run_ranks(loaded, training.load, tmp_path))
