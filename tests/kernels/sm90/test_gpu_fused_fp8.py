"""The fused FP8 backward of the down-projection against fp64 of the dequantized operands."""

from __future__ import annotations

import oracle
import pytest
import torch
from down_backward_cases import ACTIVATIONS, GATE_UP, INTERLEAVED, RAGGED, SIZES, UP_GATE, step_of
from grouped_cases import CUDA, GROUPS, case, rows_case
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("saved_fp8", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("layout", GateUpLayout)
@pytest.mark.parametrize(("hidden", "width"), [*SIZES, *RAGGED])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_sizes(
    counts: list[int], hidden: int, width: int, layout: GateUpLayout, gathered: bool, saved_fp8: bool
) -> None:
    check(counts, hidden, width, layout, ACTIVATIONS["swiglu"], gathered=gathered, saved_fp8=saved_fp8, bias=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("layout", GateUpLayout)
@pytest.mark.parametrize(("hidden", "width"), [*SIZES, *RAGGED])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_z_in_int8(
    counts: list[int], hidden: int, width: int, layout: GateUpLayout, gathered: bool, bias: bool
) -> None:
    check(counts, hidden, width, layout, ACTIVATIONS["swiglu"], gathered=gathered, saved_fp8=True, bias=bias, int8=True)


@pytest.mark.parametrize("saved_fp8", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", GateUpLayout)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(("gathered", "width"), [(False, 384), (True, 384), (True, 640)])
def test_activations(
    gathered: bool, width: int, activation: Activation, layout: GateUpLayout, bias: bool, saved_fp8: bool
) -> None:
    check([0, 300, 1, 70], 264, width, layout, activation, gathered=gathered, saved_fp8=saved_fp8, bias=bias)


@pytest.mark.parametrize("saved_fp8", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("layout", [INTERLEAVED, UP_GATE])
@pytest.mark.parametrize("hidden", [128, 512])
def test_many_tiles_of_one_block(hidden: int, layout: GateUpLayout, gathered: bool, saved_fp8: bool) -> None:
    """Several tiles a block, short tails that leave a warpgroup without rows between full ones, and last columns that
    fill one chunk or two of four: rings and slots stay in step, in both blocks of a cluster.
    """
    counts, activation = [300, 560, 20] * 30, ACTIVATIONS["swiglu"]
    check(counts, hidden, 384, layout, activation, gathered=gathered, saved_fp8=saved_fp8, bias=False)
    check(counts, hidden, 320, INTERLEAVED, activation, gathered=gathered, saved_fp8=saved_fp8, bias=False)


def test_scores_at_any_address() -> None:
    offsets, (dout,) = case([300], 0, 256)
    step, _ = step_of(offsets, dout, None, 256, GATE_UP, ACTIVATIONS["swiglu"], True, False)
    got = down_backward_fp8(step._replace(row_scores=torch.empty(301, device=CUDA)[1:].copy_(step.row_scores)))
    want = down_backward_fp8(step)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def check(
    counts: list[int], hidden: int, width: int, layout: GateUpLayout, activation: Activation, *, gathered: bool,
    saved_fp8: bool, bias: bool, int8: bool = False,
) -> None:  # fmt: skip
    """dH, s A and dS; rows of score 0 get exact zeros although H and its scales are NaN there."""
    offsets, dout, index = rows_case(counts, 3, hidden, gathered)
    rows = sum(counts)
    step, want = step_of(offsets, dout, index, width, layout, activation, saved_fp8, bias, int8)
    dh, scaled, ds = down_backward_fp8(step)
    assert dh.dtype is scaled.dtype is torch.bfloat16
    zero = step.row_scores[:rows] == 0
    assert (dh[:rows][zero] == 0).all() and (scaled[:rows][zero] == 0).all()
    assert oracle.rel_fro(dh[:rows], want[0]) < 3e-3
    assert oracle.rel_fro(scaled[:rows], want[1]) < 3e-3
    assert (ds[:rows][~zero].double() - want[2][~zero]).norm() <= 3e-3 * want[3]
    again = down_backward_fp8(step)
    assert all(torch.equal(x[:rows][~zero], y[:rows][~zero]) for x, y in zip((dh, scaled, ds), again, strict=True))
