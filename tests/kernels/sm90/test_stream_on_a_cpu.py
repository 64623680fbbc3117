"""The streaming kernel of the inference operator, compiled for the CPU and run thread by thread, against the reference.

TMA, wgmma and mbarriers are emulated (``tests/support/cpu``), a block is a thread of the host. What a tensor core
rounds and what memory does without fences is not seen here.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from inference_oracle import Case, make_case
from torch import Tensor

pytest.importorskip("cuda.bindings.nvrtc")

from supersonic_moe.config.activation import GateUpLayout, as_layout
from supersonic_moe.jit.spec import KERNEL_ROOT
from supersonic_moe.kernels.reference import local_ids
from supersonic_moe.kernels.reference.inference import Fp8Experts, moe_fp8
from supersonic_moe.kernels.sm90.route_rows import ITEM_ROWS, ROW_GROUP
from supersonic_moe.kernels.sm90.stream_experts import num_counters, pairs, plane_rows
from supersonic_moe.quantization.block_format import blocks

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

STAND_INS = Path(__file__).parents[2] / "support" / "cpu"


@pytest.fixture(name="stream", scope="module")
def compiled_for_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("stream") / "stream.so"
    options = ("-std=c++20", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
    folders = (f"-I{STAND_INS}", f"-I{KERNEL_ROOT}")
    subprocess.run(["g++", *options, *folders, STAND_INS / "stream.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library)).stream


class Tables(NamedTuple):
    """What the router writes."""

    items: Tensor
    row_slot: Tensor
    slot_row: Tensor


def tables_of(slots_TC: Tensor, num_local: int) -> Tables:
    """``slots_TC``: local expert of each slot, -1 for none."""
    slots, items, row_slot = slots_TC.flatten(), [], []
    slot_row = torch.full_like(slots, -1)
    for expert in range(num_local):
        own = (slots == expert).nonzero().flatten().tolist()
        parts = -(-len(own) // ITEM_ROWS)
        for part in range(parts):
            rows = min(ITEM_ROWS, len(own) - part * ITEM_ROWS)
            items.append([expert, len(row_slot) + part * ITEM_ROWS, rows, part << 16 | parts])
        for slot in own:
            slot_row[slot] = len(row_slot)
            row_slot.append(slot)
        row_slot += [-1] * (-len(row_slot) % ROW_GROUP)
    header = [len(items), max((rows for *_, rows, _ in items), default=0), len(row_slot), 0]
    tables = torch.tensor([header, *items], dtype=torch.int32)
    return Tables(tables, torch.tensor(row_slot, dtype=torch.int32), slot_row.int())


def run(
    stream: Any, case: Case, x: Tensor, x_scale: Tensor | None, grid: int, shared: Fp8Experts | None = None,
    limit: float = math.inf, pow2: bool = False, x_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The output, with scratch that starts as NaN. All experts of ``case`` are local."""
    (tokens, hidden), (local, _, inter) = x.shape, case.w2.shape
    ids, weights = case.ids, case.weights
    if shared is not None:
        ids = torch.cat([ids, torch.full((tokens, 1), local, dtype=torch.int32)], 1)
        weights = torch.cat([weights, torch.ones(tokens, 1)], 1).contiguous()
    experts = local + (shared is not None)
    tables = tables_of(local_ids(ids, experts), experts)
    rows, items = plane_rows(ids.numel(), experts), len(tables.items) - 1

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, math.nan)

    def nan_codes(*shape: int) -> Tensor:
        return torch.full(shape, 0x7F, dtype=torch.uint8)

    order = as_layout(case.order)
    always = shared or Fp8Experts(case.w13[:1], case.w13_scale[:1], case.w2[:1], case.w2_scale[:1])
    _, strides = pairs(case.w13, order is GateUpLayout.INTERLEAVED)
    counters = torch.zeros(num_counters(items, rows, hidden, inter), dtype=torch.int32)
    out = nan(tokens, hidden).bfloat16()
    scale_strides = (0, 0) if x_scale is None else x_scale.stride()
    arguments = (
        grid, case.w13, case.w2, always.w13, always.w2, torch.tensor(strides), *tables, weights, tokens, ids.shape[1],
        int(shared is not None), hidden, inter, local, int(order is GateUpLayout.INTERLEAVED),
        int(order is not GateUpLayout.UP_GATE), x, int(x.dtype is torch.bfloat16), x_scale, *scale_strides, x_weight,
        case.w13_scale, case.w2_scale, always.w13_scale, always.w2_scale, rows, nan_codes(blocks(hidden), rows, 128),
        nan(blocks(hidden), rows), nan(rows, inter), nan_codes(blocks(inter), rows, 128), nan(blocks(inter), rows),
        nan(rows, hidden), out, counters, items, limit, int(pow2),
    )  # fmt: skip
    stream(*(argument(value) for value in arguments))
    return out


def argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous() or value.dim() == 2
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value or 0)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# tokens, hidden, I, experts, choices, blocks
FEW_ROWS, NARROW, ONE_STRIP = (3, 512, 256, 3, 2, 8), (20, 512, 256, 3, 2, 8), (2, 256, 128, 4, 2, 2)
STRIPS, NARROW_STRIPS, MANY_ROWS = (4, 1152, 256, 6, 3, 2), (3, 1152, 128, 3, 2, 4), (150, 256, 128, 2, 2, 2)


@pytest.mark.parametrize("order", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize("sizes", [FEW_ROWS, NARROW, ONE_STRIP, STRIPS, NARROW_STRIPS, MANY_ROWS])
def test_as_the_reference(sizes: tuple[int, ...], order: str, stream: Any) -> None:
    tokens, hidden, inter, local, choices, grid = sizes
    case = make_case(
        "realistic", tokens=tokens, hidden=hidden, inter=inter, local=local, choices=choices, num_experts=local + 1,
        order=order,
    )  # fmt: skip
    case.ids[case.ids == local] = -1
    experts = Fp8Experts(case.w13, case.w13_scale, case.w2, case.w2_scale)
    got = run(stream, case, case.x, case.x_scale, grid)
    want = moe_fp8(case.x, case.x_scale, experts, case.weights, local_ids(case.ids, local), order=as_layout(order))
    assert relative_error(got, want) <= 0.003


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize(("inter", "grid"), [(256, 11), (192, 8), (128, 6)])
def test_a_token_alone_and_in_a_batch(inter: int, grid: int, dtype: torch.dtype, stream: Any) -> None:
    """The same bits, with a shared expert, a clamp and a weight of x."""
    case = make_case("realistic", tokens=40, hidden=640, inter=inter, local=3, choices=2, num_experts=4)
    case.ids[case.ids == 3] = -1
    extra = make_case("realistic", tokens=1, hidden=640, inter=inter, local=1, seed=3)
    shared = Fp8Experts(extra.w13, extra.w13_scale, extra.w2, extra.w2_scale)
    x = case.x if dtype is torch.float8_e4m3fn else torch.randn(40, 640).to(dtype)
    x_scale = case.x_scale if dtype is torch.float8_e4m3fn else None
    options: dict[str, Any] = {"grid": grid, "shared": shared, "limit": 0.5, "pow2": True}
    x_weight = torch.rand(40)
    whole = run(stream, case, x, x_scale, x_weight=x_weight, **options)
    for first, end in ((0, 1), (5, 7), (17, 21)):
        part = slice(first, end)
        few = replace(case, ids=case.ids[part], weights=case.weights[part])
        scale = None if x_scale is None else x_scale[part]
        got = run(stream, few, x[part], scale, x_weight=x_weight[part].clone(), **options)
        assert torch.equal(got, whole[part])
