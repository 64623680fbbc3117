"""What the tensor core itself costs, by emulation (tests/support/tensor_core.py): which error bounds an exact kernel
that adds to fp32 after every 128 of K can keep, and which it cannot. docs/inference.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tensor_core
import torch
from inference_oracle import make_case
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.kernels.reference.inference import dequantize_w13
from supersonic_moe.kernels.reference.quantize import dequantize, quantize_rows


@dataclass
class Budget:
    """Relative Frobenius errors of each stage, and the share of codes of c that differ."""

    c: float
    codes: float
    y_of_own_codes: float
    y: float


def budget(kind: str, *, hidden: int, inter: int, rows: int, seed: int = 0) -> Budget:
    """One expert; the second product for at most 1024 of its outputs."""
    case = make_case(kind, tokens=rows, hidden=hidden, inter=inter, local=1, choices=1, num_experts=1, seed=seed)
    w13_scale, w2_scale = (s.repeat_interleave(128, 0) for s in (case.w13_scale[0], case.w2_scale[0]))
    w2, w2_scale = case.w2[0, :1024], w2_scale[:1024]

    def gated(z: Tensor) -> Tensor:
        return torch.nn.functional.silu(z[:, inter:]) * z[:, :inter]

    x, w13 = dequantize(case.x, case.x_scale, torch.float64), case.w13[0]
    exact = gated(x @ dequantize_w13(w13, case.w13_scale[0], GateUpLayout.UP_GATE, torch.float64).T).float()
    emulated = gated(tensor_core.product(case.x, case.x_scale, w13, w13_scale))
    (q, q_scale), (own, own_scale) = quantize_rows(exact), quantize_rows(emulated)
    down = dequantize(w2, case.w2_scale[0, : len(w2) // 128], torch.float64).T
    y = tensor_core.product(own, own_scale, w2, w2_scale)
    return Budget(
        relative_error(emulated, exact),
        float((q.view(torch.uint8) != own.view(torch.uint8)).float().mean()),
        relative_error(y, dequantize(own, own_scale, torch.float64) @ down),
        relative_error(y.bfloat16(), dequantize(q, q_scale, torch.float64) @ down),
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_the_emulation_is_exact_with_enough_bits_and_low_on_one_sign() -> None:
    case = make_case("all_positive", tokens=5, hidden=512, inter=64, local=1, choices=1, num_experts=1)
    scale = torch.ones(5, 4), torch.ones(128, 4)
    exact = case.x.double() @ case.w13[0].double().T
    wide = tensor_core.product(case.x, scale[0], case.w13[0], scale[1], fraction=22)
    assert relative_error(wide, exact) < 1e-6
    narrow = tensor_core.product(case.x, scale[0], case.w13[0], scale[1])
    assert -6.5e-4 < float(((narrow - exact) / exact).mean()) < -5.5e-4


@pytest.mark.parametrize("kind", ["contest", "positive"])
def test_bounds_on_data_of_both_signs(kind: str) -> None:
    found = budget(kind, hidden=2048, inter=512, rows=16)
    assert found.c <= 5e-4 and found.codes <= 0.01
    assert found.y_of_own_codes <= 5e-4 and found.y <= 0.006


def test_one_code_in_a_hundred_is_what_realistic_data_costs() -> None:
    """Many small numbers beside one large: 1.0 to 1.2 % of their codes lie so near a border of e4m3."""
    found = budget("realistic", hidden=2048, inter=512, rows=16)
    assert found.c <= 5e-4 and found.y <= 0.006
    assert 0.01 < found.codes <= 0.015


def test_data_of_one_sign_is_low_by_twice_the_cut() -> None:
    """Gate and up are both 6e-4 low, so c is 1.2e-3 low; its codes hardly differ, since its scale is low as well."""
    found = budget("all_positive", hidden=2048, inter=512, rows=8)
    assert 1e-3 < found.c < 1.4e-3 and found.codes <= 0.01
    assert found.y_of_own_codes <= 1e-3 and found.y <= 0.006


def test_few_short_rows_scatter() -> None:
    """A single code that turns over is a large part of a short row: the median row keeps 0.006, the worst does not."""
    errors = sorted(budget("contest", hidden=512, inter=256, rows=1, seed=seed).y for seed in range(24))
    assert errors[12] <= 0.004
    assert 0.006 < errors[-1] <= 0.02
