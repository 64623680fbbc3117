"""A small MoE module in FP8, one training step of it, and input for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import supersonic_moe as sm
from supersonic_moe import Fp8Recipe

T, H, I, E, K = 24, 136, 72, 4, 2  # noqa: E741


def moe(recipe: sm.Bf16Recipe | Fp8Recipe | None = None, **kwargs: Any) -> sm.MoE:
    return sm.MoE(E, K, H, I, "swiglu", True, 0.1, recipe=recipe or Fp8Recipe(), **kwargs).bfloat16()


def step(model: nn.Module, x: Tensor) -> Tensor:
    out, _ = model(x)
    out.float().square().sum().backward()
    return out.detach()  # type: ignore[no-any-return]


def tokens(count: int = T) -> Tensor:
    return torch.randn(count, H, dtype=torch.bfloat16)


def experts_of(layer: sm.MoE) -> tuple[Tensor, Tensor]:
    return layer.c_fc.weight, layer.c_proj.weight
