"""Forward and backward of the expert MLPs in FP8 as a list of kernel calls: ``training/bf16.py`` with every product in
e4m3 (``config/recipe.py``; the arithmetic alone: ``kernels/reference/fp8_layer.py``).

    q: e4m3, 1 x 128 scales for rows, 128 x 128 for weights    ~: rows read through an index inside a GEMM's loads

    forward                                            backward
    q(W1), q(W2)    with their transposes              q(dO)           at T rows
    q(x)            at T rows                          dA = q(dO~) q(W2)
    Z  = q(x~) q(W1)^T           saved as q(Z)         A  = act(Z + b1)               recomputed
    q(A), A = act(Z + b1)                              dS = <dA, A> + <dO~, b2>       dZ = act'(Z + b1) * (s dA)
    Y  = q(A) q(W2)^T                                  dW2 = dO~^T (s A)              dW1 = dZ^T x~
    O  = sum over the token's rows of s (Y + b2)       db1, db2: sums over rows
                                                       dx = sum over the token's rows of q(dZ) q(W1)

Weight gradients multiply in bf16, or with ``wgrad="fp8"`` in e4m3 scaled along tokens: their operands are transposed
and each expert's rows padded to whole blocks of 128 positions (``pad_segments``). dO and x have a scale for each
column; s A and dZ one for each tile of 128 x 128, which costs a product no more than the scales of a weight do, and
lets one quantization of dZ serve dx as it lies and dW1 transposed. Where both weights need a gradient, the kernel that
computes dZ and s A quantizes them itself (``down_backward_fp8_quantised``). Not so with a gradient of b1, which is a
sum of dZ before: then both are stored in bf16 and quantized in passes of their own. Each of the three ways is a class
below.

Saved for backward: x in bf16, Z, s, the plan and the transposed weights: 2 T H + R N1 (1 + 4/128) bytes and 1
a weight, 57 % of the BF16 layer's 2 T H + 2 R N1 at T 8192, H 3072, I 1536, K 8. ``save_preactivation`` and
``keep_transposed`` trade those bytes for precision or time.

Hopper's FP8 products contract along the contiguous dimension of both operands, so backward takes W1 and W2 transposed.
They are quantized outside the op pair, so that ``quantization/weight_cache.py`` may keep them from one forward to the
next.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from supersonic_moe.quantization.block_format import padded_capacity
from supersonic_moe.training.arguments import Fp8Forward, Fp8Output, Fp8Saved, Incoming, Inputs


def forward(k: ModuleType, call: Fp8Forward) -> Fp8Output:
    x, plan, offsets, recipe = call.x, call.plan, call.plan.expert_offsets, call.numerics.recipe()
    x_q, x_scale = k.quantize_rows(x, recipe.pow2, plan.identity)
    z_PN, z_scale, a_q, a_scale = k.up_projection_fp8(
        x_q, x_scale, plan.read_index, *call.w1, call.b1, offsets, plan.row_expert, *call.static.gate(), recipe,
        call.save,
    )  # fmt: skip
    y_PH = k.grouped_mm_fp8(a_q, a_scale, *call.w2, offsets)
    del x_q, x_scale, a_q, a_scale
    s_P = k.pick(call.scores, plan.scatter_index)
    out_TH = k.gather_sum(y_PH, s_P, call.b2, *plan.summing(x.shape[0]))
    return Fp8Output(out_TH, s_P, z_PN, z_scale)


def backward(k: ModuleType, saved: Fp8Saved, incoming: Incoming) -> Inputs[Tensor | None]:
    dout, needs, _ = incoming
    x, s_P, z_PN, b1, b2, plan = saved.x, saved.row_scores, saved.z, saved.b1, saved.b2, saved.plan
    index, offsets, recipe = plan.read_index, plan.expert_offsets, saved.numerics.recipe()
    dx = dscores = dw1 = db1 = dw2 = db2 = None

    if saved.w1_q is not None:  # Z was not kept
        x_q, x_scale = k.quantize_rows(x, recipe.pow2, plan.identity)
        z_PN = k.grouped_mm_fp8(x_q, x_scale, saved.w1_q, saved.w1_t.scale.mT, offsets, gather_index=index)
        del x_q, x_scale
    dout_q, dout_scale = k.quantize_rows(dout, recipe.pow2, plan.identity)
    wgrad = _weight_gradients(k, saved, incoming)
    dz, scaled_a, ds_P = wgrad.down(dout_q, dout_scale, z_PN)
    del dout_q, dout_scale, z_PN
    if needs.scores:
        if b2 is not None:
            k.row_dot(dout, b2, plan.row_expert, ds_P, gather_index=index)
        dscores = k.pick(ds_P, plan.reverse_index, s_P.dtype)
    if needs.w2:
        dw2 = wgrad.dw2(scaled_a)
    del scaled_a
    if needs.b2 and b2 is not None:
        db2 = k.segment_sum(dout, s_P, offsets, gather_index=index).to(b2.dtype)
    if needs.b1 and b1 is not None:
        db1 = wgrad.sum(dz).to(b1.dtype)
    dz_rows, dz = wgrad.quantized(dz)
    if needs.w1:
        dw1 = wgrad.dw1(dz)
    del dz
    if needs.x:
        dx_PH = k.grouped_mm_fp8(*dz_rows, *saved.w1_t, offsets)
        dx = k.gather_sum(dx_PH, None, None, *plan.summing(x.shape[0]))
    return Inputs(dx, dscores, dw1, db1, dw2, db2)


# ---- weight gradients ------------------------------------------------------------------------------------------------


class _InBf16:
    """Products of bf16 rows, which they gather themselves. dZ and s A are bf16 rows."""

    def __init__(self, k: ModuleType, saved: Fp8Saved, incoming: Incoming) -> None:
        self.k, self.saved, self.plan = k, saved, saved.plan
        self.dout, self.needs, self.main = incoming
        self.pow2 = saved.numerics.recipe().pow2

    def down(self, dout_q: Tensor, dout_scale: Tensor, z_PN: Tensor) -> tuple[Any, Any, Tensor]:
        """(dZ, s A, dS), the first two as the other methods take them."""
        dz_PN, as_PI, ds_P = self.k.down_backward_fp8(*self._down_operands(dout_q, dout_scale, z_PN))
        return dz_PN, as_PI, ds_P

    def _down_operands(self, dout_q: Tensor, dout_scale: Tensor, z_PN: Tensor) -> tuple[Any, ...]:
        saved, plan = self.saved, self.plan
        rows = saved.row_scores, plan.expert_offsets, plan.row_expert
        gate = saved.static.gate()
        return dout_q, dout_scale, plan.read_index, *saved.w2_t, z_PN, saved.z_scale, saved.b1, *rows, *gate

    def sum(self, dz_PN: Any) -> Tensor:
        """db1."""
        db1: Tensor = self.k.segment_sum(dz_PN, None, self.plan.expert_offsets)
        return db1

    def quantized(self, dz_PN: Any) -> tuple[Any, Any]:
        """(q of the rows of dZ and its scales, for dx; dZ as ``dw1`` takes it)."""
        return self.k.quantize_rows(dz_PN, self.pow2, True) if self.needs.x else None, dz_PN

    def dw1(self, dz_PN: Any) -> Tensor:
        return self._product(self.saved.x, dz_PN, self.main.w1, transposed=True)

    def dw2(self, as_PI: Any) -> Tensor:
        return self._product(self.dout, as_PI, self.main.w2, transposed=False)

    def _product(self, tokens: Tensor, rows: Any, main: Tensor | None, transposed: bool) -> Tensor:
        index, offsets, added = self.plan.read_index, self.plan.expert_offsets, main is not None
        dw: Tensor = self.k.grouped_mm_wgrad(
            tokens, rows, offsets, main, gather_index=index, transposed=transposed, accumulate=added
        )
        return dw


class _InFp8(_InBf16):
    """Products of e4m3 operands, transposed and padded, which passes make of bf16 rows."""

    def __init__(self, k: ModuleType, saved: Fp8Saved, incoming: Incoming) -> None:
        super().__init__(k, saved, incoming)
        offsets, index = self.plan.expert_offsets, self.plan.gather_index
        capacity = padded_capacity(index.shape[0], offsets.shape[0] - 1)
        self.positions, self.row_index, self.token_index = k.pad_segments(offsets, index, capacity)

    def quantized(self, dz_PN: Any) -> tuple[Any, Any]:
        if not self.needs.w1:
            return super().quantized(dz_PN)
        q_PN, scale, *tiles = self.k.quantize_tiles(dz_PN, self.row_index, self.pow2)
        return (q_PN, scale), tiles

    def dw2(self, as_PI: Any) -> Tensor:
        dout_columns = self.k.quantize_columns(self.dout, self.token_index, self.pow2)
        as_tiles = self.k.quantize_columns(as_PI, self.row_index, self.pow2, tiled=True)
        return self._product_of_columns(dout_columns, as_tiles, self.main.w2, transposed=False)

    def dw1(self, dz_tiles: Any) -> Tensor:
        x_columns = self.k.quantize_columns(self.saved.x, self.token_index, self.pow2)
        return self._product_of_columns(x_columns, dz_tiles, self.main.w1, transposed=True)

    def _product_of_columns(self, columns: Any, tiles: Any, main: Tensor | None, transposed: bool) -> Tensor:
        added = main is not None
        dw: Tensor = self.k.grouped_mm_wgrad_fp8(
            *columns, *tiles, self.positions, main, transposed=transposed, accumulate=added
        )
        return dw


class _InFp8Fused(_InFp8):
    """The same products of what the down-projection's backward quantized itself."""

    def down(self, dout_q: Tensor, dout_scale: Tensor, z_PN: Tensor) -> tuple[Any, Any, Tensor]:
        dz_q, dz_scale, dz_tiles, dz_tile_scale, *as_tiles, ds_P = self.k.down_backward_fp8_quantised(
            *self._down_operands(dout_q, dout_scale, z_PN), self.positions, self.row_index, self.pow2
        )
        return ((dz_q, dz_scale), (dz_tiles, dz_tile_scale)), as_tiles, ds_P

    def quantized(self, dz: Any) -> tuple[Any, Any]:
        rows, tiles = dz
        return rows, tiles

    def dw2(self, as_tiles: Any) -> Tensor:
        dout_columns = self.k.quantize_columns(self.dout, self.token_index, self.pow2)
        return self._product_of_columns(dout_columns, as_tiles, self.main.w2, transposed=False)


def _weight_gradients(k: ModuleType, saved: Fp8Saved, incoming: Incoming) -> _InBf16:
    needs = incoming.needs
    if saved.numerics.wgrad == "bf16" or not (needs.w1 or needs.w2):
        return _InBf16(k, saved, incoming)
    sums_dz = needs.b1 and saved.b1 is not None  # db1 needs dZ as it was before
    if needs.w1 and needs.w2 and not sums_dz:
        return _InFp8Fused(k, saved, incoming)
    return _InFp8(k, saved, incoming)
