"""The fused FP8 up-projection: what it stores, against the fp64 product of the dequantized operands."""

from __future__ import annotations

import oracle
import pytest
import torch
from grouped_cases import CUDA, GROUPS, picked, row_experts, rows_case
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.activation import Activation, GateUpLayout, as_activation
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import Gate, Quantized, Rows, UpProjection
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.reference.quantize import quantize_rows as rounded
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8, up_projection_fp8_into
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows
from supersonic_moe.quantization.block_format import saved_steps

pytestmark = pytest.mark.gpu

HALVES = [(64, 128), (520, 384), (1000, 256)]
CASES = [
    *((h, i, layout) for h, i in HALVES for layout in (GateUpLayout.GATE_UP, GateUpLayout.UP_GATE)),
    *((h, i, GateUpLayout.INTERLEAVED) for h, i in (*HALVES, (72, 8), (264, 200), (392, 328))),
]


@pytest.mark.parametrize("saved", ["fp8", "int8", "bf16", "recompute"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("hidden", "width", "layout"), CASES)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_what_is_stored(
    counts: list[int], hidden: int, width: int, layout: GateUpLayout, gathered: bool, saved: str
) -> None:
    check(counts, hidden, width, layout, gathered, Fp8Recipe(save_preactivation=saved), as_activation("swiglu"), True)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", GateUpLayout)
@pytest.mark.parametrize(
    "activation",
    [*map(as_activation, ("swiglu", "geglu", "reglu")), Activation(as_activation("swiglu").type, 1.702, 7.0, 1.0)],
    ids=["swiglu", "geglu", "reglu", "gpt-oss"],
)
def test_activations(activation: Activation, layout: GateUpLayout, bias: bool, scale: str) -> None:
    check([0, 300, 1, 70], 264, 384, layout, True, Fp8Recipe(scale=scale), activation, bias)  # type: ignore[arg-type]


def check(
    counts: list[int], hidden: int, width: int, layout: GateUpLayout, gathered: bool, recipe: Fp8Recipe,
    activation: Activation, bias: bool,
) -> None:  # fmt: skip
    offsets, x, index = rows_case(counts, 5, hidden, gathered)
    rows, num_experts = sum(counts), len(counts)
    w1 = torch.randn(num_experts, 2 * width, hidden, device=CUDA, dtype=torch.bfloat16) / hidden**0.5
    w1[:, ::2] *= 4  # gate and up have scales of their own
    b1 = torch.randn(num_experts, 2 * width, device=CUDA, dtype=torch.bfloat16) if bias else None
    row_expert = row_experts(counts, 5)
    w_q, _, w_scale = quantize_blocks(w1)
    x_rows = Rows(quantize_rows(x, tma=not gathered), index)
    gate = Gate(activation, layout)
    step = UpProjection(x_rows, Quantized(w_q, w_scale), b1, offsets, row_expert, gate, save=True)
    (h, z_scale), (a, a_scale) = up_projection_fp8(step, recipe)

    operand = picked(dequantize(*x_rows.x), index)[:rows]
    want_h = reference.grouped_mm(Rows(operand), dequantize(w_q, w_scale).mT, offsets)
    want_a = reference.activation_forward(want_h, None if b1 is None else b1.double(), row_expert[:rows], gate)
    close(a[:rows], a_scale[:rows], want_a, recipe.pow2)
    if recipe.save_preactivation == "fp8":
        close(h[:rows], z_scale[:rows], want_h, recipe.pow2)
    elif recipe.save_preactivation == "int8":
        close_saved(h[:rows], z_scale[:rows], want_h)
    elif recipe.save_preactivation == "bf16":
        assert oracle.rel_fro(h[:rows], want_h) < 3e-3
    else:
        assert h.shape[0] == z_scale.shape[0] == 0

    again = [t for result in up_projection_fp8(step, recipe) for t in result]
    stored = (h, z_scale, a, a_scale)
    assert all(torch.equal(s[:rows].float(), t[:rows].float()) for s, t in zip(stored, again, strict=True))
    (unsaved, _), (other, _) = up_projection_fp8(step._replace(save=False), recipe)
    assert unsaved.shape == (0, 2 * width) and torch.equal(other[:rows].float(), a[:rows].float())
    paired, paired_scale = up_projection_fp8_into(step._replace(save=False), recipe, None, pairs=True)[1]
    assert torch.equal(paired[:rows].float(), a[:rows].float()) and torch.equal(paired_scale[:rows], a_scale[:rows])


def close_saved(q: torch.Tensor, words: torch.Tensor, want: torch.Tensor) -> None:
    """The same for Z in int8: exponents and codes, but for those that the GEMM's own error moves."""
    want_q, want_words = reference.quantize_saved(want.float())
    assert (words == want_words).double().mean() > 0.9  # four exponents a word
    value, want_value = (
        codes.double() * saved_steps(steps, want.shape[1]).double()
        for codes, steps in ((q, words), (want_q, want_words))
    )
    # of the format alone: 0.007 to 0.012, as maxima lie; in one row of 16 numbers up to 0.014
    assert oracle.rel_fro(value, want) <= 1.02 * oracle.rel_fro(want_value, want)  # both 0 where Z is
    assert oracle.rel_fro(value, want_value) < 0.006


def close(q: torch.Tensor, scale: torch.Tensor, want: torch.Tensor, pow2: bool) -> None:
    """The format's bytes of ``want``, but for elements and maxima that the GEMM's own error moves to a neighbour."""
    want_q, want_scale = rounded(want.float(), pow2)
    same_scale = (scale / want_scale - 1).abs() < 0.02
    assert same_scale.double().mean() > (0.97 if pow2 else 0.999)
    assert oracle.rel_fro(dequantize(q, scale), want) < 0.035
    assert oracle.rel_fro(dequantize(q, scale), dequantize(want_q, want_scale)) < (0.03 if pow2 else 0.015)
