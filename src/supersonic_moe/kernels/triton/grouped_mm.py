"""Grouped GEMMs of torch, fenced for two of its edges; those for fp16 are our own (``grouped_gemm.py``).

``torch.nn.functional.grouped_mm`` takes cumulative ends per group (``expert_offsets[1:]``), accumulates in fp32 and
rounds once. On CUDA it reads the ends on the device for bfloat16 with strides that are multiples of 16 bytes, on
compute capability 9.x and 10.x (torch 2.10); elsewhere it loops over groups and synchronises with the host, so the
registry keeps other dtypes away. With a ragged contraction it does not promise anything for an empty group, so a second
kernel writes the zeros of experts without rows: it looks at two offsets and leaves wherever there are rows.

The weight gradient leaves torch's GEMM in bf16 (its output dtype must be that of the operands, torch 2.13), so a
product that is added to an fp32 buffer has been rounded once, as in autograd without fusion; the sum is fp32. The sm_90
backend adds the unrounded product.

FLOPs: 2·P·K·N. Roofline on H200: 614-671 TFLOP/s sustained of a power-limited 680.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.kernels.interface import NEW, Into, RowBlocks, Rows
from supersonic_moe.kernels.triton.gather_rows import rows_of
from supersonic_moe.kernels.triton.grouped_gemm import contract_rows, multiply_rows
from supersonic_moe.kernels.triton.launch import launch

PROGRAMS_PER_EXPERT = 16  # they share the zeroing of one expert, so that E = 8 still fills the memory system
BLOCK = 4096


@triton.jit
def _zero_empty_experts_kernel(out_ptr, expert_offsets_ptr, MN: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    if tl.load(expert_offsets_ptr + expert) != tl.load(expert_offsets_ptr + expert + 1):
        return
    block = tl.program_id(1).to(tl.int64)
    while block * BLOCK < MN:
        at = block * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], dtype=out_ptr.dtype.element_ty)
        tl.store(out_ptr + expert.to(tl.int64) * MN + at, zeros, mask=at < MN)
        block += tl.num_programs(1)


def grouped_mm(a: Rows[Tensor], b_EKN: Tensor, expert_offsets: Tensor, parts: Sequence[RowBlocks] = ()) -> Tensor:
    """(P, N): rows of expert e are a[rows] @ b[e]; dead rows are undefined. ``b`` may be a transposed view. Rows that
    come through an index are copied first. All ``parts`` at once.
    """
    d_PN = _product(rows_of(a), b_EKN, expert_offsets)
    for part in parts:
        part.after(d_PN)
    return d_PN


def _product(a_PK: Tensor, b_EKN: Tensor, expert_offsets: Tensor) -> Tensor:
    if a_PK.dtype is torch.float16:
        return multiply_rows(a_PK, b_EKN, expert_offsets)
    if a_PK.shape[0] == 0:
        return a_PK.new_empty(0, b_EKN.shape[2])
    return torch.nn.functional.grouped_mm(a_PK, b_EKN, offs=expert_offsets[1:])


def grouped_mm_wgrad(a: Rows[Tensor], b_PN: Tensor, expert_offsets: Tensor, into: Into = NEW) -> Tensor:
    """(E, M, N): a[rows of e].T @ b[rows of e], or its transpose (E, N, M); exact zeros for an expert without rows.
    Into ``out`` if given, fp16, bf16 or fp32; ``accumulate`` adds the product to it, rounded before in bf16.
    """
    a_PM, (out, transposed, accumulate) = rows_of(a), into
    left, right = (b_PN, a_PM) if transposed else (a_PM, b_PN)
    num_experts, m, n = expert_offsets.shape[0] - 1, left.shape[1], right.shape[1]
    if left.dtype is torch.float16:
        dw_EMN = left.new_empty(num_experts, m, n) if out is None else out
        return contract_rows(left, right, expert_offsets, dw_EMN, accumulate and out is not None)
    if left.shape[0] == 0:
        dw_EMN = left.new_zeros(num_experts, m, n)
    else:
        dw_EMN = torch.nn.functional.grouped_mm(left.t(), right, offs=expert_offsets[1:])
        grid = (num_experts, PROGRAMS_PER_EXPERT)
        launch(_zero_empty_experts_kernel, grid, (dw_EMN, expert_offsets), (m * n, BLOCK))
    if out is None:
        return dw_EMN
    return out.add_(dw_EMN) if accumulate else out.copy_(dw_EMN)
