"""Experts of few rows in the FP8 inference operator on sm_90a, from rows to the combined output, in one launch: weights
stream through once.

    c = silu(gate) * up of  x w13^T        in fp32, then e4m3 with a scale of 1 x 128
    y = c w2^T                             in fp32
    out[t] = sum over the rows of t of weight * y, in ascending order of the choices, in bf16

Layout (row-major; formats: ``quantization/block_format.py``)
    x (T, H): e4m3 with scales (T, H / 128) in any strides, or bf16, quantized here. Rows sorted by expert, as
    route_rows.py lists them: items of up to 128 rows of an expert. Weights and scales as a checkpoint stores them
    (``kernels/reference/inference.py``). x and c of each row lie in planes, one for each 128 of K, swizzled as shared
    memory wants them: an item's rows of a K block are one copy.
Tiles
    Weights are the M operand of wgmma, an item's rows its N: 8, 16, 24, 32, 48, 64, 96 or 128. A tile is 128 weight
    rows, 64 where there are few tiles, times all rows of an item; K in blocks of 128, through a ring of 216 KB. Blocks
    take strips from a counter: first W13 of all items, a tile each, then W2 of all items, up to 16 K blocks each. Of
    wide tiles each of the two math warpgroups has a half. Narrow ones are so few that a counter would hand them out
    unevenly: block b of B takes strips b, b + B, ..., and its warpgroups take turns, so that one multiplies while the
    other stores its sums and tells of them. W13 is read through a five-dimensional map, (expert, I / 8, half, 8 rows,
    H): each 16 rows of a tile are 8 gate rows and their 8 up rows, so that both of a channel are in one thread,
    whatever the order of rows in memory.
Waiting
    Rows of x are gathered while the first weights arrive. The last warpgroup to write its part of 128 channels of c
    quantizes them; W2 is loaded before c is there, only the loads of c wait. 128 columns of the output are combined
    when all items have stored theirs. The grid is one block a multiprocessor, so every block that another waits for
    runs; no wait is unbounded.
Maths
    fp32 registers add up what wgmma sums over 128 of K. The order of operations on a row depends on that row alone, not
    on N, on the tile or on the block that takes it.
Cost
    Bytes: 3 I H for each expert that is hit, once for each 128 rows; 10 R H + 10 R I of intermediates through L2. Bound
    by DRAM up to about 130 rows an expert.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.jit.launch import Kernel, Launch, kernel_of
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90.gemm_config import multiprocessors
from supersonic_moe.kernels.sm90.rank_tokens import STREAM_LIMIT_S, X_LEFT, RankTokens
from supersonic_moe.kernels.sm90.route_rows import Buffer, RowTables, padded_rows
from supersonic_moe.quantization.block_format import BLOCK, blocks

THREADS = 320
SMEM_BYTES = 216 * 1024 + 11264  # the ring; items, queue and barriers: stream/work.cuh
TILE_ROWS = (128, 64)
L2_PROMOTION = 128  # bytes: 4.42 TB/s where 256 gives 4.22 (docs/log.md)
OPCODES = ("QGMMA", "UTMALDG.5D", "UTMALDG.3D", "UBLKCP", "REDUX.MAX")
GATHER_ROWS = 64
COLUMNS_BEHIND = 24  # rows that may be read behind an item: N is up to 31 more than its rows, of which 7 are padding

SPECS = (
    KernelSpec(
        "stream_experts",
        "stream_experts.cu",
        (("SMEM_BYTES", SMEM_BYTES), ("RANKS", 0)),
        THREADS,
        SMEM_BYTES,
        opcodes=OPCODES,
        pdl=True,
    ),
    KernelSpec(
        "stream_experts_ranks",
        "stream_experts_ranks.cu",
        (("SMEM_BYTES", SMEM_BYTES), ("RANKS", 1)),
        THREADS,
        SMEM_BYTES,
        opcodes=(*OPCODES, "LDG.E.128.STRONG.SYS", "LDG.E.64.STRONG.SYS"),
        pdl=True,
    ),
)


class Inputs(NamedTuple):
    """What the experts are fed."""

    x_TH: Tensor
    """e4m3, or bf16: quantized here."""
    x_scale_TB: Tensor | None
    """float32, any strides; of e4m3 x."""
    weight_T: Tensor | None = None
    """float32, multiplies x for the routed experts; None: 1."""


class Scratch(NamedTuple):
    """What the kernel writes, for ``rows`` padded rows, R >= plane_rows(...). Nothing of it has to be initialised."""

    rows: int
    x: Buffer
    """(H / 128, R, 128) e4m3"""
    x_scale: Buffer
    """(H / 128, R) float32"""
    c: Buffer
    """(R, I) float32"""
    c_codes: Buffer
    """(ceil(I / 128), R, 128) e4m3"""
    c_scale: Buffer
    """(ceil(I / 128), R) float32"""
    y: Buffer
    """(R, H) float32"""


def plane_rows(rows: int, num_local: int) -> int:
    """R of ``Scratch`` for ``rows`` slots."""
    return padded_rows(rows, num_local) + COLUMNS_BEHIND


def num_counters(items: int, planes: int, hidden: int, intermediate: int) -> int:
    """Words of ``Problem::counters`` (stream/work.cuh) for so many items and rows of a plane."""
    return 4 + blocks(hidden) + items * (1 + blocks(intermediate)) + -(-planes // GATHER_ROWS)


@functools.cache
def _kernel(of_ranks: bool) -> Kernel:
    return kernel_of(SPECS[of_ranks])


def stream_experts(
    inputs: Inputs,
    experts: Fp8Experts,
    shared: Fp8Experts | None,
    tables: RowTables,
    choices: int,
    scratch: Scratch,
    out_TH: Tensor,
    *,
    order: GateUpLayout,
    limit: float | None = None,
    pow2: bool = False,
) -> Launch:
    """The launch that writes ``scratch`` for all rows of the items in ``tables`` and ``out_TH`` (bf16) for all tokens.

    Args:
        choices: C, slots of a token.
        shared: one expert (E = 1), local expert number E of the tables.
        limit: clamps gate from above and up on both sides.
        pow2: scales that are made here are powers of two.
    """
    x = inputs.x_TH
    always = experts if shared is None else shared
    x_scale_row, x_scale_k = (0, 0) if inputs.x_scale_TB is None else inputs.x_scale_TB.stride()
    arguments = dict(
        **_same(experts, tables, choices, scratch, order, limit, pow2),
        **_weights("shared_", always, order),
        tokens=x.shape[0],
        shared_expert=int(shared is not None),
        x=x,
        x_bf16=int(x.dtype is torch.bfloat16),
        x_scale=inputs.x_scale_TB,
        x_scale_row=x_scale_row,
        x_scale_k=x_scale_k,
        x_weight=inputs.weight_T,
        out=out_TH,
    )
    return Launch(_kernel(False), (multiprocessors(x.get_device()), 1, 1), arguments)


def stream_experts_ranks(
    tokens: RankTokens,
    phase: int,
    experts: Fp8Experts,
    tables: RowTables,
    choices: int,
    scratch: Scratch,
    *,
    order: GateUpLayout,
    limit: float | None = None,
    pow2: bool = False,
) -> Launch:
    """The same for the tokens of all ranks, R·M of them: x is read in the memory of its rank once that has told of it,
    and what the experts here make of a token is written into the memory of its rank (rank_tokens.py). Tokens without a
    row here get nothing.
    """
    at, flags = tokens.at, tokens.arguments(phase)
    arguments = dict(
        **_same(experts, tables, choices, scratch, order, limit, pow2),
        **flags | {"limit_ns": min(flags["limit_ns"], int(STREAM_LIMIT_S * 1e9))},
        left=X_LEFT,
        places=tokens.places,
        codes_at=at.codes,
        scales_at=at.scales,
        out_at=at.parts,
    )
    return Launch(_kernel(True), (multiprocessors(experts.w13.get_device()), 1, 1), arguments)


def _same(
    experts: Fp8Experts, tables: RowTables, choices: int, scratch: Scratch, order: GateUpLayout, limit: float | None,
    pow2: bool,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of both kernels."""
    hidden, inter = experts.w2.shape[1:]
    return dict(
        **_weights("", experts, order),
        items=tables.items,
        row_slot=tables.row_slot,
        slot_row=tables.slot_row,
        slot_weight=tables.weights,
        choices=choices,
        hidden=hidden,
        inter=inter,
        routed=experts.w13.shape[0],
        interleaved=int(order is GateUpLayout.INTERLEAVED),
        gate_first=int(order is not GateUpLayout.UP_GATE),
        plane_rows=scratch.rows,
        x_codes=scratch.x,
        x_code_scale=scratch.x_scale,
        c=scratch.c,
        c_codes=scratch.c_codes,
        c_scale=scratch.c_scale,
        y=scratch.y,
        counters=tables.counters,
        max_items=tables.max_items,
        limit=math.inf if limit is None else limit,
        pow2=int(pow2),
    )


def _weights(of: str, experts: Fp8Experts, order: GateUpLayout) -> dict[str, TensorMap | Tensor]:
    """The kernel's arguments: scales, and W13 and W2 in boxes of 128 and of 64 rows, 128 bytes each."""
    arguments: dict[str, TensorMap | Tensor] = {
        f"{of}w13_scale": experts.w13_scale,
        f"{of}w2_scale": experts.w2_scale,
    }
    for kind, rows in zip(("", "_narrow"), TILE_ROWS, strict=True):
        arguments[f"map_{of}w13{kind}"] = map_of_pairs(experts.w13, order is GateUpLayout.INTERLEAVED, rows)
        arguments[f"map_{of}w2{kind}"] = tensor_map(experts.w2, box=(1, rows, BLOCK), l2_promotion=L2_PROMOTION)
    return arguments


def map_of_pairs(w13: Tensor, interleaved: bool, rows: int) -> TensorMap:
    """W13 as (E, I / 8, 2, 8, H): boxes of ``rows`` lines of 128 bytes, 8 rows of one half, then the same 8 channels of
    the other, and so on.
    """
    shape, strides = pairs(w13, interleaved)
    return tensor_map(w13, box=(1, rows // 16, 2, 8, BLOCK), shape=shape, strides=strides, l2_promotion=L2_PROMOTION)


def pairs(w13: Tensor, interleaved: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of that view, in elements."""
    num_experts, lines, hidden = w13.shape
    expert, row, _ = w13.stride()
    group, half, channel = (16 * row, row, 2 * row) if interleaved else (8 * row, lines // 2 * row, row)
    return (num_experts, lines // 16, 2, 8, hidden), (expert, group, half, channel, 1)
