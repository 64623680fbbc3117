"""The streaming kernel on a GPU with every stage compared to the reference: what the kernel leaves in its scratch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from inference_oracle import Case
from torch import Tensor

from supersonic_moe.config.activation import as_layout
from supersonic_moe.kernels.reference import local_ids
from supersonic_moe.kernels.reference.inference import Fp8Experts, Stages, expert_rows
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.sm90.route_rows import Choices, RowTables, max_items, padded_rows, place_topk
from supersonic_moe.kernels.sm90.stream_experts import Inputs, Scratch, num_counters, plane_rows, stream_experts
from supersonic_moe.quantization.block_format import E4M3, blocks


class Streamed(NamedTuple):
    """Rows in use only, sorted by expert; ``expected`` is the reference from the same x and weights."""

    slot_P: Tensor
    c_PI: Tensor
    q_PI: Tensor
    q_scale_PB: Tensor
    y_PH: Tensor
    y_of_own_codes_PH: Tensor
    """What the second product should be, given the codes that the kernel made."""
    out_TH: Tensor
    expected: Stages


def stream(case: Case, *, limit: float | None = None, pow2: bool = False) -> Streamed:
    """All experts of ``case`` are local. Scratch and tables start as NaN or as an index that nobody may follow."""
    device = torch.device("cuda")
    experts = Fp8Experts(*(t.to(device) for t in (case.w13, case.w13_scale, case.w2, case.w2_scale)))
    x, x_scale, ids = case.x.to(device), case.x_scale.to(device), case.ids.to(device)
    (tokens, choices), (num_local, hidden, inter) = ids.shape, experts.w2.shape
    rows = tokens * choices
    items = max_items(num_local, rows)
    padded = padded_rows(rows, num_local)
    planes = plane_rows(rows, num_local)

    def poison(*shape: int) -> Tensor:
        return torch.full(shape, -(2**30), dtype=torch.int32, device=device)

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, device=device)

    def nan_codes(*shape: int) -> Tensor:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device)

    tables = RowTables(
        offsets=None,
        items=poison(1 + items, 4),
        row_slot=poison(padded),
        row_token=None,
        row_out=None,
        slot_row=poison(tokens, choices),
        weights=nan(tokens, choices),
        counters=poison(num_counters(items, planes, hidden, inter)),
        counts=poison(132, num_local),
        counter_words=num_counters(items, planes, hidden, inter),
        max_items=items,
    )
    scratch = Scratch(
        planes, nan_codes(blocks(hidden), planes, 128), nan(blocks(hidden), planes), nan(planes, inter),
        nan_codes(blocks(inter), planes, 128), nan(blocks(inter), planes), nan(planes, hidden),
    )  # fmt: skip
    place = Choices(num_local, num_local, 0, choices, shared=False)
    for launch in place_topk(ids, case.weights.to(device), None, 1.0, place, tables):
        launch.run()
    out = nan(tokens, hidden).bfloat16()
    stream_experts(
        Inputs(x, x_scale), experts, None, tables, choices, scratch, out, order=as_layout(case.order), limit=limit,
        pow2=pow2,
    ).run()  # fmt: skip

    order = as_layout(case.order)
    expected = expert_rows(
        dequantize(x, x_scale, torch.float32), experts, local_ids(ids, num_local), order=order, limit=limit, pow2=pow2
    )
    row_slot = tables.row_slot[: int(tables.items[0, 2])]
    used = (row_slot >= 0).nonzero().flatten()
    assert row_slot[used].tolist() == expected.slot_P.tolist()
    unused = torch.ones(planes, dtype=torch.bool, device=device)
    unused[used] = False
    for by_row in (scratch.c, scratch.y, scratch.c_scale.T, unswizzled(scratch.c_codes, inter).float()):
        assert by_row[unused].isnan().all(), "a row that nobody has was written"
    c, y, scale, q = (t[used] for t in (scratch.c, scratch.y, scratch.c_scale.T, unswizzled(scratch.c_codes, inter)))
    multiplied = dequantize(q, scale, torch.float32)
    expert = local_ids(ids, num_local).flatten()[expected.slot_P]
    own = torch.zeros_like(y)
    for e in range(num_local):
        own[expert == e] = multiplied[expert == e] @ dequantize(experts.w2[e], experts.w2_scale[e], torch.float32).T
    return Streamed(expected.slot_P, c, q, scale, y, own, out, expected)


def unswizzled(planes: Tensor, columns: int) -> Tensor:
    """(rows, columns) in e4m3 of planes (blocks, rows, 128)."""
    count, rows, _ = planes.shape
    at = torch.arange(rows, device=planes.device)[:, None] % 8 ^ torch.arange(8, device=planes.device)
    chunks = planes.view(count, rows, 8, 16).gather(2, at[None, :, :, None].expand(count, rows, 8, 16))
    return chunks.view(count, rows, 128).transpose(0, 1).reshape(rows, count * 128)[:, :columns].contiguous().view(E4M3)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
