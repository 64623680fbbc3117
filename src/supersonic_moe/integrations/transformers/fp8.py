"""Experts of fine-grained FP8 checkpoints (``FineGrainedFP8Config``): e4m3 weights with a scale for each block.

    forward only, SwiGLU, blocks of 128 x 128      the FP8 inference operator, from one token to any number of them
    anything else                                  weights are dequantized to the dtype of the hidden states, each call

The second way is for gradients of the hidden states (adapters on attention), gates with alpha (MiniMax-M3), ungated
experts, static or per-tensor scales, and sizes that the operator does not take. It is right, and slow; a warning says
why it runs. Weights of a checkpoint in FP8 get no gradient: to train all of a model, load it with
``FineGrainedFP8Config(dequantize=True)``.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from supersonic_moe.config.activation import ActivationType, GateUpLayout
from supersonic_moe.config.grouped_routing import MAX_TOP_K
from supersonic_moe.inference.operands import INTERMEDIATE_MULTIPLE, MAX_LOCAL_EXPERTS
from supersonic_moe.inference.topk import moe_fp8_topk
from supersonic_moe.integrations.transformers.gates import gate_of
from supersonic_moe.integrations.transformers.weights import Weights
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

log = logging.getLogger("supersonic_moe")


def is_quantized(experts: nn.Module) -> bool:
    """Whether a weight is in 8 bits or fewer: the quantizer leaves weights as they are whose sizes do not fit."""
    return any(w.element_size() == 1 for w, _ in _projections(experts))


def obstacle(experts: nn.Module) -> str | None:
    """Why the inference operator cannot run the module; None if it can."""
    module: Any = experts
    if not module.has_gate:
        return "its experts have no gate"
    (w1, s1), (w2, s2) = _projections(experts)
    if w1.dtype is not E4M3 or w2.dtype is not E4M3:
        return f"its weights are {_short(w1.dtype)} and {_short(w2.dtype)}, not both {_short(E4M3)}"
    if module.activation_scheme != "dynamic":
        return f"its activation scales are {module.activation_scheme}, not dynamic"
    num_experts, n1, hidden = w1.shape
    intermediate = n1 // 2
    if hidden % BLOCK or intermediate % INTERMEDIATE_MULTIPLE or num_experts > MAX_LOCAL_EXPERTS:
        return (
            f"the operator takes H in multiples of {BLOCK}, I of {INTERMEDIATE_MULTIPLE} and at most "
            f"{MAX_LOCAL_EXPERTS} experts; these are {hidden}, {intermediate} and {num_experts}"
        )
    wanted = (2 * blocks(intermediate), blocks(hidden)), (blocks(hidden), blocks(intermediate))
    if (tuple(s1.shape[1:]), tuple(s2.shape[1:])) != wanted or tuple(module.block_size or ()) != (BLOCK, BLOCK):
        return f"its scales are not those of blocks of {BLOCK} x {BLOCK} of gate, up and down"
    gate = gate_of(experts)
    if gate is None:
        return "its gate is not SwiGLU"
    act = gate.activation
    if (act.type, act.alpha, act.up_offset) != (ActivationType.SWIGLU, 1.0, 0.0):
        return "its gate is not SwiGLU"
    return None


def refusal(experts: nn.Module) -> str | None:
    """Why nothing here can run the module; None if something can."""
    for w, _ in _projections(experts):
        if w.element_size() == 1 and w.dtype is not E4M3:
            return (
                f"experts of an FP8 checkpoint must be {_short(E4M3)}; got {_short(w.dtype)} (FP4?). Use "
                "experts_implementation='eager', or load the model with dequantize=True."
            )
    return None


def obstacle_of_call(hidden_states: Tensor, ids: Tensor, scores: Tensor) -> str | None:
    """Why the operator cannot run this call; None if it can."""
    if torch.is_grad_enabled() and (hidden_states.requires_grad or scores.requires_grad):
        return "gradients are wanted, and the operator has none; run inference under torch.no_grad()"
    if hidden_states.dtype is not torch.bfloat16:
        return f"hidden states are {_short(hidden_states.dtype)}, not bfloat16"
    if ids.shape[1] > MAX_TOP_K:
        return f"the operator takes at most {MAX_TOP_K} experts a token; these are {ids.shape[1]}"
    return None


def run_operator(experts: nn.Module, hidden_states: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """(T, H) bf16"""
    gate = gate_of(experts)
    assert gate is not None
    (w1, s1), (w2, s2) = _projections(experts)
    return moe_fp8_topk(
        hidden_states.contiguous(),
        w1.detach(),
        w2.detach(),
        s1.detach().float(),
        s2.detach().float(),
        scores.float().contiguous(),
        ids.contiguous(),
        gate_up_order=GateUpLayout.GATE_UP,
        swiglu_limit=gate.activation.limit,
        pow2_scales=s1.dtype is not torch.float32,
    )


def dequantized(experts: nn.Module, dtype: torch.dtype) -> Weights:
    """Weights without gradient, in ``dtype``."""
    block_size, halves = getattr(experts, "block_size", None), 2 if experts.has_gate else 1
    w1, w2 = (
        _dequantize(w.detach(), scale.detach(), block_size, dtype, parts)
        for (w, scale), parts in zip(_projections(experts), (halves, 1), strict=True)
    )
    return Weights(w1, None, w2, None)


@functools.cache
def warn_of_slow_path(experts: str, why: str) -> None:
    log.warning("%s: FP8 weights are dequantized in each call, because %s.", experts, why)


def _projections(experts: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight, scale) of both."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return [(getattr(experts, name), getattr(experts, f"{name}_scale_inv")) for name in names]


def _dequantize(w_ENK: Tensor, scale: Tensor, block_size: Any, dtype: torch.dtype, parts: int) -> Tensor:
    """``parts``: gate and up come from two weights of a checkpoint, each with blocks of its own."""
    if w_ENK.element_size() > 1:
        return w_ENK.to(dtype)
    (_, n, k), (num_experts, rows, columns) = w_ENK.shape, scale.shape
    block_n, block_k = block_size or (-(-n // rows), -(-k // columns))
    if rows != parts * -(-n // (parts * block_n)):  # as few rows of scales as of one weight
        parts = 1
    by_part = scale.float().reshape(num_experts, parts, -1, columns)
    by_row = by_part.repeat_interleave(block_n, 2)[:, :, : n // parts].flatten(1, 2)
    return (w_ENK.float() * by_row.repeat_interleave(block_k, 2)[:, :, :k]).to(dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
