"""Expert activations and the ways checkpoints store a gated pair.

A gated expert computes ``act(gate) * up`` from a pre-activation of ``N1 = 2 I`` columns; an ungated one computes
``act(z)`` from ``N1 = I`` columns. Real models add three constants to SwiGLU, all carried by :class:`Activation`:

    g = min(gate, limit)                      u = clamp(up, -limit, limit) + up_offset
    swiglu:  g * sigmoid(alpha * g) * u       (gpt-oss: alpha 1.702, limit 7, up_offset 1; DeepSeek-V4, GLM-5: limit
        only)

Sources: SwiGLU, GeGLU, ReGLU — Shazeer 2020 (arXiv 2002.05202); squared ReLU — So et al. 2021 (arXiv 2109.08668); GELU
and its tanh form — Hendrycks and Gimpel 2016 (arXiv 1606.08415).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from supersonic_moe import checks


class ActivationType(StrEnum):
    """The seven activations of SonicMoE, of which the first three are gated, and GELU's tanh form with a gate (Gemma 4)
    and without.
    """

    SWIGLU = "swiglu"
    GEGLU = "geglu"
    REGLU = "reglu"
    RELU_SQ = "relu_sq"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    GEGLU_TANH = "geglu_tanh"
    GELU_TANH = "gelu_tanh"


class GateUpLayout(StrEnum):
    """Order of the 2I rows of w1 (and of the columns of the pre-activation). Ignored by ungated activations."""

    INTERLEAVED = "interleaved"  # g0, u0, g1, u1, ...   (SonicMoE, gpt-oss)
    GATE_UP = "gate_up"  # g0, g1, ..., u0, u1, ...      (Hugging Face's gate_up_proj)
    UP_GATE = "up_gate"  # u0, u1, ..., g0, g1, ...


_GATED = (ActivationType.SWIGLU, ActivationType.GEGLU, ActivationType.REGLU, ActivationType.GEGLU_TANH)
"""No set: a compiled layer would not notice another type. torch 2.13 guards what is compared, not what is hashed."""


@dataclass(frozen=True)
class Activation:
    """An activation with its constants. ``type`` may be given by name. ``limit=None`` means no clamp.

    "gelu" and "geglu" are the exact erf form; "gelu_tanh" and "geglu_tanh" approximate it by 0.5 x (1 + tanh(sqrt(2 /
    pi) (x + 0.044715 x^3))), which Hugging Face calls gelu_pytorch_tanh.
    """

    type: ActivationType
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _type(self.type))
        checks.number("alpha", self.alpha)
        checks.number("up_offset", self.up_offset)
        check_limit("limit", self.limit)
        plain = self.alpha == 1.0 and self.limit is None and self.up_offset == 0.0
        if self.type is not ActivationType.SWIGLU and not plain:
            raise ValueError(
                f"alpha, limit and up_offset belong to swiglu; got them with {self.type.value}. "
                "Use ActivationType.SWIGLU or leave them at their defaults."
            )

    @property
    def gated(self) -> bool:
        return self.type in _GATED

    @property
    def fan(self) -> int:
        """Pre-activation columns for each activation column: 2 if gated, else 1."""
        return 2 if self.gated else 1

    @classmethod
    def gpt_oss(cls, alpha: float = 1.702, limit: float = 7.0) -> Activation:
        """(clamp(up, ±limit) + 1) * g * sigmoid(alpha * g) with g = min(gate, limit), as in gpt-oss."""
        return cls(ActivationType.SWIGLU, alpha=alpha, limit=limit, up_offset=1.0)

    @classmethod
    def swiglu_clamped(cls, limit: float) -> Activation:
        """silu(min(gate, limit)) * clamp(up, ±limit), as in DeepSeek-V4 and GLM-5."""
        return cls(ActivationType.SWIGLU, limit=limit)


def check_limit(name: str, limit: float | None) -> None:
    """Raises TypeError or ValueError unless it is None or a positive finite number."""
    if limit is None:
        return
    checks.number(name, limit)
    if limit <= 0:
        raise ValueError(f"{name} must be a positive finite number or None (no clamp); got {limit}.")


def as_activation(value: Activation | ActivationType | str) -> Activation:
    return value if isinstance(value, Activation) else _PLAIN[_type(value)]


def as_layout(value: GateUpLayout | str) -> GateUpLayout:
    return value if isinstance(value, GateUpLayout) else checks.member("gate/up layout", value, GateUpLayout)


def _type(value: ActivationType | str) -> ActivationType:
    if isinstance(value, ActivationType):  # not by name: torch.compile of torch 2.11 cannot trace that of a member
        return value
    if isinstance(value, str) and value in _NAMES:
        return _NAMES[value]
    raise ValueError(
        f"unknown activation {checks.short(value)}; choose one of {', '.join(_NAMES)}, or pass an Activation."
    )


_NAMES = {kind.value: kind for kind in ActivationType}
_PLAIN = {kind: Activation(kind) for kind in ActivationType}
