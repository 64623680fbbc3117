"""What each kernel of a layer must cost where it runs alone: steps of ``roofline.py``, their variants, FP8 quantizers.

Symbols and rules are those of ``roofline.py``: bytes are compulsory, so a gathered operand counts its T distinct rows,
however often the gather reads them again. A variant differs from its step in what it writes:

    up_projection_inference    no pre-activation
    wgrad_*_accumulate         fp32, read and written, of the experts that have rows; the others are left alone

The quantizers write e4m3 (1 byte an element) and an fp32 scale a block (``quantization/block_format.py``). Where they
transpose for a weight gradient, rows become G positions: the rows of each expert padded to whole blocks of 128, as many
as any routing may need.

    quantize_rows_x        x (T, H)               -> q (T, H), scales 1 x 128
    quantize_blocks_w1/2   w (E, N, K)            -> q, its transpose, scales 128 x 128 that both share
    quantize_columns_x     x gathered by position -> q (H, G), scales 1 x 128 along the positions
    quantize_both_orders_dz      dZ (R, N1)             -> q (R, N1), scales 1 x 128; q (N1, G), scales 128 x 128
"""

from __future__ import annotations

from dataclasses import replace

from supersonic_moe.perf_model.roofline import INDEX_BYTES, LayerShape, Step, layer_steps

FP32_BYTES = 4  # a scale, an element of main_grad


def kernel_steps(shape: LayerShape, *, gated: bool, element_bytes: int = 2) -> dict[str, Step]:
    """Every kernel of ``bench/kernels.py`` by its name there."""
    step = {step.key: step for step in layer_steps(shape, gated=gated, element_bytes=element_bytes)}
    H, I, E, R = shape.hidden, shape.intermediate, shape.experts, shape.rows  # noqa: E741
    N1, b = I * (2 if gated else 1), element_bytes
    passes = quantizer_bytes(shape, gated=gated, element_bytes=element_bytes)
    plan_bytes = step["top-k"].bytes + step["metadata"].bytes

    def accumulating(key: str, elements: int) -> Step:
        stored, added = b * E * elements, 2 * FP32_BYTES * min(E, R) * elements
        return replace(step[key], what=f"fp32 += {step[key].what}", bytes=step[key].bytes - stored + added)

    return {
        "route_forward": step["top-k"],
        "build_plan": step["metadata"],
        "route_and_plan": Step("top-k, metadata", "forward", "scores, ids, offsets, row indices", 0, plan_bytes),
        "route_backward": step["d top-k"],
        "up_projection": step["1"],
        "up_projection_inference": replace(step["1"], what="A without Z", bytes=step["1"].bytes - b * R * N1),
        "grouped_mm_y": step["2"],
        "gather_sum_out": step["3"],
        "down_backward": step["4"],
        "wgrad_dw2": step["5"],
        "wgrad_dw2_accumulate": accumulating("5", H * I),
        "wgrad_dw1": step["7"],
        "wgrad_dw1_accumulate": accumulating("7", H * N1),
        "grouped_mm_dx": step["6"],
        "gather_sum_dx": step["8"],
        "quantize_rows_x": Step("q x", "forward", "X in FP8", 0, passes["x"]),
        "quantize_blocks_w1": Step("q w1", "forward", "W1 and W1^T in FP8", 0, passes["w1"]),
        "quantize_blocks_w2": Step("q w2", "forward", "W2 and W2^T in FP8", 0, passes["w2"]),
        "quantize_columns_x": Step("q x^T", "backward", "gather(X)^T in FP8", 0, passes["columns_x"]),
        "quantize_both_orders_dz": Step("q dz", "backward", "dZ and dZ^T in FP8", 0, passes["both_orders_dz"]),
    }


def quantizer_bytes(shape: LayerShape, *, gated: bool, element_bytes: int = 2) -> dict[str, int]:
    """Bytes of every quantizing pass, and "positions", G itself."""
    from supersonic_moe.quantization.block_format import (  # imports torch, for which --help cannot wait
        blocks,
        padded_capacity,
    )

    T, H, I, E, R = shape.tokens, shape.hidden, shape.intermediate, shape.experts, shape.rows  # noqa: E741
    N1, b, G = I * (2 if gated else 1), element_bytes, padded_capacity(R, E)

    def rows(count: int, columns: int) -> int:
        return count * ((b + 1) * columns + FP32_BYTES * blocks(columns))

    def weight(n: int, k: int) -> int:
        return E * ((b + 2) * n * k + FP32_BYTES * blocks(n) * blocks(k))

    def transposed(columns: int, scales: int) -> int:
        return INDEX_BYTES * G + columns * G + FP32_BYTES * scales * blocks(G)

    return {
        "positions": G,
        "x": rows(T, H),
        "w1": weight(N1, H),
        "w2": weight(H, I),
        "rows_dh": rows(R, N1),
        "columns_x": b * T * H + transposed(H, H),
        "both_orders_dz": rows(R, N1) + transposed(N1, blocks(N1)),
    }
