"""Steps that some backends fuse into one kernel, composed from their parts for those that do not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

UpProjection = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Activation, GateUpLayout, bool],
    tuple[Tensor, Tensor],
]
DownBackward = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Activation, GateUpLayout],
    tuple[Tensor, Tensor, Tensor],
]
UpProjectionFp8 = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
DownBackwardFp8 = Callable[..., tuple[Tensor, Tensor, Tensor]]
DownBackwardFp8Quantised = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


def compose_up_projection(grouped_mm: Callable[..., Tensor], activation_forward: Callable[..., Tensor]) -> UpProjection:
    """``up_projection`` as a grouped GEMM and an activation pass."""

    def up_projection(
        x_TH: Tensor,
        gather_index: Tensor | None,
        w1_ENH: Tensor,
        b1_EN: Tensor | None,
        expert_offsets: Tensor,
        row_expert_P: Tensor,
        activation: Activation,
        layout: GateUpLayout,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """(H (P, N1) without the bias, or (0, N1) if not ``save``; A = act(H + b1) (P, I)) of the rows of x, or of
        those that ``gather_index`` (P) names.
        """
        z_PN = grouped_mm(x_TH, w1_ENH.transpose(1, 2), expert_offsets, gather_index=gather_index)
        a_PI = activation_forward(z_PN, b1_EN, row_expert_P, activation, layout)
        return z_PN if save else x_TH.new_empty(0, w1_ENH.shape[1]), a_PI

    return up_projection


def compose_down_backward(
    grouped_mm: Callable[..., Tensor], activation_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> DownBackward:
    """``down_backward`` as a grouped GEMM and a pass of the activation's backward."""

    def down_backward(
        dout_TH: Tensor,
        gather_index: Tensor | None,
        w2_EHI: Tensor,
        z_PN: Tensor,
        b1_EN: Tensor | None,
        row_scores_P: Tensor,
        expert_offsets: Tensor,
        row_expert_P: Tensor,
        activation: Activation,
        layout: GateUpLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dH (P, N1), s · A (P, I), dS (P) without the part of b2), from dA = dO · W2 before the score."""
        da_PI = grouped_mm(dout_TH, w2_EHI, expert_offsets, gather_index=gather_index)
        return activation_backward(z_PN, b1_EN, da_PI, row_scores_P, row_expert_P, activation, layout)

    return down_backward


def compose_up_projection_fp8(
    grouped_mm_fp8: Callable[..., Tensor],
    activation_forward: Callable[..., Tensor],
    quantize_rows: Callable[..., tuple[Tensor, Tensor]],
) -> UpProjectionFp8:
    """``up_projection_fp8`` as a grouped GEMM, an activation pass and quantising passes."""

    def up_projection_fp8(
        xq_TH: Tensor,
        x_scale: Tensor,
        gather_index: Tensor | None,
        w1q_ENH: Tensor,
        w1_scale: Tensor,
        b1_EN: Tensor | None,
        expert_offsets: Tensor,
        row_expert_P: Tensor,
        activation: Activation,
        layout: GateUpLayout,
        recipe: Fp8Recipe,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(H as backward will see it, its scales, A = act(H + b1) (P, I) in e4m3, its scales).

        H (P, N1) is without the bias: e4m3 with scales (P, N1/128), or bf16 without scales (0, N1/128), after
        ``recipe.save_preactivation``; (0, N1) bf16 if not ``save``, or if backward computes it again. All scales are
        stored transposed, as TMA loads them (``tma`` of ``quantize_rows``).
        """
        z_PN = grouped_mm_fp8(xq_TH, x_scale, w1q_ENH, w1_scale, expert_offsets, gather_index=gather_index)
        a_PI = activation_forward(z_PN, b1_EN, row_expert_P, activation, layout)
        aq_PI, a_scale = quantize_rows(a_PI, recipe.pow2, True)
        if save and recipe.save_preactivation == "fp8":
            return *quantize_rows(z_PN, recipe.pow2, True), aq_PI, a_scale
        kept = save and recipe.save_preactivation == "bf16"
        no_scale = z_PN.new_empty(0, blocks(z_PN.shape[1]), dtype=torch.float32)
        return z_PN if kept else z_PN.new_empty(0, z_PN.shape[1]), no_scale, aq_PI, a_scale

    return up_projection_fp8


def compose_down_backward_fp8(
    grouped_mm_fp8: Callable[..., Tensor], activation_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> DownBackwardFp8:
    """``down_backward_fp8`` as a grouped GEMM, dequantisation and a pass of the activation's backward."""

    def down_backward_fp8(
        doutq_TH: Tensor,
        dout_scale: Tensor,
        gather_index: Tensor | None,
        w2q_EIH: Tensor,
        w2_scale: Tensor,
        z_PN: Tensor,
        z_scale: Tensor,
        b1_EN: Tensor | None,
        row_scores_P: Tensor,
        expert_offsets: Tensor,
        row_expert_P: Tensor,
        activation: Activation,
        layout: GateUpLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dH (P, N1), s · A (P, I), both bf16, dS (P) without the part of b2), from dA = dO · W2 before the score.

        W2 comes transposed, (E, I, H), and its scales too: Hopper's FP8 products read both operands along the
        contraction. H is e4m3 with scales, or bf16: what ``up_projection_fp8`` saved.
        """
        da_PI = grouped_mm_fp8(doutq_TH, dout_scale, w2q_EIH, w2_scale, expert_offsets, gather_index=gather_index)
        if z_PN.dtype is E4M3:
            z_PN = _dequantize_rows(z_PN, z_scale)
        dz_PN, as_PI, ds_P = activation_backward(z_PN, b1_EN, da_PI, row_scores_P, row_expert_P, activation, layout)
        return dz_PN.to(da_PI.dtype), as_PI.to(da_PI.dtype), ds_P

    return down_backward_fp8


def compose_down_backward_fp8_quantised(
    down_backward_fp8: DownBackwardFp8,
    quantize_tiles: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    quantize_columns: Callable[..., tuple[Tensor, Tensor]],
) -> DownBackwardFp8Quantised:
    """``down_backward_fp8_quantised`` as ``down_backward_fp8`` and quantising passes: dH and s · A are rounded to bf16
    on the way.
    """

    def down_backward_fp8_quantised(
        doutq_TH: Tensor,
        dout_scale: Tensor,
        gather_index: Tensor | None,
        w2q_EIH: Tensor,
        w2_scale: Tensor,
        z_PN: Tensor,
        z_scale: Tensor,
        b1_EN: Tensor | None,
        row_scores_P: Tensor,
        expert_offsets: Tensor,
        row_expert_P: Tensor,
        activation: Activation,
        layout: GateUpLayout,
        padded_offsets: Tensor,
        row_index_G: Tensor,
        pow2: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(dH (P, N1), its row scales, dH transposed (N1, G), its tile scales, s · A transposed (I, G), its tile
        scales, dS (P) without the part of b2): the formats of ``quantize_tiles`` and ``quantize_columns(tiled=True)``.

        Arguments as of ``down_backward_fp8``; then what ``pad_segments`` says of positions, and the kind of scales.
        """
        dz_PN, as_PI, ds_P = down_backward_fp8(
            doutq_TH, dout_scale, gather_index, w2q_EIH, w2_scale, z_PN, z_scale, b1_EN, row_scores_P, expert_offsets,
            row_expert_P, activation, layout,
        )  # fmt: skip
        as_tiles = quantize_columns(as_PI, row_index_G, pow2, tiled=True)
        return *quantize_tiles(dz_PN, row_index_G, pow2), *as_tiles, ds_P

    return down_backward_fp8_quantised


def _dequantize_rows(q_RC: Tensor, scale_RB: Tensor) -> Tensor:
    """q · scale of the rows format in fp32."""
    return q_RC.float() * scale_RB.repeat_interleave(BLOCK, 1)[:, : q_RC.shape[1]]
