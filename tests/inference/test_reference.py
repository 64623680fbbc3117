"""The stages of the FP8 operator in plain torch, against the same operator one token at a time in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from inference_oracle import Case, errors, make_case, moe_loop
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.kernels.reference.inference import Fp8Experts, dequantize_w13, expert_rows, local_ids, moe_fp8

ORDERS = ["gate_up", "up_gate", "interleaved"]
KINDS = ["contest", "realistic", "positive", "all_positive"]


def experts_of(case: Case) -> Fp8Experts:
    return Fp8Experts(case.w13, case.w13_scale, case.w2, case.w2_scale)


def run(case: Case, ids: Tensor | None = None, **settings: object) -> Tensor:
    local = local_ids(case.ids if ids is None else ids, case.w13.shape[0])
    layout = GateUpLayout(case.order)
    return moe_fp8(case.x, case.x_scale, experts_of(case), case.weights, local, order=layout, **settings)


@pytest.mark.parametrize("inter", [64, 192, 256])
@pytest.mark.parametrize("order", ORDERS)
def test_every_row_order_and_width(order: str, inter: int) -> None:
    """I = 192 has a block of 128 and one of 64 rows in each half; interleaved it has three of 128."""
    case = make_case(order=order, inter=inter, tokens=7)
    want = moe_loop(case)
    assert errors(run(case, requantize=False, dtype=torch.float64), want)[1] < 1e-12
    assert errors(run(case, requantize=False), want)[1] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_within_the_contract_of_the_unquantized_operator(kind: str) -> None:
    case = make_case(kind, tokens=24, hidden=512, inter=256)
    frobenius, worst_row = errors(run(case), moe_loop(case))
    assert frobenius <= 0.03 and worst_row <= 0.06
    assert frobenius > 0.001  # the intermediate does go through e4m3


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_like_an_operator_that_requantizes(kind: str, pow2: bool) -> None:
    case = make_case(kind, tokens=12, inter=192)
    frobenius, _ = errors(run(case, pow2=pow2, dtype=torch.float64), moe_loop(case, requantize=True, pow2=pow2))
    assert frobenius <= 1e-3  # a code at a border may fall either way
    frobenius, _ = errors(run(case, pow2=pow2), moe_loop(case, requantize=True, pow2=pow2))
    assert frobenius <= (0.015 if kind == "all_positive" else 0.006)


def test_values_beyond_the_range_of_fp16() -> None:
    case = make_case(tokens=6, hidden=1024, inter=128)
    case.x_scale *= 8
    stages = expert_rows(
        case.x.float() * case.x_scale.repeat_interleave(128, 1),
        experts_of(case),
        local_ids(case.ids, 5),
        order=GateUpLayout.UP_GATE,
    )
    assert stages.c_PI.abs().max() > 65504
    assert errors(run(case), moe_loop(case))[0] <= 0.03


def test_clamp() -> None:
    case = make_case("contest", tokens=10)
    limited = run(case, limit=7.0, requantize=False, dtype=torch.float64)
    assert errors(limited, moe_loop(case, limit=7.0))[1] < 1e-12
    assert errors(limited, moe_loop(case))[0] > 0.1


def test_scaling_factor_and_weight_on_input() -> None:
    case = make_case("realistic", choices=1, tokens=20)
    case.weights[3] = -0.7
    settings = {"weight_on_input": True, "scaling_factor": 2.5}
    got = run(case, requantize=False, dtype=torch.float64, **settings)
    want = moe_loop(case, weight_on_input=True, factor=2.5)
    assert errors(got, want)[1] < 1e-12
    assert errors(got, moe_loop(case, factor=2.5))[0] > 0.05


def test_shared_expert_is_outside_weights_and_factor() -> None:
    case, shared = make_case(tokens=9), make_case(tokens=9, local=1, seed=5)
    got = run(case, shared=experts_of(shared), scaling_factor=2.5, requantize=False, dtype=torch.float64)
    assert errors(got, moe_loop(case, shared=shared, factor=2.5))[1] < 1e-6


def test_rows_are_sorted_by_expert_in_slot_order() -> None:
    case = make_case(tokens=30)
    local = local_ids(case.ids, 5)
    stages = expert_rows(torch.randn(30, 256), experts_of(case), local, order=GateUpLayout.UP_GATE)
    flat = local.flatten()
    assert stages.slot_P.tolist() == sorted((flat >= 0).nonzero()[:, 0].tolist(), key=lambda s: (int(flat[s]), s))


def test_an_expert_without_rows_is_not_read_and_foreign_rows_do_not_mix() -> None:
    case = make_case(tokens=8, local=8)
    case.ids = torch.where(case.ids == 2, torch.tensor(3), case.ids).int()
    clean = run(case)
    for poisoned in (case.w13, case.w2):
        poisoned[2] = math.nan
    case.w13_scale[2], case.w2_scale[2] = math.nan, math.inf
    assert torch.equal(run(case), clean)
    case.x[4] = math.nan
    touched = run(case)
    assert touched[4].isnan().all()
    rest = [t for t in range(8) if t != 4]
    assert torch.equal(touched[rest], clean[rest])


@pytest.mark.parametrize("offset", [-3, 0, 96, 250, 256])
def test_local_ids_of_an_offset(offset: int) -> None:
    ids = torch.randint(0, 256, (50, 8))
    want = [[e - offset if 0 <= e - offset < 32 else -1 for e in row] for row in ids.tolist()]
    assert local_ids(ids, 32, offset, 256).tolist() == want


def test_local_ids_of_a_map_and_sentinels() -> None:
    placed = torch.full((16,), -1, dtype=torch.int32)
    placed[[9, 2, 15]] = torch.tensor([0, 1, 2], dtype=torch.int32)
    placed[5] = 3  # beyond the experts of this rank: another's
    ids = torch.tensor([[9, 2, 15], [-1, 16, 2**30], [5, 0, 9], [2, 2, -7]])
    assert local_ids(ids, 3, expert_map=placed).tolist() == [[0, 1, 2], [-1, -1, -1], [-1, -1, 0], [1, 1, -1]]
    beyond = torch.tensor([[3, 4, 5]])
    assert local_ids(beyond, 8, 0, num_experts=4).tolist() == [[3, -1, -1]]
    assert local_ids(beyond, 8).tolist() == [[3, 4, 5]]


def test_scale_blocks_of_halves_and_of_interleaved_rows() -> None:
    w = torch.ones(384, 128).to(torch.float8_e4m3fn)
    halves = dequantize_w13(w, torch.tensor([[1.0], [2.0], [3.0], [4.0]]), GateUpLayout.GATE_UP, torch.float32)
    assert halves[:, 0].tolist() == [1] * 128 + [2] * 64 + [3] * 128 + [4] * 64
    mixed = dequantize_w13(w, torch.tensor([[1.0], [2.0], [3.0]]), GateUpLayout.INTERLEAVED, torch.float32)
    assert mixed[:, 0].tolist() == [1] * 128 + [2] * 128 + [3] * 128
