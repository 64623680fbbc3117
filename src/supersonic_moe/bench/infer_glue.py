"""What stands between the grouped products of other libraries, so that each makes a whole inference operator.

Their own glue is spread over frameworks that cannot be carried along, and poor glue makes a weak baseline. So each peer
gets the same kernels, one pass each and as few launches as its layout allows:

    place_masked        sort and gather for (E, M, H) layouts, in one launch: a slot counts the earlier slots of its
                        expert, then copies its row (S² / 2 comparisons: for batches of up to 8192 slots)
    gather              rows of x and their scales in the order of a plan, and what a CUTLASS grouped product is told
    block_experts       slots and experts of the row blocks of a Triton grouped product, from a plan of that tile
    swiglu_quantize     silu(gate) · up of bf16 products in fp32, e4m3 in blocks of 128: no bf16 in between
    combine             out[t] = sum over the choices, ascending, of weight · y, skipping those of other ranks

Routing is ``kernels/triton/router.py``, sorting of large batches ``kernels/triton/plan.py``. Bytes are those of the
rows read and written; every kernel is bound by them or by its launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.triton.quantize import _block_scale, _e4m3
from supersonic_moe.kernels.triton.tiling import cdiv, column_block, next_power_of_2, warps
from supersonic_moe.quantization.block_format import BLOCK, blocks

SLOTS = tl.constexpr(1024)  # compared at once
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _copy_row(x_ptr, scale_ptr, to_ptr, to_scale_ptr, scale_step, to_step, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """A row of H bytes and its H / 128 scales."""
    column = tl.arange(0, BLOCK_H)
    tl.store(to_ptr + column, tl.load(x_ptr + column, mask=column < H, other=0), mask=column < H)
    block = tl.arange(0, BLOCK_H // _BLOCK)
    in_row = block < H // _BLOCK
    tl.store(to_scale_ptr + block * to_step, tl.load(scale_ptr + block * scale_step, mask=in_row), mask=in_row)


@triton.jit(do_not_specialize=["num_slots", "offset", "x_row", "x_block"])
def _place_masked_kernel(
    ids_ptr, x_ptr, scale_ptr, to_ptr, to_scale_ptr, dest_ptr, counts_ptr, num_slots, offset, x_row, x_block, M,
    SM, SB, E: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The first E programs count the rows of an expert, each of the others places a slot."""
    program = tl.program_id(0)
    slot = program - E
    if slot < 0:
        id = program + offset
        last = num_slots
    else:
        id = tl.load(ids_ptr + slot)
        last = slot
    expert = id - offset
    local = (expert >= 0) & (expert < E)
    earlier = 0
    first = 0
    while (first < last) & local:
        others = first + tl.arange(0, SLOTS)
        same = tl.load(ids_ptr + others, mask=others < last, other=-(2**30)) == id
        earlier += tl.sum(same.to(tl.int32), 0)
        first += SLOTS
    if slot < 0:
        tl.store(counts_ptr + expert, tl.minimum(earlier, M))
    else:
        local = local & (earlier < M)  # a near tie that another router decided otherwise may bring one row more
        dest = expert.to(tl.int64) * M + earlier
        tl.store(dest_ptr + slot, tl.where(local, dest, -1).to(tl.int32))
        if local:
            token = (slot // K).to(tl.int64)
            to_scale = to_scale_ptr + expert.to(tl.int64) * SM + earlier
            _copy_row(
                x_ptr + token * H, scale_ptr + token * x_row, to_ptr + dest * H, to_scale, x_block, SB, H, BLOCK_H
            )


def place_masked(
    ids_TK: Tensor, offset: int, x_TH: Tensor, x_scale_TB: Tensor, out_EMH: Tensor, scale_EMB: Tensor
) -> tuple[Tensor, Tensor]:
    """(row of each slot in (E M), -1 where another rank has its expert; rows of each expert), both int32.

    ``out_EMH`` is e4m3; ``scale_EMB`` holds the scales of one block of columns next to each other (stride 1 along M).
    """
    (num_experts, most, hidden), slots = out_EMH.shape, ids_TK.numel()
    dest_S = torch.empty(slots, dtype=torch.int32, device=x_TH.device)
    counts_E = torch.empty(num_experts, dtype=torch.int32, device=x_TH.device)
    block_h = next_power_of_2(hidden)
    _place_masked_kernel[(num_experts + slots,)](
        ids_TK, _bytes(x_TH), x_scale_TB, _bytes(out_EMH), scale_EMB, dest_S, counts_E, slots, offset,
        *x_scale_TB.stride(), most, scale_EMB.stride(0), scale_EMB.stride(2), num_experts, ids_TK.shape[1], hidden,
        block_h, num_warps=warps(block_h // 2),
    )  # fmt: skip
    return dest_S, counts_E


@triton.jit(do_not_specialize=["x_row", "x_block", "to_row", "to_block"])
def _gather_kernel(
    gather_ptr, counts_ptr, x_ptr, scale_ptr, to_ptr, to_scale_ptr, sizes1_ptr, sizes2_ptr,
    x_row, x_block, to_row, to_block, E: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if sizes1_ptr is not None:  # noqa: SIM102  known when compiled, unlike the row
        if row == 0:
            expert = tl.arange(0, BLOCK_E)
            mask = expert < E
            count = tl.load(counts_ptr + expert, mask=mask)
            tl.store(sizes1_ptr + 3 * expert, count, mask=mask)
            tl.store(sizes2_ptr + 3 * expert, count, mask=mask)
    token = tl.load(gather_ptr + row).to(tl.int64)
    if token >= 0:
        to_scale = to_scale_ptr + row * to_row
        _copy_row(
            x_ptr + token * H, scale_ptr + token * x_row, to_ptr + row * H, to_scale, x_block, to_block, H, BLOCK_H
        )


def gather(
    gather_P: Tensor,
    counts_E: Tensor,
    x_TH: Tensor,
    x_scale_TB: Tensor,
    out_PH: Tensor,
    scale_PB: Tensor,
    sizes: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Rows of the tokens ``gather_P`` (-1: padding, left as it is). ``sizes``: (E, 3) int32 of both products, whose
    first column becomes the rows of each expert.
    """
    hidden, experts = x_TH.shape[1], counts_E.shape[0]
    block_h = next_power_of_2(hidden)
    first, second = sizes or (None, None)
    _gather_kernel[(gather_P.shape[0],)](
        gather_P, counts_E, _bytes(x_TH), x_scale_TB, _bytes(out_PH), scale_PB, first, second,
        *x_scale_TB.stride(), *scale_PB.stride(), experts, hidden, block_h, next_power_of_2(experts),
        num_warps=warps(block_h // 2),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _block_experts_kernel(
    row_slot_ptr, row_expert_ptr, slot_ptr, expert_ptr, num_rows, num_slots, TILE: tl.constexpr, BLOCK_P: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    slot = tl.load(row_slot_ptr + row, mask=row < num_rows, other=-1)
    tl.store(slot_ptr + row, tl.where(slot < 0, num_slots, slot), mask=row < num_rows)
    block = tl.program_id(0) * (BLOCK_P // TILE) + tl.arange(0, BLOCK_P // TILE)
    in_blocks = block * TILE < num_rows
    tl.store(expert_ptr + block, tl.load(row_expert_ptr + block * TILE, mask=in_blocks), mask=in_blocks)


def block_experts(row_slot_P: Tensor, row_expert_P: Tensor, num_slots: int, tile: int) -> tuple[Tensor, Tensor]:
    """(slot of each row, S where it is padding; expert of each block of ``tile`` rows), int32."""
    rows = row_slot_P.shape[0]
    slots_P = torch.empty_like(row_slot_P)
    experts_B = row_slot_P.new_empty(cdiv(rows, tile))
    _block_experts_kernel[(cdiv(rows, 1024),)](
        row_slot_P, row_expert_P, slots_P, experts_B, rows, num_slots, tile, 1024
    )
    return slots_P, experts_B


@triton.jit(do_not_specialize=["scale_group", "M"])
def _swiglu_quantize_kernel(
    z_ptr, used_ptr, q_ptr, scale_ptr, M, scale_group, scale_row, scale_block,
    C: tl.constexpr, BLOCKS: tl.constexpr, COUNTED: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:  # M rows of each group, of which the first are in use
        group, inside = row // M, row % M
        used = inside < tl.load(used_ptr + group)
    else:
        group, inside = row * 0, row
        used = tl.load(used_ptr + row) >= 0
    if used:
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        column = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        mask = column < C
        at = z_ptr + row * (2 * C) + column
        g = tl.load(at + (0 if GATE_FIRST else C), mask=mask, other=0.0).to(tl.float32)
        u = tl.load(at + (C if GATE_FIRST else 0), mask=mask, other=0.0).to(tl.float32)
        c = g * tl.sigmoid(g) * u
        scale, inverse = _block_scale(tl.max(tl.abs(c), 1), False)
        tl.store(q_ptr + row * C + column, _e4m3(c * inverse[:, None]), mask=mask)
        to = scale_ptr + group * scale_group + inside * scale_row + block * scale_block
        tl.store(to, scale, mask=block * _BLOCK < C)


def swiglu_quantize(z: Tensor, used: Tensor, q: Tensor, scale: Tensor, *, gate_first: bool) -> None:
    """z (P, 2 I) or (E, M, 2 I) bf16 -> q of half the width in e4m3 and its fp32 scales, of any strides.

    ``used``: int32 of each row, negative where it is not in use, or, for (E, M, 2 I), the rows in use of each expert.
    """
    inter = q.shape[-1]
    counted = z.dim() == 3
    width = min(8, next_power_of_2(blocks(inter)))
    group, row, block = scale.stride() if counted else (0, *scale.stride())
    grid = (z.numel() // z.shape[-1], cdiv(blocks(inter), width))
    if grid[0] == 0:
        return
    _swiglu_quantize_kernel[grid](
        z, used, q, scale, z.shape[-2], group, row, block, inter, width, counted, gate_first,
        num_warps=warps(width * BLOCK),
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    y_ptr, rows_ptr, weights_ptr, out_ptr, y_stride,
    H: tl.constexpr, K: tl.constexpr, BY_SLOT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows_ptr + token * K + j).to(tl.int64)
        mask = (row >= 0) & (column < H)
        if BY_SLOT:
            row = token * K + j
        y = tl.load(y_ptr + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + token * K + j)
        total += y
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


def combine(
    y_PH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None, out_TH: Tensor, *, by_slot: bool = False
) -> Tensor:
    """``out_TH``. ``rows_TK``: the row of each choice, -1 for none; ``by_slot``: y has a row for every choice, in
    order. Without weights rows are added as they are.
    """
    tokens, hidden = out_TH.shape
    block_h = column_block(hidden, 2048)
    _combine_kernel[(tokens, cdiv(hidden, block_h))](
        y_PH, rows_TK, weights_TK, out_TH, y_PH.stride(0), hidden, rows_TK.numel() // tokens, by_slot,
        block_h, num_warps=warps(block_h),
    )  # fmt: skip
    return out_TH


@triton.jit(do_not_specialize=["num_slots", "offset"])
def _localize_kernel(
    ids_ptr, weights_ptr, to_ids_ptr, to_weights_ptr, num_slots, offset, E: tl.constexpr, BLOCK_S: tl.constexpr
):
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = slot < num_slots
    local = tl.load(ids_ptr + slot, mask=mask) - offset
    known = (local >= 0) & (local < E)
    tl.store(to_ids_ptr + slot, tl.where(known, local, -1).to(to_ids_ptr.dtype.element_ty), mask=mask)
    if to_weights_ptr is not None:
        tl.store(to_weights_ptr + slot, tl.load(weights_ptr + slot, mask=mask), mask=mask)


def localize(
    ids_TK: Tensor, offset: int, num_local: int, out: Tensor, weights: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``out``: global ids as local ones, -1 where another rank has the expert. ``weights``: (from, to), copied too."""
    slots = ids_TK.numel()
    source, target = weights or (None, None)
    _localize_kernel[(cdiv(slots, 1024),)](ids_TK, source, out, target, slots, offset, num_local, 1024)
    return out


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)
