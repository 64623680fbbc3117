"""Forward and backward of the expert MLPs in FP8 as a list of kernel calls: ``training/bf16.py`` with every product in
e4m3 (``config/recipe.py``; the arithmetic alone: ``tests/support/fp8_layer.py``).

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
column; s A and dZ one for each tile of 128 x 128, which costs a product no more than the scales of a weight do. For
dx, dZ is quantized as it lies, 1 x 128, so that a token beside a loud one keeps its gradient (DeepSeek-V3, arXiv
2412.19437, appendix B.2: blocks of 128 x 128 there made training diverge). Where both weights need a gradient, the
kernel that computes dZ and s A quantizes them itself (``down_backward_fp8_quantize``). Not so with a gradient of b1,
which is a sum of dZ before: then both are stored in bf16 and quantized in passes of their own. Each of the three ways
is a class below.

Saved for backward: x in bf16, Z, s, the plan and the transposed weights: 2 T H + R N1 (1 + 4/128) bytes and 1
a weight, 57 % of the BF16 layer's 2 T H + 2 R N1 at T 8192, H 3072, I 1536, K 8. ``save_preactivation`` and
``keep_transposed`` trade those bytes for precision or time.

Hopper's FP8 products contract along the contiguous dimension of both operands, so backward takes W1 and W2 transposed.
They are quantized outside the op pair, so that ``quantization/weight_cache.py`` may keep them from one forward to the
next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from supersonic_moe.kernels.alignment import aligned_tensor, weight_gradient
from supersonic_moe.kernels.interface import (
    Arrivals,
    BothOrders,
    DownBackward,
    Fp8Experts,
    Into,
    Quantized,
    Rows,
    UpProjection,
)
from supersonic_moe.quantization.block_format import aligned_rows, padded_capacity, transposed_scales
from supersonic_moe.training.arguments import Fp8Forward, Fp8Output, Fp8Saved, Fp8Weights, Incoming, Inputs
from supersonic_moe.training.bf16 import rounded, score_dtype


def forward(k: Fp8Experts, call: Fp8Forward, x_q: Quantized | None = None) -> Fp8Output:
    """``x_q``: the rows format of x where it is at hand already; of ``call.x`` only the shape counts then."""
    plan, recipe = call.plan, call.numerics.recipe()
    x = Rows(x_q or k.quantize_rows(call.x, recipe.pow2, plan.identity), plan.read_index)
    up = UpProjection(x, call.w1, call.b1, plan.expert_offsets, plan.row_expert, call.static.gate(), call.save)
    z, a = k.up_projection_fp8(up, recipe)
    y_PH = k.grouped_mm_fp8(Rows(a), call.w2, plan.expert_offsets)
    del up, x, a
    s_P = k.pick(call.scores, plan.scatter_index, score_dtype(call.x.dtype))
    out_TH = k.gather_sum(y_PH, s_P, call.b2, plan.row_expert, plan.rows_of_tokens(call.x.shape[0]))
    return Fp8Output(out_TH, s_P, z)


class Arriving(NamedTuple):
    """Codes of dO that come while the first product of backward runs."""

    rows: Arrivals
    fill: Callable[[], object]
    """Called once they are there: it fills ``incoming.dout``, which is not read before."""


def backward(
    k: Fp8Experts,
    weights: Fp8Weights,
    saved: Fp8Saved,
    incoming: Incoming,
    x_q: Quantized | None = None,
    dout_q: Quantized | None = None,
    arriving: Arriving | None = None,
    leave: Callable[[Tensor | None], None] | None = None,
) -> Inputs[Tensor | None]:
    """``x_q``, ``dout_q``: the rows format of x and dO where they are at hand already. ``leave(dx)`` is called as soon
    as dx is there: before the weight gradients, which hide what it starts, and while s A is kept.
    """
    plan, needs, pow2, s_P, b1, b2 = saved.plan, incoming.needs, saved.pow2, saved.row_scores, saved.b1, saved.b2
    dout, offsets = Rows(incoming.dout, plan.read_index), plan.expert_offsets
    dx = dscores = dw1 = db1 = dw2 = db2 = None

    z = saved.z
    if z.q.dtype.itemsize == 1:
        z = Quantized(aligned_rows(z.q), transposed_scales(z.scale))
    elif weights.w1_q is not None:  # Z was not kept
        x = Rows(x_q or k.quantize_rows(saved.x, pow2, plan.identity), plan.read_index)
        w1 = Quantized(aligned_rows(weights.w1_q), weights.w1_scale)
        z = Quantized(k.grouped_mm_fp8(x, w1, offsets), z.scale)
        del x, w1
    else:
        z = Quantized(aligned_tensor("z", z.q), z.scale)
    dout_rows = Rows(dout_q or k.quantize_rows(incoming.dout, pow2, plan.identity), plan.read_index)
    wgrad = _weight_gradients(k, saved, incoming)
    step = DownBackward(dout_rows, weights.w2_t, z, b1, s_P, offsets, plan.row_expert, saved.static.gate())
    dz, scaled_a, ds_P = wgrad.down(step, None if arriving is None else arriving.rows)
    if arriving is not None:
        arriving.fill()
    del step, dout_rows, dout_q, z
    if needs.scores:
        if b2 is not None:
            k.row_dot(dout, b2, plan.row_expert, ds_P)
        dscores = k.pick(ds_P, plan.reverse_index, s_P.dtype)
    if leave is None and needs.w2:
        dw2 = wgrad.dw2(scaled_a)
    if leave is None:
        del scaled_a
    if needs.b2 and b2 is not None:
        db2 = rounded(k.segment_sum(dout, s_P, offsets), b2)
    if needs.b1 and b1 is not None:
        db1 = rounded(k.segment_sum(Rows(dz), None, offsets), b1)
    dz_rows, dz = wgrad.quantized(dz)
    if leave is not None:
        dx = _dx(k, dz_rows, weights, saved) if needs.x else None
        leave(dx)
        if needs.w2:
            dw2 = wgrad.dw2(scaled_a)
        del scaled_a
    if needs.w1:
        dw1 = wgrad.dw1(dz)
    del dz
    if leave is None and needs.x:
        dx = _dx(k, dz_rows, weights, saved)
    return Inputs(dx, dscores, dw1, db1, dw2, db2)


def _dx(k: Fp8Experts, dz_rows: Any, weights: Fp8Weights, saved: Fp8Saved) -> Tensor:
    plan = saved.plan
    dx_PH = k.grouped_mm_fp8(Rows(dz_rows), weights.w1_t, plan.expert_offsets)
    return k.gather_sum(dx_PH, None, None, plan.row_expert, plan.rows_of_tokens(saved.x.shape[0]))


# ---- weight gradients, in three ways ---------------------------------------------------------------------------------


class _Bf16Products:
    """dW1 and dW2 of bf16 rows, which the products gather themselves.

    In what form dZ and s A come from ``down`` and go to ``dw2``, ``quantized`` and ``dw1``, each way knows alone.
    """

    def __init__(self, k: Fp8Experts, saved: Fp8Saved, incoming: Incoming) -> None:
        self.k, self.saved, self.incoming = k, saved, incoming
        self.plan, self.main, self.pow2 = saved.plan, incoming.main, saved.pow2

    def down(self, step: DownBackward[Quantized], arriving: Arrivals | None) -> tuple[Any, Any, Tensor]:
        """(dZ, s A, dS)."""
        return self.k.down_backward_fp8(step, arriving)

    def dw2(self, as_PI: Any) -> Tensor:
        dout, offsets = Rows(self.incoming.dout, self.plan.read_index), self.plan.expert_offsets
        return self._new_w2(partial(self.k.grouped_mm_wgrad, dout, as_PI, offsets))

    def quantized(self, dz_PN: Any) -> tuple[Any, Any]:
        """(rows of dZ for dx, dZ for ``dw1``)."""
        return self.k.quantize_rows(dz_PN, self.pow2, True) if self.incoming.needs.x else None, dz_PN

    def dw1(self, dz_PN: Any) -> Tensor:
        x, offsets = Rows(self.saved.x, self.plan.read_index), self.plan.expert_offsets
        return self._new_w1(partial(self.k.grouped_mm_wgrad, x, dz_PN, offsets))

    def _new_w1(self, product: Callable[[Into], Tensor]) -> Tensor:
        """``product`` into the buffer of the caller, or into a new tensor."""
        into = Into(self.main.w1, transposed=True, accumulate=self.main.adds_w1)
        return weight_gradient(self.saved.w1_turned, into, product)

    def _new_w2(self, product: Callable[[Into], Tensor]) -> Tensor:
        into = Into(self.main.w2, accumulate=self.main.adds_w2)
        return weight_gradient(self.saved.w2_turned, into, product)


class _Fp8Products(_Bf16Products):
    """dW1 and dW2 of e4m3 operands, transposed and padded, which passes make of bf16 rows."""

    def __init__(self, k: Fp8Experts, saved: Fp8Saved, incoming: Incoming) -> None:
        super().__init__(k, saved, incoming)
        offsets, index = self.plan.expert_offsets, self.plan.gather_index
        self.segments = k.pad_segments(offsets, index, padded_capacity(index.shape[0], offsets.shape[0] - 1))

    def dw2(self, as_PI: Any) -> Tensor:
        return self.dw2_of(self.k.quantize_columns(as_PI, self.segments.row_index, self.pow2, tiled=True))

    def dw2_of(self, scaled_a: Quantized) -> Tensor:
        return self._new_w2(self._product(self.incoming.dout, scaled_a))

    def quantized(self, dz_PN: Any) -> tuple[Any, Any]:
        if self.incoming.needs.w1:
            return self.k.quantize_both_orders(dz_PN, self.segments.row_index, self.pow2)
        return super().quantized(dz_PN)

    def dw1(self, dz: Any) -> Tensor:
        return self._new_w1(self._product(self.saved.x, dz))

    def _product(self, x_TH: Tensor, tiles: Quantized) -> Callable[[Into], Tensor]:
        """Of the columns of x or dO, written once for experts that read the same tokens, and those of rows."""
        offsets, _, token_index, source = self.segments
        columns = self.k.quantize_columns(x_TH, token_index, self.pow2, segments=self.segments)
        return partial(self.k.grouped_mm_wgrad_fp8, columns, tiles, offsets, source=source)


class _FusedFp8Products(_Fp8Products):
    """The same of what the kernel that computes dZ and s A has quantized itself."""

    def down(self, step: DownBackward[Quantized], arriving: Arrivals | None) -> tuple[BothOrders, Quantized, Tensor]:
        return self.k.down_backward_fp8_quantize(step, self.segments, self.pow2, arriving)

    def dw2(self, scaled_a: Quantized) -> Tensor:
        return self.dw2_of(scaled_a)

    def quantized(self, dz: BothOrders) -> tuple[Quantized, Quantized]:
        return dz


def _weight_gradients(k: Fp8Experts, saved: Fp8Saved, incoming: Incoming) -> _Bf16Products:
    needs = incoming.needs
    if saved.numerics.wgrad == "bf16" or not (needs.w1 or needs.w2):
        return _Bf16Products(k, saved, incoming)
    sums_dz = needs.b1 and saved.b1 is not None  # db1 needs dZ as it was before quantization
    if needs.w1 and needs.w2 and not sums_dz:
        return _FusedFp8Products(k, saved, incoming)
    return _Fp8Products(k, saved, incoming)
