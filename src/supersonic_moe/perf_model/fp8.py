"""FLOPs, compulsory bytes and floors of an FP8 layer, step by step, in the order of ``training/fp8.py``.

Symbols and rules are those of ``roofline.py``. An element in e4m3 is 1 byte; its scale adds 4/128 where it is shared by
1 x 128 elements, and next to nothing where it is shared by 128 x 128. The eight steps of the BF16 layer keep their
numbers, and ``q ..`` are the passes that quantize what no product's epilogue could:

    forward    q W          both weights, each once: q, its transpose and their shared scales
               q X          at T rows
    backward   q dO         at T rows
    wgrad=bf16 q dH         in rows for step 6
    wgrad=fp8  q dO^T, q X^T    transposed, each expert's rows padded to whole blocks of 128: G positions; step 4 gives
                            dZ in rows and transposed, and A' transposed (without a gradient of b1)
    recompute  q X again, Z again

Weight gradients in bf16 count at the rate of 16-bit products.
"""

from __future__ import annotations

from typing import Literal

from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.perf_model.kernels import FP32_BYTES, quantizer_bytes
from supersonic_moe.perf_model.roofline import INDEX_BYTES, LayerShape, Step, layer_steps

SCALE = FP32_BYTES / 128  # bytes a scale adds to each of the 128 elements that share it
KEPT = {"fp8": 1 + SCALE, "int8": 1 + SCALE, "bf16": 2.0, "recompute": 0.0}  # bytes of an element of Z


def fp8_steps(shape: LayerShape, recipe: Fp8Recipe, *, gated: bool) -> list[Step]:
    """The steps of one training call, in the order they run."""
    T, H, I, E = shape.tokens, shape.hidden, shape.intermediate, shape.experts  # noqa: E741
    R, N1, i = shape.rows, I * (2 if gated else 1), INDEX_BYTES
    hit = min(E, R)
    bf16 = {step.key: step for step in layer_steps(shape, gated=gated)}
    passes = quantizer_bytes(shape, gated=gated)

    def quantize(key: str, phase: Literal["forward", "backward"], what: str, moved: int) -> Step:
        return Step(key, phase, what, 0, moved)

    def product(key: str, what: str, *parts: float) -> Step:
        step = bf16[key.rstrip("'")]  # 1' is step 1 once more, in backward
        phase = step.phase if key == step.key else "backward"
        return Step(key, phase, what, step.flops, round(sum(parts)), fp8=True)

    x_q, w1_q, w2_q = T * H * (1 + SCALE), hit * N1 * H, hit * H * I  # read
    a_q, routed_rows, index, scores = R * I * (1 + SCALE), 2 * R * H, i * R, i * R
    saved = R * N1 * KEPT[recipe.save_preactivation]
    seen = saved or 2 * R * N1  # by backward

    forward = [
        *(bf16[key] for key in ("router", "top-k", "metadata")),
        quantize("q W", "forward", "W1, W1^T, W2 and W2^T in FP8", passes["w1"] + passes["w2"]),
        quantize("q X", "forward", "X in FP8", passes["x"]),
        product("1", "q(Z), q(A), A = act(gather(q X) @ q W1)", x_q, w1_q, a_q, saved, index),
        product("2", "Y = q(A) @ q W2", a_q, w2_q, routed_rows),
        bf16["3"],
    ]
    again = [
        quantize("q X again", "backward", "X in FP8", passes["x"]),
        product("1'", "Z = gather(q X) @ q W1", x_q, w1_q, 2 * R * N1, index),
    ]
    in_fp8, positions = recipe.wgrad == "fp8", passes["positions"]
    segments = quantize("segments", "backward", "positions of padded experts", 2 * index + 2 * i * positions)
    to_step_4 = x_q, w2_q, seen, 2 * scores, index
    if in_fp8:
        quantized = R * N1 * (1 + SCALE), positions * (N1 + I)
        dgated = product("4", "q(dZ), q(dZ)^T, q(A')^T, dS of gather(q dO) @ q W2^T", *to_step_4, *quantized)
    else:
        dgated = product("4", "dZ, A', dS of gather(q dO) @ q W2^T", *to_step_4, 2 * R * N1, 2 * R * I)
    dw2 = product("5", "dW2 = q(dO)^T @ q(A')", R * (H + I) + SCALE * R * H, 2 * E * H * I)
    dw1 = product("7", "dW1 = q(X)^T @ q(dZ)", R * (H + N1) + SCALE * R * H, 2 * E * H * N1)
    return [
        *forward,
        *(again if recipe.save_preactivation == "recompute" else ()),
        quantize("q dO", "backward", "dO in FP8", passes["x"]),
        *((segments,) if in_fp8 else ()),
        dgated,
        *((quantize("q dO^T", "backward", "gather(dO)^T in FP8", passes["columns_x"]),) if in_fp8 else ()),
        dw2 if in_fp8 else bf16["5"],
        quantize("q X^T", "backward", "gather(X)^T in FP8", passes["columns_x"])
        if in_fp8
        else quantize("q dH", "backward", "dZ in FP8", passes["rows_dh"]),
        dw1 if in_fp8 else bf16["7"],
        product("6", "dX~ = q(dZ) @ q W1^T", R * N1 * (1 + SCALE), w1_q, routed_rows),
        *(bf16[key] for key in ("8", "d top-k", "d router")),
    ]


def fp8_step_kernels(recipe: Fp8Recipe) -> dict[str, str]:
    """``STEP_KERNELS`` of an FP8 layer, in the order in which its steps run."""
    in_fp8 = recipe.wgrad == "fp8"
    wgrad = "grouped_mm_wgrad_fp8" if in_fp8 else "grouped_mm_wgrad"
    again = {"q X again": "quantize_rows", "1'": "grouped_mm_fp8"}
    return {
        "top-k": "route_forward",
        "metadata": "build_plan",
        "q W": "quantize_weights",
        "q X": "quantize_rows",
        "1": "up_projection_fp8",
        "2": "grouped_mm_fp8",
        "3": "gather_sum",
        **(again if recipe.save_preactivation == "recompute" else {}),
        "q dO": "quantize_rows",
        **({"segments": "pad_segments"} if in_fp8 else {}),
        "4": "down_backward_fp8_quantize" if in_fp8 else "down_backward_fp8",
        **({"q dO^T": "quantize_columns"} if in_fp8 else {}),
        "5": wgrad,
        **({"q X^T": "quantize_columns"} if in_fp8 else {"q dH": "quantize_rows"}),
        "7": wgrad,
        "6": "grouped_mm_fp8",
        "8": "gather_sum",
        "d top-k": "route_backward",
    }


def fp8_saved_bytes(shape: LayerShape, recipe: Fp8Recipe, *, gated: bool) -> tuple[int, int]:
    """Bytes that a training forward keeps: (activations: X in bf16 and the pre-activation; FP8 copies of weights)."""
    pre_activation = shape.rows * shape.intermediate * (2 if gated else 1)
    activations = 2 * shape.tokens * shape.hidden + round(KEPT[recipe.save_preactivation] * pre_activation)
    fan, matrix = 2 if gated else 1, shape.experts * shape.hidden * shape.intermediate
    w1 = fan * matrix * (2 if recipe.save_preactivation == "recompute" else 1)  # recomputing reads W1 as it lies, too
    return activations, (w1 + matrix) if recipe.keep_transposed else 0
