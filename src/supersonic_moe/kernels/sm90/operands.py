"""Tensor maps of what several kernels load and store, and the sum of what several blocks store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BLOCK_N, WARP_ROWS, GemmConfig

# ---- rows ------------------------------------------------------------------------------------------------------------


def map_of_rows(a_TK: Tensor, index: Tensor | None, box: tuple[int, int]) -> TensorMap:
    """A as a kernel loads it: boxes of rows, or with an index one row at a time."""
    return tensor_map(a_TK, box=box if index is None else (1, box[1]))


def map_of_run(a_TK: Tensor, index: Tensor | None, box: tuple[int, int], unused: TensorMap) -> TensorMap:
    """A as a kernel loads it where the rows that the index names for a loading warp follow each other: ``box`` holds
    them all. Without an index, no map.
    """
    return unused if index is None else tensor_map(a_TK, box=box)


def map_of_scales(scale_RB: Tensor, index: Tensor | None, unused: TensorMap) -> TensorMap:
    """Scales of A in the order that the kernel reads: by TMA without an index, else by row, without a map."""
    contiguous = 0 if index is None else 1
    if scale_RB.stride(contiguous) != 1 and scale_RB.shape[contiguous] > 1:
        way = "transposed (tma=True)" if index is None else "row by row (tma=False)"
        with_index = "without" if index is None else "with"
        raise ValueError(
            f"the scales of rows must be stored {way} {with_index} an index; got strides {scale_RB.stride()} for shape "
            f"{tuple(scale_RB.shape)}. Quantize with quantize_rows(..., tma={index is None})."
        )
    return unused if index is not None else map_of_columns(scale_RB)


def map_of_columns(scale_RB: Tensor) -> TensorMap:
    """Scales stored transposed, as TMA loads those of 128 rows at once, of whichever row the first is."""
    (rows, count), (row, column) = scale_RB.shape, scale_RB.stride()
    return tensor_map(scale_RB, box=(1, BLOCK_M + 4), swizzle=0, shape=(count, rows), strides=(column, row))


def map_of_stored_rows(d_PN: Tensor, rows: int = WARP_ROWS) -> TensorMap:
    """D as (P, 1, N) in boxes of ``rows``, by default a warp's, and 128 bytes: where two halves are stored, the middle
    counts them.
    """
    (capacity, columns), row = d_PN.shape, d_PN.stride(0)
    box = (rows, 1, 128 // d_PN.element_size())
    return tensor_map(d_PN, box=box, shape=(capacity, 1, columns), strides=(row, columns, 1))


# ---- products with an activation -------------------------------------------------------------------------------------


def product_of(
    index: Tensor | None, expert_offsets: Tensor, num_experts: int, width: int, depth: int, b1: Tensor | None,
    config: GemmConfig,
) -> dict[str, Any]:  # fmt: skip
    """What a kernel takes of its rows, its sizes, and the bias before the activation. ``width``: activations of a row;
    ``depth``: of the product.
    """
    return {
        "offsets": expert_offsets, "index": index, "experts": num_experts, "width": width,
        "blocks_k": -(-depth // config.block_k), "b1": None if b1 is None else b1.contiguous(),
    }  # fmt: skip


def fp8_product_of(
    index: Tensor | None, expert_offsets: Tensor, num_experts: int, width: int, depth: int, b1: Tensor | None,
    scale_w: Tensor, config: GemmConfig,
) -> dict[str, Any]:  # fmt: skip
    """The same with the block scales (E, N/128, K/128) of the weight, in any strides."""
    expert, column, k = scale_w.stride()
    return {
        **product_of(index, expert_offsets, num_experts, width, depth, b1, config),
        "scale_w": scale_w, "scale_w_expert": expert, "scale_w_column": column, "scale_w_k": k,
    }  # fmt: skip


# ---- weights in FP8 --------------------------------------------------------------------------------------------------


def scaled_weight(b_ENK: Quantized, config: GemmConfig) -> dict[str, Any]:
    """What a kernel takes of B and the block scales of B."""
    b, scale = b_ENK
    num_experts, columns, depth = b.shape
    scale_b_expert, scale_b_column, scale_b_k = scale.stride()
    return {
        "map_b": tensor_map(b, box=(1, config.rows_of_b, config.block_k)), "experts": num_experts, "columns": columns,
        "blocks_k": -(-depth // config.block_k), "scale_b": scale, "scale_b_expert": scale_b_expert,
        "scale_b_column": scale_b_column, "scale_b_k": scale_b_k,
    }  # fmt: skip


# ---- gate and up -----------------------------------------------------------------------------------------------------


def map_of_gate_and_up(w1_ENH: Tensor, interleaved: bool, width: int) -> TensorMap:
    """W1 as (E, 2, I, H), bf16 or e4m3, in boxes of the rows of half a tile and 128 bytes."""
    expert, row, _ = w1_ENH.stride()
    half, step = (row, 2 * row) if interleaved else (width * row, row)
    shape = (w1_ENH.shape[0], 2, width, w1_ENH.shape[2])
    box = (1, 1, BLOCK_N // 2, 128 // w1_ENH.element_size())
    return tensor_map(w1_ENH, box=box, shape=shape, strides=(expert, half, step, 1))


def map_of_gate_and_up_columns(w1_ENH: Tensor, interleaved: bool, width: int, block_k: int) -> TensorMap:
    """W1 with H outermost as (E, H, 2I) or, in halves, (E, H, 2, I), in boxes of K of a stage and 64 columns."""
    w1_EHN = w1_ENH.mT
    if interleaved:
        return tensor_map(w1_EHN, box=(1, block_k, 64))
    expert, row, _ = w1_EHN.stride()
    shape, strides = (*w1_EHN.shape[:2], 2, width), (expert, row, width, 1)
    return tensor_map(w1_EHN, box=(1, block_k, 1, 64), shape=shape, strides=strides)


def map_of_halves(z_PN: Tensor, interleaved: bool, *, rows: int) -> TensorMap:
    """Z as (P, 1, 2I) or (P, 2, I), bf16 or e4m3, in boxes of 128 bytes a row: none crosses from one half into the
    other.
    """
    capacity, columns = z_PN.shape
    row, halves = z_PN.stride(0), 1 if interleaved else 2
    shape, strides = (capacity, halves, columns // halves), (row, row if interleaved else columns // 2, 1)
    return tensor_map(z_PN, box=(rows, 1, 128 // z_PN.element_size()), shape=shape, strides=strides)


# ---- partial sums ----------------------------------------------------------------------------------------------------


def summed(partial_ds_BP: Tensor) -> Tensor:
    """(P,), written to memory that is there before the sum: a tape (``jit/tape.py``) can hold that."""
    return torch.sum(partial_ds_BP, 0, out=partial_ds_BP.new_empty(partial_ds_BP.shape[1]))
