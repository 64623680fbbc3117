"""Steps that some backends fuse into one kernel, composed from its parts for those that do not."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from supersonic_moe.activation import Activation, GateUpLayout

UpProjection = Callable[
    [Tensor, Tensor, Tensor | None, Tensor, Tensor, Activation, GateUpLayout, bool], tuple[Tensor, Tensor]
]


def compose_up_projection(
    grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor],
    activation_forward: Callable[[Tensor, Tensor | None, Tensor, Activation, GateUpLayout], Tensor],
) -> UpProjection:
    """``up_projection`` as a grouped GEMM and an activation pass."""

    def up_projection(
        x_PH: Tensor,
        w1_ENH: Tensor,
        b1_EN: Tensor | None,
        expert_offsets: Tensor,
        row_expert_P: Tensor,
        activation: Activation,
        layout: GateUpLayout,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """(H (P, N1) without the bias, or (0, N1) if not ``save``; A = act(H + b1) (P, I))."""
        h_PN = grouped_mm(x_PH, w1_ENH.transpose(1, 2), expert_offsets)
        a_PI = activation_forward(h_PN, b1_EN, row_expert_P, activation, layout)
        return h_PN if save else x_PH.new_empty(0, w1_ENH.shape[1]), a_PI

    return up_projection
