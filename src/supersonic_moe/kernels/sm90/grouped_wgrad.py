"""Grouped GEMM with a ragged contraction on sm_90a: D[e] = or += A[rows of e]ᵀ · B[rows of e], the weight gradient.

Layout (row-major)
    A (T, M), read through an index of P rows sorted by expert (-1: zeros), or (P, M) as it lies, and B (P, N), bf16; D
    (E, M, N), or (E, N, M), bf16, or fp32, which may be accumulated into
    (``main_grad``). offsets (E + 1) int32 on the device. An expert without rows gets exact zeros, or is left alone
    when accumulating.
Tiles
    As in grouped_gemm.py, 128 × 256, 320 or 384 of one expert's D, with both operands MN-major: a stage is 64 rows of
    A and B. With 320 columns, taken for sizes that 256 does not fill, the last rows of D are not padded either: where
    they fill at most one block of a cluster, its two blocks take neighbouring columns of them, and a warpgroup past
    the last row multiplies nothing. The rows that the last stage of an expert shares with the next expert, or with
    nobody, are cleared in shared memory.
Maths
    fp32 accumulation in the tensor core; one rounding for bf16. ``+=`` is a TMA reduction in L2 with one writer a tile,
    hence deterministic. M and N are multiples of 8.
Cost
    2·P·M·N FLOP. Bytes: 2·P·(M + N) and the output at least.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.alignment import is_plain
from supersonic_moe.kernels.interface import NEW, Into, Rows
from supersonic_moe.kernels.sm90.gemm_config import (
    BLOCK_M,
    BLOCK_N,
    BROAD_BLOCK_N,
    LOAD_WARPS,
    WARP_ROWS,
    WIDE_BLOCK_N,
    GemmConfig,
    bf16_form,
    choose,
)
from supersonic_moe.kernels.sm90.operands import map_of_rows, map_of_run

STORES = ("UTMASTG",), ("UTMASTG", "UTMAREDG")  # in bf16; in fp32, which is also added to


def _spec(config: GemmConfig, fp32: bool) -> KernelSpec:
    return config.spec("grouped_wgrad", ("HGMMA", "UTMALDG", *STORES[fp32], "USETMAXREG"), FP32=int(fp32))


SPECS = tuple(
    _spec(bf16_form(block_n, 2, gather), fp32)
    for fp32 in (False, True)
    for gather in (False, True)
    for block_n in (BLOCK_N, BROAD_BLOCK_N, WIDE_BLOCK_N)
)


@functools.cache
def _kernel(config: GemmConfig, fp32: bool) -> Kernel:
    return kernel_of(_spec(config, fp32))


def gradient_buffer(into: Into, operand: Tensor, num_experts: int, m: int, n: int) -> Tensor:
    """``into.out``, checked, or a new bf16 one beside ``operand``."""
    out, transposed, accumulate = into
    shape = (num_experts, n, m) if transposed else (num_experts, m, n)
    if accumulate and (out is None or out.dtype is not torch.float32):
        raise TypeError(
            f"accumulate adds to an fp32 out of shape {shape}; got {checks.describe(out)}. "
            "Pass a float32 buffer, or accumulate=False."
        )
    if out is None:
        return operand.new_empty(*shape, dtype=torch.bfloat16)
    if out.shape != shape or out.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out must be bfloat16 or float32 of shape {shape}; got {checks.describe(out)}.")
    return out


def through_scratch(out: Tensor, into: Into, product: Callable[[Into], Tensor]) -> Tensor:
    """``out`` that TMA cannot write to (the ``main_grad`` of a weight anywhere in a flat buffer), with a product that
    is written to memory of our own first.
    """
    scratch = product(Into(torch.empty(out.shape, dtype=out.dtype, device=out.device), into.transposed))
    return out.add_(scratch) if into.accumulate else out.copy_(scratch)


def map_of_output(out: Tensor, transposed: bool) -> TensorMap:
    """D as epilogue/weight_gradient.cuh writes it: boxes 128 bytes wide, of a warp's rows or, transposed, of the
    columns that a staging buffer holds.
    """
    columns = 128 // out.itemsize
    return tensor_map(out, box=(1, columns if transposed else WARP_ROWS, columns))


def map_of_whole_rows(b_PN: Tensor, block_k: int) -> TensorMap:
    """B as (1, P, N): the kernel loads it like a weight."""
    (rows, columns), row = b_PN.shape, b_PN.stride(0)
    return tensor_map(b_PN, box=(1, block_k, 64), shape=(1, rows, columns), strides=(rows * row, row, 1))


def grouped_mm_wgrad(a: Rows[Tensor], b_PN: Tensor, expert_offsets: Tensor, into: Into = NEW) -> Tensor:
    """A[rows of e]ᵀ · B[rows of e], (E, M, N), or its transpose (E, N, M): bf16, or into ``out`` (bf16 or fp32;
    ``accumulate`` adds to an fp32 one).
    """
    a_TM, index = a
    num_experts = expert_offsets.shape[0] - 1
    rows, m, n = a.num_rows, a_TM.shape[1], b_PN.shape[1]
    out = gradient_buffer(into, a_TM, num_experts, m, n)
    if not is_plain(out):
        return through_scratch(out, into, functools.partial(grouped_mm_wgrad, a, b_PN, expert_offsets))
    if rows == 0 or a_TM.shape[0] == 0:
        return out if into.accumulate else out.zero_()
    config = choose(n, index is not None, depth=rows // num_experts)
    block_k = config.block_k
    with on_device(a_TM):
        map_b = map_of_whole_rows(b_PN, block_k)
        _kernel(config, out.dtype is torch.float32).launch(
            config.grid(a_TM.get_device()),
            map_a=map_of_rows(a_TM, index, box=(block_k, 64)),
            map_a_run=map_of_run(a_TM, index, (block_k // LOAD_WARPS, 64), map_b),
            map_b=map_b,
            map_d=map_of_output(out, into.transposed),
            offsets=expert_offsets,
            index=index,
            experts=num_experts,
            blocks_m=-(-m // (BLOCK_M * config.cluster)),
            blocks_n=-(-n // config.block_n),
            adds=int(into.accumulate),
            transposed=int(into.transposed),
            rows=m,
        )
    return out
