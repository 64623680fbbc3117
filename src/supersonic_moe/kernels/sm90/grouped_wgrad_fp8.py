"""Grouped GEMM in FP8 with a ragged contraction on sm_90a: D[e] = or += A[:, positions of e] · B[:, positions of e]ᵀ.

Layout (formats: ``quantization/block_format.py``)
    A (M, G) and B (N, G) e4m3, positions contiguous, as the transposing quantizers write them; of A a block of 128
    positions is read where ``source`` says, so that experts of the same tokens share it. Expert e owns the
    positions [padded_offsets[e], padded_offsets[e + 1]), int32 on the device, multiples of 128: what an expert lacks to
    whole blocks is zeros. A has a scale for each row and block of 128 positions, (M, G/128), stored block by block, as
    TMA loads 128 of them; B one for each 128 × 128 tile, (N/128, G/128), in any strides. D (E, M, N), or (E, N, M),
    bf16, or fp32, which may be accumulated into (``main_grad``). An expert without positions gets exact zeros, or is
    left alone when accumulating.
Tiles
    128 × 256 of one expert's D, K blocks of 128 positions, three stages and 64 KB of staging, as in grouped_gemm_fp8.py
    without an index: there the scales of B are one number for 128 columns, and a product is promoted by one number for
    each row. With rows scaled on both sides it would take one for each element.
Maths
    The tensor core sums 128 positions, fp32 registers the rest (gemm/k_loop_fp8.cuh); one rounding for bf16. ``+=`` is
    a TMA reduction in L2 with one writer a tile, hence deterministic. M and N are multiples of 8.
Cost
    2·G·M·N FLOP. Bytes: G·(M + N), 1/32 of G·M for the scales, and the output at least; a tile reads (128 + 256) bytes
    from L2 a position.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map
from supersonic_moe.kernels.alignment import is_plain
from supersonic_moe.kernels.interface import NEW, Into, Quantized
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BLOCK_N, BUFFER_BYTES, GemmConfig, choose, fp8_form
from supersonic_moe.kernels.sm90.grouped_wgrad import STORES, gradient_buffer, map_of_output, through_scratch
from supersonic_moe.kernels.sm90.operands import map_of_columns
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

STAGING_BYTES = 4 * BUFFER_BYTES


def _spec(config: GemmConfig, fp32: bool) -> KernelSpec:
    return config.spec("grouped_wgrad_fp8", ("QGMMA", "UTMALDG", *STORES[fp32], "USETMAXREG"), FP32=int(fp32))


SPECS = tuple(_spec(fp8_form(1, False, STAGING_BYTES), fp32) for fp32 in (False, True))


@functools.cache
def _kernel(config: GemmConfig, fp32: bool) -> Kernel:
    return kernel_of(_spec(config, fp32))


def _check(a_MG: Quantized, b_NG: Quantized) -> None:
    (a, a_scale), (b, b_scale) = a_MG, b_NG
    (m, positions), n = a.shape, b.shape[0]
    if not (a.dtype is E4M3 is b.dtype):
        name, operand = ("b", b) if a.dtype is E4M3 else ("a", a)
        raise TypeError(f"{name} must be {E4M3}; got {checks.describe(operand)}. Quantize it (quantize_columns).")
    if b.shape[1] != positions or positions % BLOCK:
        raise ValueError(
            f"a (M, G) and b (N, G) must have the same G, a multiple of {BLOCK}; got shapes {tuple(a.shape)} and "
            f"{tuple(b.shape)}. Quantize both along one pad_segments index."
        )
    of_rows, of_tiles = (m, positions // BLOCK), (blocks(n), positions // BLOCK)
    if a_scale.shape != of_rows or b_scale.shape != of_tiles:
        raise ValueError(
            f"a.scale must have shape {of_rows}, one for each row and 128 positions, and b.scale {of_tiles}, one for "
            f"128 rows; got {tuple(a_scale.shape)} and {tuple(b_scale.shape)}. Quantize a with quantize_columns(...), "
            "b with quantize_columns(..., tiled=True) or quantize_both_orders."
        )
    if m > 1 and a_scale.stride(0) != 1:
        raise ValueError(
            f"a.scale must be stored transposed, the scales of a block of positions next to each other; got strides "
            f"{a_scale.stride()} for shape {tuple(a_scale.shape)}. Quantize with quantize_columns(...)."
        )


def grouped_mm_wgrad_fp8(
    a_MG: Quantized, b_NG: Quantized, padded_offsets: Tensor, into: Into = NEW, source: Tensor | None = None
) -> Tensor:
    """A[:, positions of e] · B[:, positions of e]ᵀ, (E, M, N), or its transpose (E, N, M): bf16, or into ``out`` (bf16
    or fp32; ``accumulate`` adds to an fp32 one). Scales are fp32, of A (M, G/128), of B (N/128, G/128). ``source``
    (G/128,): block of positions -> block of A to read in its place.
    """
    _check(a_MG, b_NG)
    (a, a_scale), (b, b_scale) = a_MG, b_NG
    (m, positions), n = a.shape, b.shape[0]
    num_experts = padded_offsets.shape[0] - 1
    out = gradient_buffer(into, a, num_experts, m, n)
    if not is_plain(out):
        product = functools.partial(grouped_mm_wgrad_fp8, a_MG, b_NG, padded_offsets, source=source)
        return through_scratch(out, into, product)
    if positions == 0:
        return out if into.accumulate else out.zero_()
    config = choose(n, False, staging_bytes=STAGING_BYTES)
    scale_b_column, scale_b_k = b_scale.stride()
    with on_device(a):
        _kernel(config, out.dtype is torch.float32).launch(
            config.grid(a.get_device()),
            map_a=tensor_map(a, box=(BLOCK_M, config.block_k)),
            map_scale_a=map_of_columns(a_scale),
            map_b=tensor_map(b, box=(BLOCK_N, config.block_k)),
            map_d=map_of_output(out, into.transposed),
            offsets=padded_offsets,
            source=source,
            experts=num_experts,
            rows=m,
            columns=n,
            scale_b=b_scale,
            scale_b_column=scale_b_column,
            scale_b_k=scale_b_k,
            adds=int(into.accumulate),
            transposed=int(into.transposed),
        )
    return out
