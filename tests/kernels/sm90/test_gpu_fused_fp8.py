"""The fused FP8 backward of the down-projection against fp64 of the dequantised operands."""

from __future__ import annotations

import oracle
import pytest
import torch
from poison import poisoned_allocations  # noqa: F401
from test_gpu_grouped_gemm import CUDA, GROUPS, case, indexed, picked

from supersonic_moe.config.activation import Activation, GateUpLayout, as_activation
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import Gate, Groups, Quantized, Rows
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows

pytestmark = pytest.mark.gpu

INTERLEAVED, GATE_UP, UP_GATE = GateUpLayout.INTERLEAVED, GateUpLayout.GATE_UP, GateUpLayout.UP_GATE
# Depths below, at and between whole laps of three stages of 128; one block of columns, an even and an odd number of
# them, full and not.
SIZES = [(64, 128), (384, 512), (520, 384), (1000, 640)]
RAGGED = [(72, 8), (264, 200), (392, 1000)]  # widths that e4m3 H in halves leaves to the unfused function
ACTIVATIONS = {
    **{name: as_activation(name) for name in ("swiglu", "geglu", "reglu")},
    "gpt_oss": Activation.gpt_oss(limit=0.9),
}


@pytest.mark.parametrize("saved_fp8", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("layout", GateUpLayout)
@pytest.mark.parametrize(("hidden", "width"), [*SIZES, *RAGGED])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_sizes(
    counts: list[int], hidden: int, width: int, layout: GateUpLayout, gathered: bool, saved_fp8: bool
) -> None:
    check(counts, hidden, width, layout, ACTIVATIONS["swiglu"], gathered=gathered, saved_fp8=saved_fp8, bias=True)


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
    arguments, _ = arguments_of(offsets, dout, None, 256, GATE_UP, ACTIVATIONS["swiglu"], True, False)
    scores = torch.empty(301, device=CUDA)[1:].copy_(arguments[SCORES])
    got = down_backward_fp8(*arguments[:SCORES], scores, *arguments[SCORES + 1 :])
    want = down_backward_fp8(*arguments)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def check(
    counts: list[int], hidden: int, width: int, layout: GateUpLayout, activation: Activation, *, gathered: bool,
    saved_fp8: bool, bias: bool,
) -> None:  # fmt: skip
    """dH, s A and dS; rows of score 0 get exact zeros although H and its scales are NaN there."""
    if gathered:
        offsets, dout, index = indexed(counts, 3, hidden)
    else:
        offsets, (dout,) = case(counts, 3, hidden)
        index = None
    rows = sum(counts)
    arguments, want = arguments_of(offsets, dout, index, width, layout, activation, saved_fp8, bias)
    dh, scaled, ds = down_backward_fp8(*arguments)
    assert dh.dtype is scaled.dtype is torch.bfloat16
    zero = arguments[SCORES][:rows] == 0
    assert (dh[:rows][zero] == 0).all() and (scaled[:rows][zero] == 0).all()
    assert oracle.rel_fro(dh[:rows], want[0]) < 3e-3
    assert oracle.rel_fro(scaled[:rows], want[1]) < 3e-3
    assert (ds[:rows][~zero].double() - want[2][~zero]).norm() <= 3e-3 * want[3]
    again = down_backward_fp8(*arguments)
    assert all(torch.equal(x[:rows][~zero], y[:rows][~zero]) for x, y in zip((dh, scaled, ds), again, strict=True))


SCORES = 4  # their place among the arguments


def arguments_of(
    offsets: torch.Tensor, dout: torch.Tensor, index: torch.Tensor | None, width: int, layout: GateUpLayout,
    activation: Activation, saved_fp8: bool, bias: bool,
) -> tuple[tuple, tuple]:  # fmt: skip
    """Arguments of ``down_backward_fp8``; the fp64 result of the rows that experts own, and the norm of the products
    that dS sums: in one row they may cancel.
    """
    num_experts, rows, hidden = offsets.shape[0] - 1, int(offsets[-1]), dout.shape[1]
    allocated = dout.shape[0] if index is None else index.shape[0]
    dout[:, : hidden // 2] *= 10  # a scale in the wrong K block shows
    dout_q, dout_scale = quantize_rows(dout, tma=index is None)
    w2 = torch.randn(num_experts, hidden, width, device=CUDA, dtype=torch.bfloat16) / hidden**0.5
    w2_q, w2_transposed, w2_scale = quantize_blocks(w2)
    steps = torch.arange(2 * width, device=CUDA) // 128 % 3 + 1  # and a scale in the wrong block of H
    h = (torch.randn(allocated, 2 * width, device=CUDA) * steps).bfloat16()
    scores = torch.randn(allocated, device=CUDA)
    unscored = torch.rand(allocated, device=CUDA) < 0.1
    scores[unscored], h[unscored] = 0, float("nan")
    if saved_fp8:
        h, z_scale = quantize_rows(h, tma=True)
        exact_h = dequantize(h, z_scale)
        z_scale[unscored] = float("nan")
    else:
        exact_h, z_scale = h.double(), h.new_empty(0, -(-2 * width // 128), dtype=torch.float32)
    b1 = torch.randn(num_experts, 2 * width, device=CUDA, dtype=torch.bfloat16) if bias else None
    experts = torch.searchsorted(
        offsets[1:].contiguous(), torch.arange(allocated, device=CUDA, dtype=torch.int32), right=True
    )
    exact_dout = dequantize(dout_q, dout_scale)
    exact_dout = exact_dout[:rows] if index is None else picked(exact_dout, index)[:rows]
    da = reference.grouped_mm(Rows(exact_dout), dequantize(w2_q, w2_scale), offsets)
    exact_h = exact_h.float().double()  # as a kernel has it: a gate that its bias cancels is a kink of ReGLU
    exact_h, exact_b1 = torch.where(unscored[:, None], 0, exact_h)[:rows], None if b1 is None else b1.double()
    owner, gate = experts[:rows].int(), Gate(activation, layout)
    want = reference.activation_backward(exact_h, exact_b1, da, scores[:rows].double(), owner, gate)
    products = da * reference.activation_forward(exact_h, exact_b1, owner, gate)
    operands = Rows(Quantized(dout_q, dout_scale), index), Quantized(w2_transposed, w2_scale.mT), Quantized(h, z_scale)
    return (*operands, b1, scores, Groups(offsets, experts.int()), gate), (*want, products[~unscored[:rows]].norm())
