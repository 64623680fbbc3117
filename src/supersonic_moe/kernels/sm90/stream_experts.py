"""Both products of the FP8 inference operator for few rows an expert on sm_90a, in one launch: weights stream through
once.

    c = silu(gate) * up of  x w13^T        in fp32, then e4m3 with a scale of 1 x 128
    y = c w2^T                             in fp32

Layout (row-major; formats: ``quantization/block_format.py``)
    x (T, H) e4m3 with scales (T, H / 128) in any strides; rows sorted by expert, as route_rows.py lists them: items of
    up to 128 rows of an expert. Weights and scales as a checkpoint stores them (``kernels/reference/inference.py``).
Tiles
    Weights are the M operand of wgmma, an item's rows its N: 8, 16, 24, 32, 48, 64, 96 or 128. A tile is 128 weight
    rows, 64 where there are few tiles, times all rows of an item; K in blocks of 128, through a ring of 216 KB. Blocks
    take tiles from a counter: first W13 of all items, then W2 of all items. W13 is read through a five-dimensional map,
    (expert, I / 8, half, 8 rows, H): each 16 rows of a tile are 8 gate rows and their 8 up rows, so that both of a
    channel are in one thread, whatever the order of rows in memory.
Waiting
    The last warpgroup to write its part of 128 channels of c quantises them. W2 is loaded before c is there; only the
    loads of c wait. Nobody waits for a tile that no running block has taken, and no wait is unbounded.
Maths
    fp32 registers add up what wgmma sums over 128 of K. The order of operations on a row depends on that row alone, not
    on N, on the tile or on the block that takes it.
Cost
    Bytes: 3 I H for each expert that is hit, once for each 128 rows; 8 R I and 4 R H of intermediates through L2. Bound
    by DRAM up to about 130 rows an expert.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.jit.launch import Kernel, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90.gemm_config import multiprocessors
from supersonic_moe.kernels.sm90.route_rows import Buffer, RowTables
from supersonic_moe.quantization.block_format import BLOCK, blocks

THREADS = 384
SMEM_BYTES = 216 * 1024 + 8832  # the ring; scales, queue and barriers: stream/work.cuh
TILE_ROWS = (128, 64)
L2_PROMOTION = 128  # bytes: 4.42 TB/s where 256 gives 4.22 (docs/log.md)
OPCODES = ("QGMMA", "UTMALDG.5D", "UTMALDG.3D", "UTMALDG.2D", "USETMAXREG", "REDUX.MAX")

SPECS = (
    KernelSpec(
        "stream_experts",
        "stream_experts.cu",
        (("SMEM_BYTES", SMEM_BYTES),),
        THREADS,
        SMEM_BYTES,
        opcodes=OPCODES,
        pdl=True,
    ),
)


class Scratch(NamedTuple):
    """What the kernel writes, for ``rows`` rows, R. Nothing of it has to be initialised."""

    rows: int
    c_RI: Buffer
    """float32"""
    codes_RI: Buffer
    """e4m3 of c"""
    c_scale_RB: Buffer
    """float32, B = ceil(I / 128)"""
    y_RH: Buffer
    """float32"""


def num_counters(items: int, intermediate: int) -> int:
    """The next tile (and 3 unused); for each item, its blocks of 128 channels that are ready and arrivals at each."""
    return 4 + items * (1 + blocks(intermediate))


@functools.cache
def _kernel() -> Kernel:
    return Kernel(SPECS[0])


def stream_experts(
    x_TH: Tensor,
    x_scale_TB: Tensor,
    experts: Fp8Experts,
    shared: Fp8Experts | None,
    tables: RowTables,
    choices: int,
    scratch: Scratch,
    *,
    order: GateUpLayout,
    limit: float | None = None,
    pow2: bool = False,
    x_weight_T: Tensor | None = None,
) -> None:
    """Writes ``scratch`` for all rows of the items in ``tables``.

    Args:
        choices: C, slots of a token.
        shared: one expert (E = 1), local expert number E of the tables.
        limit: clamps gate from above and up on both sides.
        pow2: scales of c are powers of two.
        x_weight_T: float32, multiplies x for the routed experts.
    """
    hidden, inter = experts.w2.shape[1:]
    interleaved = order is GateUpLayout.INTERLEAVED
    always = experts if shared is None else shared
    x_scale_row, x_scale_k = x_scale_TB.stride()
    with on_device(x_TH):
        w13, w13_narrow, w2, w2_narrow = _maps(experts, interleaved)
        shared_w13, shared_w13_narrow, shared_w2, shared_w2_narrow = _maps(always, interleaved)
        _kernel().launch(
            (multiprocessors(x_TH.get_device()), 1, 1),
            map_w13=w13,
            map_w13_narrow=w13_narrow,
            map_w2=w2,
            map_w2_narrow=w2_narrow,
            map_shared_w13=shared_w13,
            map_shared_w13_narrow=shared_w13_narrow,
            map_shared_w2=shared_w2,
            map_shared_w2_narrow=shared_w2_narrow,
            map_x=tensor_map(x_TH, box=(1, BLOCK), l2_promotion=L2_PROMOTION),
            map_codes=_map_of_codes(scratch, inter),
            items=tables.items,
            row_slot=tables.row_slot,
            x_weight=x_weight_T,
            choices=choices,
            hidden=hidden,
            inter=inter,
            routed=experts.w13.shape[0],
            interleaved=int(interleaved),
            gate_first=int(order is not GateUpLayout.UP_GATE),
            x_scale=x_scale_TB,
            x_scale_row=x_scale_row,
            x_scale_k=x_scale_k,
            w13_scale=experts.w13_scale,
            w2_scale=experts.w2_scale,
            shared_w13_scale=always.w13_scale,
            shared_w2_scale=always.w2_scale,
            c=scratch.c_RI,
            codes=scratch.codes_RI,
            c_scale=scratch.c_scale_RB,
            y=scratch.y_RH,
            counters=tables.counters,
            max_items=tables.max_items,
            limit=math.inf if limit is None else limit,
            pow2=int(pow2),
        )


def _map_of_codes(scratch: Scratch, inter: int) -> TensorMap:
    shape = (scratch.rows, inter)
    where = scratch.codes_RI if isinstance(scratch.codes_RI, int) else scratch.codes_RI.data_ptr()
    return tensor_map(
        where, box=(8, BLOCK), dtype=torch.uint8, shape=shape, strides=(inter, 1), l2_promotion=L2_PROMOTION
    )


def _maps(experts: Fp8Experts, interleaved: bool) -> list[TensorMap]:
    """W13 and W2 in boxes of 128 and of 64 rows, 128 bytes each."""
    w13 = [map_of_pairs(experts.w13, interleaved, rows) for rows in TILE_ROWS]
    return w13 + [tensor_map(experts.w2, box=(1, rows, BLOCK), l2_promotion=L2_PROMOTION) for rows in TILE_ROWS]


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
