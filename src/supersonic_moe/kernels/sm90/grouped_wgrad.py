"""Grouped GEMM with a ragged contraction on sm_90a: D[e] = or += A[rows of e]ᵀ · B[rows of e], the weight gradient.

Layout (row-major)
    A (P, M) and B (P, N) bf16, rows sorted by expert; D (E, M, N) bf16, or fp32, which may be accumulated into
    (``main_grad``). offsets (E + 1) int32 on the device. An expert without rows gets exact zeros, or is left alone
    when accumulating.
Tiles
    As in grouped_gemm.py, 128 × 256 of one expert's D, with both operands MN-major: a stage is 64 rows of A and B. The
    rows that the last stage of an expert shares with the next expert, or with nobody, are cleared in shared memory.
Maths
    fp32 accumulation in the tensor core; one rounding for bf16. ``+=`` is a TMA reduction in L2 with one writer a tile,
    hence deterministic. M and N are multiples of 8.
Cost
    2·P·M·N FLOP. Bytes: 2·P·(M + N) and the output at least.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.jit.launch import I32, PTR, TENSOR_MAP, Kernel
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.sm90.grouped_gemm import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    GROUP_M,
    SMEM_BYTES,
    STAGES,
    THREADS,
    multiprocessors,
)

BF16, FP32, FP32_ADD = 0, 1, 2  # the kernel's OUTPUT
_STORE = {BF16: "UTMASTG", FP32: "UTMASTG", FP32_ADD: "UTMAREDG"}


def wgrad_spec(*, output: int, cluster: int) -> KernelSpec:
    return KernelSpec(
        name="grouped_wgrad",
        source="grouped_wgrad.cu",
        constants=(
            ("BLOCK_N", BLOCK_N),
            ("STAGES", STAGES),
            ("CLUSTER", cluster),
            ("GROUP_M", GROUP_M),
            ("OUTPUT", output),
        ),
        threads=THREADS,
        smem_bytes=SMEM_BYTES,
        cluster=cluster,
        opcodes=("HGMMA", "UTMALDG", _STORE[output], "USETMAXREG"),
    )


SPECS = tuple(wgrad_spec(output=o, cluster=c) for o in (BF16, FP32, FP32_ADD) for c in (1, 2))


@functools.cache
def _kernel(output: int, cluster: int) -> Kernel:
    argtypes = (TENSOR_MAP, TENSOR_MAP, TENSOR_MAP, PTR, I32, I32, I32)
    return Kernel(wgrad_spec(output=output, cluster=cluster), argtypes)


def grouped_mm_wgrad(
    a_PM: Tensor, b_PN: Tensor, expert_offsets: Tensor, out_EMN: Tensor | None = None, *, accumulate: bool = False
) -> Tensor:
    """(E, M, N): bf16, or into ``out_EMN`` (bf16 or fp32; ``accumulate`` adds to an fp32 one)."""
    num_experts = expert_offsets.shape[0] - 1
    (rows, m), n = a_PM.shape, b_PN.shape[1]
    if accumulate and (out_EMN is None or out_EMN.dtype is not torch.float32):
        raise TypeError(
            f"accumulate adds to an fp32 out of shape {(num_experts, m, n)}; got {checks.describe(out_EMN)}. "
            "Pass a float32 buffer, or accumulate=False."
        )
    if out_EMN is None:
        out_EMN = a_PM.new_empty(num_experts, m, n)
    if out_EMN.shape != (num_experts, m, n) or out_EMN.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"out must be bfloat16 or float32 of shape {(num_experts, m, n)}; got {checks.describe(out_EMN)}."
        )
    if rows == 0:
        return out_EMN if accumulate else out_EMN.zero_()
    output = BF16 if out_EMN.dtype is torch.bfloat16 else FP32_ADD if accumulate else FP32
    cluster = 2 if m > BLOCK_M else 1
    map_a, map_b = tensor_map(a_PM, box=(BLOCK_K, 64)), tensor_map(b_PN, box=(BLOCK_K, 64))
    map_d = tensor_map(out_EMN, box=(1, 64, 64 if output == BF16 else 32))
    with torch.cuda.device(a_PM.device):
        grid = multiprocessors(a_PM.device.index) // cluster * cluster
        blocks_m, blocks_n = -(-m // (BLOCK_M * cluster)), -(-n // BLOCK_N)
        _kernel(output, cluster).launch(
            (grid, 1, 1), map_a, map_b, map_d, expert_offsets, num_experts, blocks_m, blocks_n
        )
    return out_EMN
