"""Steps that some backends fuse into one kernel, composed of their parts for those that do not. Signatures and results
are those of ``kernels/interface.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.interface import (
    Arrivals,
    BothOrders,
    DownBackward,
    Gate,
    Quantized,
    Rows,
    Segments,
    UpProjection,
)
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks, saved_steps

ActivationForward = Callable[[Tensor, Tensor | None, Tensor, Gate], Tensor]
"""(z (P, N1), b1 (E, N1), row_expert (P), gate) -> A = act(z + b1) (P, I)"""
ActivationBackward = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Gate], tuple[Tensor, Tensor, Tensor]]
"""(z, b1, dA before the score (P, I), row_scores (P), row_expert, gate) -> (dZ (P, N1), s · A (P, I), dS (P))"""


@dataclass(frozen=True)
class Composed:
    """The fused steps of ``Experts``: a grouped GEMM, then a pass over its result."""

    grouped_mm: Callable[[Rows[Tensor], Tensor, Tensor], Tensor]
    activation_forward: ActivationForward
    activation_backward: ActivationBackward

    def up_projection(self, step: UpProjection[Tensor], arriving: Arrivals | None = None) -> tuple[Tensor, Tensor]:
        _wait(arriving)
        z_PN = self.grouped_mm(step.x, step.w1.transpose(1, 2), step.expert_offsets)
        a_PI = self.activation_forward(z_PN, step.b1, step.row_expert, step.gate)
        return z_PN if step.save else z_PN.new_empty(0, z_PN.shape[1]), a_PI

    def down_backward(
        self, step: DownBackward[Tensor], arriving: Arrivals | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _wait(arriving)
        da_PI = self.grouped_mm(step.dout, step.w2, step.expert_offsets)
        return self.activation_backward(step.z, step.b1, da_PI, step.row_scores, step.row_expert, step.gate)


@dataclass(frozen=True)
class ComposedFp8:
    """The fused steps of ``Fp8Experts``: a grouped GEMM, a pass over its result, and passes that quantize."""

    grouped_mm_fp8: Callable[[Rows[Quantized], Quantized, Tensor], Tensor]
    activation_forward: ActivationForward
    activation_backward: ActivationBackward
    quantize_rows: Callable[[Tensor, bool, bool], Quantized]
    quantize_saved: Callable[[Tensor], Quantized]
    quantize_columns: Callable[[Tensor, Tensor, bool, bool], Quantized]
    quantize_both_orders: Callable[[Tensor, Tensor, bool], BothOrders]

    def up_projection_fp8(
        self, step: UpProjection[Quantized], recipe: Fp8Recipe, arriving: Arrivals | None = None
    ) -> tuple[Quantized, Quantized]:
        _wait(arriving)
        z_PN = self.grouped_mm_fp8(step.x, step.w1, step.expert_offsets)
        a_PI = self.activation_forward(z_PN, step.b1, step.row_expert, step.gate)
        a = self.quantize_rows(a_PI, recipe.pow2, True)
        if step.save and recipe.save_preactivation == "fp8":
            return self.quantize_rows(z_PN, recipe.pow2, True), a
        if step.save and recipe.save_preactivation == "int8":
            return self.quantize_saved(z_PN), a
        kept = step.save and recipe.save_preactivation == "bf16"
        no_scale = z_PN.new_empty(0, blocks(z_PN.shape[1]), dtype=torch.float32)
        return Quantized(z_PN if kept else z_PN.new_empty(0, z_PN.shape[1]), no_scale), a

    def down_backward_fp8(
        self, step: DownBackward[Quantized], arriving: Arrivals | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _wait(arriving)
        da_PI = self.grouped_mm_fp8(step.dout, step.w2, step.expert_offsets)
        z = _dequantized(step.z)
        dz_PN, as_PI, ds_P = self.activation_backward(z, step.b1, da_PI, step.row_scores, step.row_expert, step.gate)
        return _in(da_PI.dtype, dz_PN), _in(da_PI.dtype, as_PI), ds_P

    def down_backward_fp8_quantize(
        self, step: DownBackward[Quantized], segments: Segments, pow2: bool, arriving: Arrivals | None = None
    ) -> tuple[BothOrders, Quantized, Tensor]:
        """dZ and s · A are rounded to bf16 on the way."""
        dz_PN, as_PI, ds_P = self.down_backward_fp8(step, arriving)
        as_IG = self.quantize_columns(as_PI, segments.row_index, pow2, True)
        return self.quantize_both_orders(dz_PN, segments.row_index, pow2), as_IG, ds_P


def _wait(arriving: Arrivals | None) -> None:
    if arriving is not None:
        arriving.wait()


def _dequantized(z_PN: Quantized) -> Tensor:
    """fp32 of the rows format or of the saved one; bf16 as it is."""
    (q, scale), columns = z_PN, z_PN.shape[1]
    if q.dtype is torch.int8:
        return q.float() * saved_steps(scale, columns)
    if q.dtype is not E4M3:
        return q
    exact, whole = _in(torch.float32, q), columns // BLOCK * BLOCK
    exact[:, :whole].view(len(q), whole // BLOCK, BLOCK).mul_(scale[:, : whole // BLOCK, None])
    if whole < columns:
        exact[:, whole:].mul_(scale[:, whole // BLOCK :])
    return exact


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """``x.to(dtype)`` as a tape can hold it."""
    return x if x.dtype is dtype else x.new_empty(x.shape, dtype=dtype).copy_(x)
