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
from supersonic_moe.kernels.sm90.route_rows import Choices, RowTables, max_items, place_topk
from supersonic_moe.kernels.sm90.stream_experts import Scratch, num_counters, stream_experts
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
    expected: Stages


def stream(case: Case, *, limit: float | None = None, pow2: bool = False) -> Streamed:
    """All experts of ``case`` are local. Scratch and tables start as NaN or as an index that nobody may follow."""
    device = torch.device("cuda")
    experts = Fp8Experts(*(t.to(device) for t in (case.w13, case.w13_scale, case.w2, case.w2_scale)))
    x, x_scale, ids = case.x.to(device), case.x_scale.to(device), case.ids.to(device)
    (tokens, choices), (num_local, hidden, inter) = ids.shape, experts.w2.shape
    rows = tokens * choices
    items = max_items(num_local, rows)

    def poison(*shape: int) -> Tensor:
        return torch.full(shape, -(2**30), dtype=torch.int32, device=device)

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, device=device)

    tables = RowTables(
        offsets=poison(num_local + 1),
        tile_offsets=None,
        items=poison(1 + items, 4),
        row_slot=poison(rows),
        slot_row=poison(tokens, choices),
        weights=nan(tokens, choices),
        counters=poison(num_counters(items, inter)),
        counts=poison(132, num_local),
        counter_words=num_counters(items, inter),
        max_items=items,
        stream_rows=rows,
    )
    codes = torch.full((rows, inter), 0x7F, dtype=torch.uint8, device=device).view(E4M3)
    scratch = Scratch(rows, nan(rows, inter), codes, nan(rows, blocks(inter)), nan(rows, hidden))
    place = Choices(num_local, num_local, 0, choices, shared=False)
    place_topk(ids, case.weights.to(device), None, 1.0, place, tables)
    order = as_layout(case.order)
    stream_experts(
        x, x_scale, experts, None, tables, choices, scratch, order=order, limit=limit, pow2=pow2
    )  # fmt: skip

    expected = expert_rows(
        dequantize(x, x_scale, torch.float32), experts, local_ids(ids, num_local), order=order, limit=limit, pow2=pow2
    )
    assert isinstance(tables.offsets, Tensor) and isinstance(tables.row_slot, Tensor)
    used = int(tables.offsets[-1])
    assert tables.row_slot[:used].tolist() == expected.slot_P.tolist()
    for unused in scratch[1:]:
        assert isinstance(unused, Tensor)
        assert unused[used:].float().isnan().all(), "a row past the last was written"
    c, q, scale, y = (t[:used] for t in scratch[1:] if isinstance(t, Tensor))
    multiplied = dequantize(q, scale, torch.float32)
    own = [
        multiplied[begin:end] @ dequantize(experts.w2[e], experts.w2_scale[e], torch.float32).T
        for e, (begin, end) in enumerate(zip(tables.offsets[:-1].tolist(), tables.offsets[1:].tolist(), strict=True))
    ]
    return Streamed(expected.slot_P, c, q, scale, y, torch.cat(own), expected)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
