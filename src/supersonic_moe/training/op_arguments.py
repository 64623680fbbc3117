"""What the ops of the expert MLPs take besides their operands, as schema text and as tuples, for BF16 and FP8 alike."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.kernels.interface import Gate, Groups, TokenRows

PLAN_SCHEMA = (
    "Tensor expert_offsets, Tensor gather_index, Tensor scatter_index, Tensor row_expert, Tensor reverse_index, "
    "Tensor token_rows, Tensor? token_offsets, bool identity"
)
STATIC_SCHEMA = "str activation, float alpha, float limit, float up_offset, str layout, str backend"


class PlanArgs(NamedTuple):
    """A routing plan as an op sees it."""

    expert_offsets: Tensor
    gather_index: Tensor
    scatter_index: Tensor
    row_expert: Tensor
    reverse_index: Tensor
    token_rows: Tensor
    token_offsets: Tensor | None
    identity: bool

    @property
    def read_index(self) -> Tensor | None:
        """Tokens that the rows read; None where rows are tokens and nothing needs gathering."""
        return None if self.identity else self.gather_index

    @property
    def groups(self) -> Groups:
        return Groups(self.expert_offsets, self.row_expert)

    def rows_of_tokens(self, num_tokens: int) -> TokenRows:
        uniform = self.token_offsets is None and num_tokens
        each = self.token_rows.shape[0] // num_tokens if uniform else 0
        return TokenRows(self.token_rows, self.token_offsets, each, num_tokens)


class StaticArgs(NamedTuple):
    """What does not change from call to call."""

    activation: str
    alpha: float
    limit: float
    up_offset: float
    layout: str
    backend: str

    def gate(self) -> Gate:
        return _gate(self.activation, self.alpha, self.limit, self.up_offset, self.layout)


@functools.cache
def _gate(activation: str, alpha: float, limit: float, up_offset: float, layout: str) -> Gate:
    clamp = None if math.isinf(limit) else limit
    return Gate(Activation(ActivationType(activation), alpha, clamp, up_offset), GateUpLayout(layout))


def plan_args(plan: RoutingPlan) -> tuple[object, ...]:
    """The fields of :class:`PlanArgs`."""
    return (
        plan.expert_offsets,
        plan.gather_index,
        plan.scatter_index,
        plan.row_expert,
        plan.reverse_index,
        plan.token_rows,
        plan.token_offsets,
        plan.identity,
    )


def static_args(activation: Activation, layout: GateUpLayout, backend: str) -> tuple[object, ...]:
    """The fields of :class:`StaticArgs`."""
    limit = math.inf if activation.limit is None else activation.limit
    return activation.type.value, activation.alpha, limit, activation.up_offset, layout.value, backend


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Kernels get the dtypes that they are called with. Entering ``torch.autocast`` takes as long as a launch, so only
    where it is on.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def gradients_or_empty(x: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """An op cannot return None: an empty tensor stands for a gradient that nobody asked for."""
    return tuple(x.new_empty(0) if g is None else g for g in gradients)
