"""The experts of a few tokens, as decode has them: bound by reading the weights of the experts that are hit, once.

    a[slot]  = act(w1[e] x[token] + b1[e])       one launch      e: expert of the slot, (token, choice)
    y[slot]  = w2[e] a[slot] + b2[e]             one launch      in fp32
    out[t]   = sum over j of score[t, j] * y[t * K + j]          one launch

No rows are sorted and no plan is built: ids are so few that each program finds the slots of its expert itself. Programs
own an expert and a block of columns of its weights; where there are fewer slots than experts, one is started for each
slot, and leaves if an earlier slot has its expert. It multiplies up to BLOCK_M rows at a time in the tensor cores,
which such tiles leave nearly idle. What counts is bytes in flight: all stages but one of a program, several programs an
SM.

Ids outside [0, E) own no row and are skipped. The sums of a row have one order, whatever other rows are there; no size
that depends on the batch is a constant of a kernel.

Layout: x (T, H), w1 (E, N1, H), a (S, I), w2 (E, H, I), y (S, H), S = T·K slots. N1 = 2I gated, else I. Weights lie in
either order, gpt-oss's as (E, H, N1) and (E, I, H); gated ones of that order must be interleaved, or gate and up would
be loaded two bytes at a time.
Bytes: min(S, E)·(N1 + I)·H weights at most, all else is small. Roofline on H200 at 4.26 TB/s, Qwen3-30B-A3B, bf16:
T 1: 75 MB = 18 us; T 64: all experts, 1.2 GB = 283 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import Gate
from supersonic_moe.kernels.triton.activation import _activate
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, column_block, near

BLOCK_M = 16  # rows of a tensor instruction
BLOCK_K = 64
PLAIN = (64, 6)  # columns of weights and stages of 8 KB; 16 and 32 columns take longer at T 64
TURNED = (128, 4)  # of weights stored (E, K, N): pieces of 256 bytes, stages of 16 KB; 64 columns take 5 % longer
BLOCK_S = 256  # slots looked at at a time
COMBINED_H = 512  # columns of the output a program


@triton.jit
def _slots_of(ids_ptr, num_slots, expert, first_rank, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """(slots of the rows from ``first_rank`` on of an expert in ascending order, how many rows it has)"""
    rank = first_rank + tl.arange(0, BLOCK_M)
    found = tl.zeros([BLOCK_M], dtype=tl.int32)
    count = num_slots * 0
    first = num_slots * 0
    while first < num_slots:
        slot = first + tl.arange(0, BLOCK_S)
        mine = (tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1) == expert).to(tl.int32)
        place = count + tl.cumsum(mine, 0) - mine
        here = (mine[:, None] > 0) & (place[:, None] == rank[None, :])
        found += tl.sum(tl.where(here, slot[:, None], 0), 0)
        count += tl.sum(mine, 0)
        first += BLOCK_S
    return found, count


@triton.jit(do_not_specialize=["num_slots"])
def _project_kernel(
    x_ptr, w_ptr, bias_ptr, ids_ptr, out_ptr,
    num_slots, num_experts, slots_per_row, w_stride_e, w_stride_n, w_stride_k, bias_stride,
    K: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, LAYOUT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[slot, i < WIDTH] of x[slot // slots_per_row]; KIND "none" has no activation, LAYOUT "single" no pairs."""
    group = tl.program_id(0)
    expert = group.to(tl.int64)
    if num_slots <= num_experts:
        expert = tl.load(ids_ptr + group).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    first_rank = num_slots * 0
    slot, count = _slots_of(ids_ptr, num_slots, expert, first_rank, BLOCK_M, BLOCK_S)
    earliest = tl.min(tl.where(tl.arange(0, BLOCK_M) < count, slot, num_slots), 0)
    if (num_slots <= num_experts) & (earliest < group):
        return

    FAN: tl.constexpr = 1 if LAYOUT == "single" else 2
    column = tl.arange(0, BLOCK_N)
    out_first = tl.program_id(1) * (BLOCK_N // FAN)
    n = out_first * FAN + column
    in_columns = n < FAN * WIDTH
    if LAYOUT == "gate_up":  # a pair in neighbouring columns, whatever rows of w1 hold it
        n = out_first + column // 2 + column % 2 * WIDTH
    elif LAYOUT == "up_gate":
        n = out_first + column // 2 + (1 - column % 2) * WIDTH
    out_column = out_first + tl.arange(0, BLOCK_N // FAN)
    depth = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + expert * w_stride_e + depth[:, None] * w_stride_k + n[None, :] * w_stride_n
    while first_rank < count:
        in_rows = first_rank + tl.arange(0, BLOCK_M) < count
        x_ptrs = x_ptr + (slot // slots_per_row).to(tl.int64)[:, None] * K + depth[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            x = tl.load(x_ptrs + k, mask=in_rows[:, None] & (depth < K - k)[None, :], other=0.0)
            w = tl.load(w_ptrs + k * w_stride_k, mask=in_columns[None, :] & (depth < K - k)[:, None], other=0.0)
            total = tl.dot(x, w, total)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert * bias_stride + n, mask=in_columns, other=0.0)
            total += bias.to(tl.float32)[None, :]
        if LAYOUT != "single":
            gate, up = tl.split(tl.reshape(total, [BLOCK_M, BLOCK_N // 2, 2]))
            value, _, _ = _activate(KIND, gate, up, ALPHA, LIMIT, UP_OFFSET)
        elif KIND != "none":
            value, _, _ = _activate(KIND, total, total, ALPHA, LIMIT, UP_OFFSET)
        else:
            value = total
        out_ptrs = out_ptr + slot.to(tl.int64)[:, None] * WIDTH + out_column[None, :]
        tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (out_column < WIDTH)[None, :])
        first_rank += BLOCK_M
        if first_rank < count:
            slot, count = _slots_of(ids_ptr, num_slots, expert, first_rank, BLOCK_M, BLOCK_S)


@triton.jit
def _combine_kernel(
    y_ptr, scores_ptr, ids_ptr, out_ptr, num_experts, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for j in tl.static_range(K):
        slot = token * K + j
        expert = tl.load(ids_ptr + slot)
        routed = (expert >= 0) & (expert < num_experts)
        y = tl.load(y_ptr + slot * H + column, mask=(column < H) & routed, other=0.0)
        total += tl.where(routed, y * tl.load(scores_ptr + slot).to(tl.float32), 0.0)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


def decode(
    x_TH: Tensor,
    ids_TK: Tensor,
    scores_TK: Tensor,
    w1_ENH: Tensor,
    b1_EN: Tensor | None,
    w2_EHI: Tensor,
    b2_EH: Tensor | None,
    gate: Gate,
) -> Tensor:
    """(T, H) in the dtype of x. x, ids and scores are contiguous, and of each weight one of the last two dimensions."""
    activation, layout = gate
    (num_tokens, k), (num_experts, hidden, intermediate) = ids_TK.shape, w2_EHI.shape
    num_slots = num_tokens * k
    out_TH = x_TH.new_empty(num_tokens, hidden)
    if num_slots == 0:
        return out_TH.zero_()
    a_SI = x_TH.new_empty(num_slots, intermediate)
    y_SH = x_TH.new_empty(num_slots, hidden, dtype=torch.float32)
    order = layout.value if activation.gated else "single"
    numbers = activation.alpha, activation.limit, activation.up_offset
    _project(x_TH, w1_ENH, b1_EN, ids_TK, a_SI, k, (activation.type.value, order, *numbers))
    _project(a_SI, w2_EHI, b2_EH, ids_TK, y_SH, 1, ("none", "single", 1.0, None, 0.0))
    block_h = column_block(hidden, COMBINED_H)
    args = (y_SH, scores_TK, ids_TK, out_TH, num_experts)
    launch(_combine_kernel, (num_tokens, cdiv(hidden, block_h)), args, (hidden, k, block_h))
    return out_TH


def _project(
    x: Tensor,
    w_ENK: Tensor,
    bias_EN: Tensor | None,
    ids_TK: Tensor,
    out_SW: Tensor,
    slots_per_row: int,
    activation: tuple[str, str, float, float | None, float],
) -> None:
    w_ENK = near(w_ENK)
    num_experts, columns, depth = w_ENK.shape
    stride_e, stride_n, stride_k = w_ENK.stride()
    num_slots, width = out_SW.shape
    block_n, stages = PLAIN if stride_k == 1 else TURNED
    launch(
        _project_kernel,
        (min(num_slots, num_experts), cdiv(columns, block_n)),
        (
            x, w_ENK, bias_EN, ids_TK, out_SW, num_slots, num_experts, slots_per_row,
            stride_e, stride_n, stride_k, 0 if bias_EN is None else bias_EN.stride(0),
        ),
        (depth, width, *activation, BLOCK_M, block_n, BLOCK_K, BLOCK_S, stages),
    )  # fmt: skip
