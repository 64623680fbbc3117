"""What the ops of the expert MLPs take and give, one NamedTuple for each list (``training/fields.py``).

    forward     Bf16Forward              Fp8Forward             what goes in
                Bf16Output               Fp8Output              what comes out
    backward    Bf16Saved                Fp8Weights, Fp8Saved   what forward kept
                Incoming                 Incoming               what autograd asks for

Shapes: T tokens, S slots, P rows sorted by expert, H hidden, I intermediate, N1 = 2I (gated) or I.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout
from supersonic_moe.config.plan import RoutingPlan
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.interface import Gate, Quantized, TokenRows
from supersonic_moe.quantization.block_format import aligned_rows
from supersonic_moe.quantization.weight_cache import Fp8Weight

T = TypeVar("T")


class Inputs(NamedTuple, Generic[T]):
    """One thing for each input that may get a gradient: the tensors, their gradients, or whether one is wanted."""

    x: T
    scores: T
    w1: T
    b1: T
    w2: T
    b2: T


class Weight(NamedTuple):
    """A weight of the experts on its way to the kernels."""

    parameter: Tensor
    """As the caller passed it: its ``main_grad`` gets the gradient, and the cache knows it by its identity."""
    value: Tensor
    """What is multiplied: the parameter, or the copy that autocast made."""
    quantized: Fp8Weight | None = None
    """The FP8 copy of ``value``, in an FP8 layer."""

    @property
    def fp8(self) -> Fp8Weight:
        assert self.quantized is not None
        return self.quantized


# ---- groups of fields ------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A routing plan as an op sees it: fields of :class:`RoutingPlan`."""

    expert_offsets: Tensor
    gather_index: Tensor
    scatter_index: Tensor
    row_expert: Tensor
    reverse_index: Tensor
    token_rows: Tensor
    token_offsets: Tensor | None
    identity: bool

    @classmethod
    def of(cls, plan: RoutingPlan) -> Plan:
        return cls(
            plan.expert_offsets,
            plan.gather_index,
            plan.scatter_index,
            plan.row_expert,
            plan.reverse_index,
            plan.token_rows,
            plan.token_offsets,
            plan.identity,
        )

    @property
    def read_index(self) -> Tensor | None:
        """Tokens that the rows read; None where rows are tokens and nothing needs gathering."""
        return None if self.identity else self.gather_index

    def rows_of_tokens(self, num_tokens: int) -> TokenRows:
        uniform = self.token_offsets is None and num_tokens
        each = self.token_rows.shape[0] // num_tokens if uniform else 0
        return TokenRows(self.token_rows, self.token_offsets, each, num_tokens)


class Static(NamedTuple):
    """What does not change from call to call."""

    activation: str
    alpha: float
    limit: float
    """inf: no clamp."""
    up_offset: float
    layout: str
    backend: str

    @classmethod
    def of(cls, activation: Activation, layout: GateUpLayout, backend: str) -> Static:
        alpha, limit, up_offset = activation.alpha, activation.limit, activation.up_offset
        if limit is None:
            limit = math.inf
        if torch.compiler.is_compiling():
            alpha, limit, up_offset = _literal(alpha), _literal(limit), _literal(up_offset)
        return cls(activation.type._value_, alpha, limit, up_offset, layout._value_, backend)

    def gate(self) -> Gate:
        return _gate(self.activation, self.alpha, self.limit, self.up_offset, self.layout)


def _literal(x: float) -> float:
    """``x`` as a number of this function, for values that models have. With ``dynamic=True`` the compiler makes a float
    that it finds in an object an input of the graph, and an input of a graph cannot reach the autograd functions of two
    layers.
    """
    if x == 1.702:
        return 1.702
    for whole in range(33):
        if x == whole:
            return float(whole)
    return x


@functools.cache
def _gate(activation: str, alpha: float, limit: float, up_offset: float, layout: str) -> Gate:
    clamp = None if math.isinf(limit) else limit
    return Gate(Activation(ActivationType(activation), alpha, clamp, up_offset), GateUpLayout(layout))


class Numerics(NamedTuple):
    """An :class:`Fp8Recipe`, as far as it concerns an op."""

    scale: str
    save_preactivation: str
    wgrad: str

    @classmethod
    def of(cls, recipe: Fp8Recipe) -> Numerics:
        return cls(recipe.scale, recipe.save_preactivation, recipe.wgrad)

    def recipe(self) -> Fp8Recipe:
        return _recipe(self)


@functools.cache
def _recipe(numerics: Any) -> Fp8Recipe:
    """Checked once, not in every call."""
    return Fp8Recipe(**numerics._asdict())


class MainGrads(NamedTuple):
    """Buffers that get dW1 and dW2 (``training/main_grad.py``); None: the gradient is returned."""

    w1: Annotated[Tensor | None, "a!"] = None
    w2: Annotated[Tensor | None, "b!"] = None
    overwrite_w1: bool = False
    """What is in the buffer is replaced; else dW is added to it."""
    overwrite_w2: bool = False

    @property
    def adds_w1(self) -> bool:
        return self.w1 is not None and not self.overwrite_w1

    @property
    def adds_w2(self) -> bool:
        return self.w2 is not None and not self.overwrite_w2


class Incoming(NamedTuple):
    """What autograd asks of backward."""

    dout: Tensor
    """(T, H)"""
    needs: Inputs[bool]
    main: MainGrads


# ---- BF16 ------------------------------------------------------------------------------------------------------------


class Bf16Forward(NamedTuple):
    x: Tensor
    """(T, H)"""
    scores: Tensor
    """(S,)"""
    w1: Tensor
    """(E, N1, H)"""
    b1: Tensor | None
    """(E, N1)"""
    w2: Tensor
    """(E, H, I)"""
    b2: Tensor | None
    """(E, H)"""
    plan: Plan
    static: Static
    save: bool
    """Whether backward will run."""


class Bf16Output(NamedTuple):
    out: Tensor
    """(T, H)"""
    row_scores: Tensor
    """(P,)"""
    z: Tensor
    """(P, N1) pre-activation without the bias; (0, N1) if not ``save``."""


class Bf16Saved(NamedTuple):
    z: Tensor
    x: Tensor
    row_scores: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    plan: Plan
    static: Static


# ---- FP8 -------------------------------------------------------------------------------------------------------------


class Fp8Forward(NamedTuple):
    """As :class:`Bf16Forward`, with the FP8 copies of the weights."""

    x: Tensor
    scores: Tensor
    w1: Quantized
    b1: Tensor | None
    w2: Quantized
    b2: Tensor | None
    plan: Plan
    static: Static
    numerics: Numerics
    save: bool


class Fp8Output(NamedTuple):
    out: Tensor
    row_scores: Tensor
    z: Quantized
    """(P, N1) as the recipe says: e4m3, int8 in the *saved* format (``quantization/block_format.py``), or bf16 with no
    scales, (0, N1/128); (0, N1) if nothing is saved or backward computes it again.
    """


class Fp8Saved(NamedTuple):
    z: Quantized
    x: Tensor
    row_scores: Tensor
    b1: Tensor | None
    b2: Tensor | None
    plan: Plan
    static: Static
    numerics: Numerics
    w1_turned: bool
    """Whether the weight is a transposed view: its gradient has that order too."""
    w2_turned: bool

    @property
    def pow2(self) -> bool:
        """Whether scales are powers of two."""
        return self.numerics.scale == "pow2"


class Fp8Weights(NamedTuple):
    """What backward reads of the FP8 copies: kept from forward, or made again."""

    w1_transposed: Tensor
    """(E, H, N1)"""
    w1_scale: Tensor
    """(E, N1/128, H/128): of the weight as forward multiplies it."""
    w2_transposed: Tensor
    """(E, I, H)"""
    w2_scale: Tensor
    """(E, H/128, I/128)"""
    w1_q: Tensor | None
    """(E, N1, H), to compute Z again; None where Z is kept."""

    @classmethod
    def of(cls, w1: Fp8Weight, w2: Fp8Weight, numerics: Numerics) -> Fp8Weights:
        assert w1.transposed is not None and w2.transposed is not None
        w1_q = w1.q if numerics.save_preactivation == "recompute" else None
        return cls(w1.transposed, w1.scale, w2.transposed, w2.scale, w1_q)

    @property
    def w1_t(self) -> Quantized:
        return Quantized(aligned_rows(self.w1_transposed), self.w1_scale.mT)

    @property
    def w2_t(self) -> Quantized:
        return Quantized(aligned_rows(self.w2_transposed), self.w2_scale.mT)
