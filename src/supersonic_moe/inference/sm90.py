"""The inference operator as a list of sm_90a kernel calls: route, then multiply and combine.

Rows are streamed (``kernels/sm90/stream_experts.py``) where an expert has few of them, and go through the tile kernels
of the FP8 layer where it has many. The host knows only T * K, a bound of the rows of this rank. Up to 128 E_local of
them everything is streamed, in two launches. Beyond, the router counts on the device and writes who works: the
streaming kernel up to ``MEAN_ROWS`` rows an expert on average, else the tile kernels; the others find nothing to do. A
hot expert among streamed ones takes a pass over its weights for each 128 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.config.grouped_routing import GroupedRouting
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.inference.workspace import ALIGNMENT, regions, streamed_rows, workspace_bytes
from supersonic_moe.kernels.interface import Gate, Groups, Quantized, Rows
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90.combine_rows import combine_rows
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.sm90.route_rows import Choices, RowTables, max_items, place_topk, route_rows
from supersonic_moe.kernels.sm90.stream_experts import Inputs, Scratch, num_counters, plane_rows, stream_experts
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8
from supersonic_moe.kernels.triton.quantize import quantize_rows_into
from supersonic_moe.quantization.block_format import E4M3, blocks

MEAN_ROWS = (
    96  # streamed rows of an expert on average, where the device decides; a tile of 128 rows costs as much as 150
)


class Layer(NamedTuple):
    """What a call computes beside routing."""

    experts: Fp8Experts
    shared: Fp8Experts | None
    order: GateUpLayout
    limit: float | None = None
    pow2: bool = False
    x_weight_T: Tensor | None = None


def ds_routed(
    logits: Tensor,
    bias: Tensor | None,
    rule: GroupedRouting,
    offset: int,
    x: Tensor,
    x_scale: Tensor,
    layer: Layer,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    choices = Choices(rule.num_experts, layer.experts.w13.shape[0], offset, rule.top_k, shared=False)
    _run(lambda tables: route_rows(logits, bias, rule, choices, tables), choices, x, x_scale, layer, out, workspace)


def topk(
    ids: Tensor,
    weights: Tensor,
    expert_map: Tensor | None,
    offset: int,
    num_experts: int | None,
    factor: float,
    weight_on_input: bool,
    x: Tensor,
    x_scale: Tensor | None,
    layer: Layer,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    known = expert_map.shape[0] if expert_map is not None else num_experts
    choices = Choices(
        known if known is not None else 2**31 - 1, layer.experts.w13.shape[0], offset, ids.shape[1],
        shared=layer.shared is not None,
    )  # fmt: skip
    if weight_on_input:
        layer = layer._replace(x_weight_T=weights)

    def place(tables: RowTables) -> None:
        place_topk(ids, None if weight_on_input else weights, expert_map, factor, choices, tables)

    _run(place, choices, x, x_scale, layer, out, workspace)


def _run(
    route: Callable[[RowTables], None],
    choices: Choices,
    x: Tensor,
    x_scale: Tensor | None,
    layer: Layer,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    hidden, inter = layer.experts.w2.shape[1:]
    sizes = (x.shape[0], choices.per_token, hidden, inter, choices.num_local)
    if workspace is None:
        workspace = torch.empty(workspace_bytes(*sizes), dtype=torch.uint8, device=x.device)
    base = workspace.data_ptr()
    if base % ALIGNMENT:
        raise ValueError(
            f"workspace must start at a multiple of {ALIGNMENT} bytes; got address {base:#x}. Pass a whole buffer, or "
            "a slice that starts at such a multiple."
        )
    at = regions(*sizes)
    rows = x.shape[0] * choices.per_token
    streamed = streamed_rows(rows, inter, choices.num_local)
    tiles = rows > streamed
    items = max_items(choices.num_local, streamed)
    tables = RowTables(
        offsets=base + at.offsets if tiles else None,
        items=base + at.items,
        row_slot=base + at.row_slot,
        slot_row=base + at.slot_row,
        weights=base + at.weights,
        counters=base + at.counters,
        counts=base + at.counts,
        counter_words=num_counters(items, hidden, inter),
        max_items=items,
        stream_rows=MEAN_ROWS * choices.num_local if tiles else rows,
    )
    route(tables)
    if tiles and x_scale is None:
        codes = _view(workspace, at.x, E4M3, *x.shape)
        scales = _view(workspace, at.x_scale, torch.float32, x.shape[0], blocks(hidden))
        x, x_scale = quantize_rows_into(Quantized(codes, scales), x, layer.pow2)
    scratch = Scratch(
        plane_rows(streamed, choices.num_local), base + at.x_rows, base + at.x_rows_scale, base + at.c,
        base + at.c_codes, base + at.c_scale, base + at.y,
    )  # fmt: skip
    stream_experts(
        Inputs(x, x_scale, layer.x_weight_T), layer.experts, layer.shared, tables, choices.per_token, scratch, out,
        order=layer.order, limit=layer.limit, pow2=layer.pow2,
    )  # fmt: skip
    if not tiles:
        return
    assert x_scale is not None
    row_slot_P = _view(workspace, at.row_slot, torch.int32, rows)
    offsets = _view(workspace, at.offsets, torch.int32, choices.num_local + 1)
    y_PH, y_shared_TH = _multiply_tiles(x, x_scale, layer, row_slot_P // choices.per_token, offsets)
    combine_rows(y_PH, y_shared_TH, tables, choices.per_token, out)


def _multiply_tiles(
    x: Tensor, x_scale: Tensor, layer: Layer, token_P: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """y of the routed rows (P, H) and of the shared expert (T, H) in bf16, through the tile kernels."""
    gate = Gate(Activation(ActivationType.SWIGLU, limit=layer.limit), layer.order)
    recipe = Fp8Recipe(scale="pow2" if layer.pow2 else "fp32")

    def multiply(experts: Fp8Experts, scale: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        gathered = Rows(Quantized(x, scale.contiguous()), rows)
        w13, w2 = Quantized(experts.w13, experts.w13_scale), Quantized(experts.w2, experts.w2_scale)
        _, c = up_projection_fp8(gathered, w13, None, Groups(offsets, rows), gate, recipe, save=False)
        return grouped_mm_fp8(Rows(c), w2, offsets)

    routed = layer.experts.w13.shape[0]
    scale = x_scale if layer.x_weight_T is None else x_scale * layer.x_weight_T.view(-1, 1)
    y_PH = multiply(layer.experts, scale, token_P, offsets[: routed + 1])
    if layer.shared is None:
        return y_PH, None
    everyone = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    return y_PH, multiply(layer.shared, x_scale, everyone, offsets[routed:] - offsets[routed])


def _view(workspace: Tensor, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return workspace[start : start + size].view(dtype).view(shape)
