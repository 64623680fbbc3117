"""What compute-sanitizer gets to see of the kernels that wait for others, from their launches on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")

import sanitized_cases
from recorded_launches import recorded_launches  # noqa: F401

from supersonic_moe.kernels.interface import RANGE_ROWS


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **kwargs: zeros(*size, **kwargs))
    monkeypatch.setattr(sanitized_cases, "CUDA", torch.device("cpu"))


def test_products_in_parts_are_those_of_every_kernel(launches: list[Any]) -> None:
    """Neither whole nor composed of others, which some sizes and layouts would take."""
    sanitized_cases.products_in_parts([300, 0, 513])
    assert {kernel.spec.source for kernel, *_ in launches} == {
        "up_projection.cu", "down_backward.cu", "grouped_gemm.cu",
        "up_projection_fp8.cu", "down_backward_fp8_quantize.cu", "grouped_gemm_fp8.cu",
    }  # fmt: skip
    for kernel, _, given in launches:
        assert ("ROW_BLOCKS", RANGE_ROWS) in kernel.spec.constants and given["begin_block"] != 0
        assert (given["arrived"] != 0) is (given["parts"] == 2) is ("grouped" not in kernel.spec.name)


def test_ranks_exchange_one_after_the_other_through_both_banks(launches: list[Any]) -> None:
    """So none waits for one that runs behind it."""
    sanitized_cases.exchange(3)
    ran = [(kernel.spec.name.removeprefix("exchange_"), given["rank"]) for kernel, _, given in launches]
    assert ran == [(name, rank) for rank in range(3) for _ in range(4) for name in ("begin", "meet")]
    assert [given["bank"] for _, _, given in launches[::2]] == 6 * [0, 1]
