"""Steps that some backends fuse into one kernel, composed from their parts for those that do not."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from supersonic_moe.activation import Activation, GateUpLayout

UpProjection = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Activation, GateUpLayout, bool],
    tuple[Tensor, Tensor],
]
DownBackward = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Activation, GateUpLayout],
    tuple[Tensor, Tensor, Tensor],
]


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
        h_PN = grouped_mm(x_TH, w1_ENH.transpose(1, 2), expert_offsets, gather_index=gather_index)
        a_PI = activation_forward(h_PN, b1_EN, row_expert_P, activation, layout)
        return h_PN if save else x_TH.new_empty(0, w1_ENH.shape[1]), a_PI

    return up_projection


def compose_down_backward(
    grouped_mm: Callable[..., Tensor], activation_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> DownBackward:
    """``down_backward`` as a grouped GEMM and a pass of the activation's backward."""

    def down_backward(
        dout_TH: Tensor,
        gather_index: Tensor | None,
        w2_EHI: Tensor,
        h_PN: Tensor,
        b1_EN: Tensor | None,
        row_scores_P: Tensor,
        expert_offsets: Tensor,
        row_expert_P: Tensor,
        activation: Activation,
        layout: GateUpLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dH (P, N1), s · A (P, I), dS (P) without the part of b2), from dA = dO · W2 before the score."""
        da_PI = grouped_mm(dout_TH, w2_EHI, expert_offsets, gather_index=gather_index)
        return activation_backward(h_PN, b1_EN, da_PI, row_scores_P, row_expert_P, activation, layout)

    return down_backward
