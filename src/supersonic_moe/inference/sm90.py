"""The inference operator as a list of sm_90a kernel calls: route, then multiply and combine.

Rows are streamed (``kernels/sm90/stream_experts.py``) where an expert has few of them, in two launches up to 128 tokens
and three beyond, and go through the tile kernels of the FP8 layer where it has many. The host knows only T * K, a bound
of the rows of this rank, and which share of the experts is here; ``workspace.streams`` decides by these. A hot expert
among streamed ones takes its turn once for each 128 rows, with its weights in L2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.config.grouped_routing import GroupedRouting
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.inference.workspace import (
    ALIGNMENT,
    pairs,
    regions,
    scale_rows,
    streamed_rows,
    streams,
    workspace_bytes,
)
from supersonic_moe.jit.launch import Launch, on_device
from supersonic_moe.kernels.alignment import ALIGNMENT as VECTOR
from supersonic_moe.kernels.alignment import aligned
from supersonic_moe.kernels.interface import Gate, Quantized, Rows, UpProjection
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90.combine_rows import combine_rows
from supersonic_moe.kernels.sm90.down_projection_fp8 import down_projection_fp8
from supersonic_moe.kernels.sm90.grouped_gemm_fp8 import grouped_mm_fp8
from supersonic_moe.kernels.sm90.rank_tokens import RankTokens
from supersonic_moe.kernels.sm90.route_rows import Choices, RowTables, max_items, place_topk, route_rows
from supersonic_moe.kernels.sm90.stream_experts import (
    Inputs,
    Scratch,
    num_counters,
    plane_rows,
    stream_experts,
    stream_experts_ranks,
)
from supersonic_moe.kernels.sm90.up_projection_fp8 import up_projection_fp8_into
from supersonic_moe.kernels.triton.quantize import quantize_rows
from supersonic_moe.kernels.triton.scatter_quantized import scatter_quantized
from supersonic_moe.quantization.block_format import E4M3, blocks

UNKNOWN = 2**31 - 1  # experts of the model: no id is out of range


class Layer(NamedTuple):
    """What a call computes beside routing."""

    experts: Fp8Experts
    shared: Fp8Experts | None
    order: GateUpLayout
    limit: float | None = None
    pow2: bool = False
    x_weight_T: Tensor | None = None


class Call(NamedTuple):
    """One call: where a token's choices come from, what the experts are fed, and where the result goes."""

    route: Callable[[RowTables], list[Launch]]
    choices: Choices
    x: Tensor
    x_scale: Tensor | None
    layer: Layer
    out: Tensor
    received: Tensor | None = None
    """Where the rows of each expert are added."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Arguments of ``workspace_bytes``."""
        hidden, inter = self.layer.experts.w2.shape[1:]
        return self.x.shape[0], self.choices.per_token, hidden, inter, self.choices.num_local

    @property
    def rows(self) -> int:
        return self.x.shape[0] * self.choices.per_token

    @property
    def streamed(self) -> int:
        """How many of the rows may be streamed."""
        return streamed_rows(self.rows, self.layer.experts.w2.shape[2], self.choices.num_local)

    @property
    def launches_only(self) -> bool:
        """Whether all that the call does is kernels of this package, which a replay can launch again."""
        return not self.tiles or self.layer.shared is None

    @property
    def tiles(self) -> bool:
        """Whether the tile kernels get the rows; else they are streamed."""
        hidden, inter = self.layer.experts.w2.shape[1:]
        return not streams(self.rows, self.expected_rows, hidden, inter, self.choices.num_local)

    @property
    def expected_rows(self) -> float:
        """If all experts are chosen alike."""
        choices = self.choices
        here = 1.0 if choices.num_experts == UNKNOWN else choices.routed / choices.num_experts
        return self.x.shape[0] * (choices.top_k * here + choices.shared)

    @property
    def pairs(self) -> bool:
        """Whether tiles of an expert's rows are multiplied two at a time."""
        return pairs(self.expected_rows, self.choices.num_local)


def ds_routed(
    logits: Tensor, bias: Tensor | None, rule: GroupedRouting, offset: int, x: Tensor, x_scale: Tensor, layer: Layer,
    out: Tensor,
) -> Call:  # fmt: skip
    choices = Choices(rule.num_experts, layer.experts.w13.shape[0], offset, rule.top_k, shared=False)
    route = functools.partial(route_rows, logits, bias, rule, choices)
    return Call(route, choices, x, x_scale, layer, out)


def topk(
    ids: Tensor, weights: Tensor, expert_map: Tensor | None, offset: int, num_experts: int | None, factor: float,
    weight_on_input: bool, x: Tensor, x_scale: Tensor | None, layer: Layer, out: Tensor, received: Tensor | None,
) -> Call:  # fmt: skip
    known = expert_map.shape[0] if expert_map is not None else num_experts
    choices = Choices(
        known if known is not None else UNKNOWN, layer.experts.w13.shape[0], offset, ids.shape[1],
        shared=layer.shared is not None,
    )  # fmt: skip
    if weight_on_input:
        layer = layer._replace(x_weight_T=weights)
    route = functools.partial(place_topk, ids, None if weight_on_input else weights, expert_map, factor, choices)
    return Call(route, choices, x, x_scale, layer, out, received)


def run(call: Call, workspace: Tensor | None) -> None:
    if workspace is None:
        workspace = torch.empty(workspace_bytes(*call.sizes), dtype=torch.uint8, device=call.x.device)
    if workspace.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"workspace must start at a multiple of {ALIGNMENT} bytes; got address {workspace.data_ptr():#x}. Pass a "
            "whole buffer, or a slice that starts at such a multiple."
        )
    if call.x.data_ptr() % VECTOR:
        call = call._replace(x=call.x.clone())
    experts, shared = call.layer.experts, call.layer.shared
    if any(t.data_ptr() % VECTOR for held in (experts, shared or experts) for t in (held.w13, held.w2)):
        placed = call.layer._replace(
            experts=aligned(experts, VECTOR, "w13", "w2"),
            shared=None if shared is None else aligned(shared, VECTOR, "w13", "w2"),
        )
        call = call._replace(layer=placed)
    out = call.out
    if out.data_ptr() % VECTOR:
        call = call._replace(out=torch.empty_like(out))
    with on_device(call.x):
        _launch(call, workspace)
    if call.out is not out:
        out.copy_(call.out)


def launches_of_ranks(
    tokens: RankTokens, phase: int, ids_UK: Tensor, weights_UK: Tensor, offset: int, num_experts: int, layer: Layer,
    received: Tensor | None, workspace: int,
) -> list[Launch]:  # fmt: skip
    """What a call does for tokens that lie in the memory of several ranks, U places in all, with their choices here.
    All rows are streamed.
    """
    x = out = ids_UK  # of which only the number of tokens counts: they lie elsewhere
    call = topk(ids_UK, weights_UK, None, offset, num_experts, 1.0, False, x, None, layer, out, received)
    tables, scratch = _tables(call, workspace, tiles=False), _scratch(call, workspace)
    stream = stream_experts_ranks(
        tokens, phase, layer.experts, tables, call.choices.per_token, scratch, order=layer.order, limit=layer.limit,
        pow2=layer.pow2,
    )  # fmt: skip
    return [*call.route(tables), stream]


def _launch(call: Call, workspace: Tensor) -> None:
    base, tiles = workspace.data_ptr(), call.tiles
    tables = _tables(call, base, tiles)
    for launch in call.route(tables):
        launch.run()
    if tiles:
        _multiply_tiles(call, tables, workspace)
    else:
        _stream(call, tables, base).run()


def _tables(call: Call, base: int, tiles: bool) -> RowTables:
    at, local = regions(*call.sizes), call.choices.num_local
    hidden, inter = call.layer.experts.w2.shape[1:]
    items = max_items(local, call.streamed)
    return RowTables(
        offsets=base + at.offsets if tiles else None,
        items=base + at.items,
        row_slot=base + at.row_slot,
        row_token=base + at.row_token if tiles else None,
        row_out=base + at.row_out if tiles else None,
        slot_row=base + at.slot_row,
        weights=base + at.weights,
        counters=base + at.counters,
        counts=base + at.counts,
        counter_words=0 if tiles else num_counters(items, plane_rows(call.streamed, local), hidden, inter),
        max_items=items,
        received=call.received,
    )


def _stream(call: Call, tables: RowTables, base: int) -> Launch:
    layer = call.layer
    return stream_experts(
        Inputs(call.x, call.x_scale, layer.x_weight_T), layer.experts, layer.shared, tables, call.choices.per_token,
        _scratch(call, base), call.out, order=layer.order, limit=layer.limit, pow2=layer.pow2,
    )  # fmt: skip


def _scratch(call: Call, base: int) -> Scratch:
    at = regions(*call.sizes)
    return Scratch(
        plane_rows(call.streamed, call.choices.num_local), base + at.x_rows, base + at.x_rows_scale, base + at.c,
        base + at.c_codes, base + at.c_scale, base + at.y,
    )  # fmt: skip


def _multiply_tiles(call: Call, tables: RowTables, workspace: Tensor) -> None:
    """``call.out`` through the tile kernels. Rows of x are put in order first, and quantized on the way, in memory that
    y takes later, which is cheaper than a gather inside the product. A token of one row has its output from the
    down-projection itself; a shared expert gives every token a row, and its products are grouped GEMMs of one group.
    """
    x, layer, at, choices = call.x, call.layer, regions(*call.sizes), call.choices
    routed = choices.routed
    gate = Gate(Activation(ActivationType.SWIGLU, limit=layer.limit), layer.order)
    recipe = Fp8Recipe(scale="pow2" if layer.pow2 else "fp32")

    def activations(
        experts: Fp8Experts, rows: Rows[Quantized], offsets: Tensor, into: Quantized | None = None
    ) -> Quantized:
        w13 = Quantized(experts.w13, experts.w13_scale)
        step = UpProjection(rows, w13, None, offsets, token_P, gate, save=False)
        return up_projection_fp8_into(step, recipe, into, pairs=into is not None and call.pairs)[1]

    def quantized(codes: int, scales: int, columns: int) -> Quantized:
        scale_BP = _view(workspace, scales, torch.float32, blocks(columns), scale_rows(call.rows))
        return Quantized(_view(workspace, codes, E4M3, call.rows, columns), scale_BP.t()[: call.rows])

    token_P = _view(workspace, at.row_token, torch.int32, call.rows)
    offsets = _view(workspace, at.offsets, torch.int32, choices.num_local + 1)
    row_TS = _view(workspace, at.slot_row, torch.int32, x.shape[0], choices.per_token)
    y_PH = _view(workspace, at.tile_y, torch.bfloat16, call.rows, x.shape[1])
    rows = quantized(at.tile_y, at.tile_x_scale, x.shape[1])
    scatter_quantized(rows, x, call.x_scale, row_TS, choices.top_k, layer.x_weight_T, layer.pow2)
    c = quantized(at.tile_c, at.tile_c_scale, layer.experts.w2.shape[2])
    c = activations(layer.experts, Rows(rows), offsets[: routed + 1], c)
    w2 = Quantized(layer.experts.w2, layer.experts.w2_scale)
    assert tables.row_out is not None
    down_projection_fp8(c, w2, offsets[: routed + 1], tables.row_out, y_PH, call.out, call.pairs)
    y_shared_TH = None
    if layer.shared is not None:
        x_T = quantize_rows(x, layer.pow2) if call.x_scale is None else Quantized(x, call.x_scale.contiguous())
        everyone, of_shared = torch.arange(x.shape[0], dtype=torch.int32, device=x.device), offsets[routed:]
        of_shared = of_shared - of_shared[0]
        c = activations(layer.shared, Rows(x_T, everyone), of_shared)
        y_shared_TH = grouped_mm_fp8(Rows(c), Quantized(layer.shared.w2, layer.shared.w2_scale), of_shared)
    combine_rows(y_PH, y_shared_TH, tables, choices.per_token, call.out)


def _view(workspace: Tensor, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return workspace[start : start + size].view(dtype).view(shape)
