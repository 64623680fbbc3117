"""The streaming kernel stage by stage on a GPU: c in fp32, its codes, and the second product from the kernel's own
codes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from inference_oracle import make_case
from streamed_stages import Streamed, relative_error, stream

pytestmark = pytest.mark.gpu

ORDERS = ["gate_up", "up_gate", "interleaved"]


FEW_CODES = 8192  # of which one in a hundred scatters


def check(got: Streamed, kind: str = "contest") -> None:
    """Bounds are those that an exact kernel keeps on this tensor core: tests/inference/test_accuracy_budget.py."""
    one_sign = kind == "all_positive"
    assert relative_error(got.c_PI, got.expected.c_PI) <= (1.5e-3 if one_sign else 5e-4)
    assert relative_error(got.q_scale_PB, got.expected.q_scale_PB) <= (1.5e-3 if one_sign else 5e-4)
    codes, expected = (q.view(torch.uint8) for q in (got.q_PI, got.expected.q_PI))
    strict = kind != "realistic" and codes.numel() >= FEW_CODES
    assert (codes != expected).float().mean() <= (0.01 if strict else 0.015)
    # Two roundings of numbers that are d apart are at most d and one step apart.
    apart = (scaled(got.c_PI, got.q_scale_PB) - scaled(got.expected.c_PI, got.expected.q_scale_PB)).abs()
    values, wanted = (q.float() for q in (got.q_PI, got.expected.q_PI))
    exponent = torch.maximum(values.abs(), wanted.abs()).clamp(min=2.0**-6).log2().floor()
    assert ((values - wanted).abs() <= apart * 1.001 + torch.exp2(exponent - 3)).all()
    assert relative_error(got.y_PH, got.y_of_own_codes_PH) <= (1e-3 if one_sign else 5e-4)


def scaled(c_PI: torch.Tensor, scale_PB: torch.Tensor) -> torch.Tensor:
    return c_PI / scale_PB.repeat_interleave(128, 1)[:, : c_PI.shape[1]]


@pytest.mark.parametrize("kind", ["contest", "realistic", "positive", "all_positive"])
@pytest.mark.parametrize("order", ORDERS)
def test_stages(order: str, kind: str) -> None:
    case = make_case(kind, tokens=70, hidden=1024, inter=512, local=6, choices=3, num_experts=6, order=order)
    check(stream(case), kind)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 127, 128, 129, 300])
def test_rows_of_an_expert(tokens: int) -> None:
    """Every number of columns, its borders, and an expert of more than one item. One expert and narrow tiles, too."""
    case = make_case(tokens=tokens, hidden=256, inter=128, local=2, choices=1, num_experts=2)
    case.ids.fill_(1)
    check(stream(case))


@pytest.mark.parametrize("inter", [64, 192, 256, 320, 768])
@pytest.mark.parametrize("order", ORDERS)
def test_intermediate_sizes(order: str, inter: int) -> None:
    check(stream(make_case(tokens=40, hidden=384, inter=inter, local=8, choices=2, num_experts=8, order=order)))


def test_many_small_experts() -> None:
    case = make_case(tokens=128, hidden=2048, inter=128, local=512, choices=10, num_experts=512)
    check(stream(case))


def test_clamp_and_scales_of_powers_of_two() -> None:
    case = make_case("realistic", tokens=33, hidden=512, inter=256, local=4, choices=2, num_experts=4)
    got = stream(case, limit=0.5, pow2=True)
    check(got, "realistic")
    assert torch.equal(torch.exp2(torch.log2(got.q_scale_PB).round()), got.q_scale_PB)


@pytest.mark.parametrize("kind", ["contest", "realistic", "positive", "all_positive"])
def test_deepseek_shape(kind: str) -> None:
    check(stream(make_case(kind, tokens=16, hidden=7168, inter=2048, local=4, choices=3, num_experts=4)), kind)


@pytest.mark.parametrize("inter", [128, 512])
def test_a_row_does_not_depend_on_the_others(inter: int) -> None:
    """The same bits alone, among few and among many: N, tile size and the block that computes it play no part."""
    case = make_case(tokens=150, hidden=512, inter=inter, local=3, choices=1, num_experts=3)
    case.ids.fill_(2)
    whole = stream(case)
    for tokens in (1, 5, 20, 60, 100):
        part = make_case(tokens=150, hidden=512, inter=inter, local=3, choices=1, num_experts=3)
        part.x, part.x_scale, part.ids = case.x[:tokens], case.x_scale[:tokens], case.ids[:tokens]
        part.weights = case.weights[:tokens]
        got = stream(part)
        for name in ("c_PI", "q_PI", "q_scale_PB", "y_PH"):
            alone, among = getattr(got, name), getattr(whole, name)[:tokens]
            assert torch.equal(alone.view(torch.uint8), among.view(torch.uint8)), (tokens, name)


def test_the_same_bits_every_time() -> None:
    case = make_case(tokens=60, hidden=1024, inter=512, local=12, choices=4, num_experts=12)
    first = stream(case)
    for _ in range(5):
        again = stream(case)
        assert torch.equal(first.y_PH, again.y_PH) and torch.equal(first.c_PI, again.c_PI)
