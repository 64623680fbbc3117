"""Grouped GEMMs of torch, fenced for two of its edges.

``torch.nn.functional.grouped_mm`` takes cumulative ends per group (``expert_offsets[1:]``), accumulates in fp32 and
rounds once. On CUDA it reads the ends on the device for bfloat16 with strides that are multiples of 16 bytes, on
compute capability 9.x and 10.x (torch 2.10); elsewhere it loops over groups and synchronises with the host, so the
registry keeps other dtypes away. With a ragged contraction it does not promise anything for an empty group, so a second
kernel writes the zeros of experts without rows: it looks at two offsets and leaves wherever there are rows.

FLOPs: 2·P·K·N. Roofline on H200: 614-671 TFLOP/s sustained of a power-limited 680.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_EXPERT = 16  # they share the zeroing of one expert, so that E = 8 still fills the memory system
BLOCK = 4096


@triton.jit
def _zero_empty_experts_kernel(out_ptr, expert_offsets_ptr, MN: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    if tl.load(expert_offsets_ptr + expert) != tl.load(expert_offsets_ptr + expert + 1):
        return
    block = tl.program_id(1)
    while block * BLOCK < MN:
        at = block * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], dtype=out_ptr.dtype.element_ty)
        tl.store(out_ptr + expert.to(tl.int64) * MN + at, zeros, mask=at < MN)
        block += tl.num_programs(1)


def grouped_mm(a_PK: Tensor, b_EKN: Tensor, expert_offsets: Tensor) -> Tensor:
    """(P, N): rows of expert e are a[rows] @ b[e]; dead rows are undefined. ``b`` may be a transposed view."""
    if a_PK.shape[0] == 0:
        return a_PK.new_empty(0, b_EKN.shape[2])
    return torch.nn.functional.grouped_mm(a_PK, b_EKN, offs=expert_offsets[1:])


def grouped_mm_wgrad(a_PM: Tensor, b_PN: Tensor, expert_offsets: Tensor) -> Tensor:
    """(E, M, N): a[rows of e].T @ b[rows of e]; exact zeros for an expert without rows."""
    num_experts, m, n = expert_offsets.shape[0] - 1, a_PM.shape[1], b_PN.shape[1]
    if a_PM.shape[0] == 0:
        return a_PM.new_zeros(num_experts, m, n)
    out_EMN = torch.nn.functional.grouped_mm(a_PM.t(), b_PN, offs=expert_offsets[1:])
    with torch.cuda.device_of(out_EMN):
        _zero_empty_experts_kernel[(num_experts, PROGRAMS_PER_EXPERT)](out_EMN, expert_offsets, m * n, BLOCK)
    return out_EMN
