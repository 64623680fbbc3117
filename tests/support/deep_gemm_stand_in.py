"""DeepGEMM's MegaMoE for Hopper in plain torch, by the names that a benchmark calls."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.kernels.reference.quantize import dequantize


def product(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """bf16 of a (R, K) times w (N, K) transposed, both dequantized."""
    x = dequantize(a.contiguous(), a_scale.contiguous(), torch.float32)
    return (x @ dequantize(w.contiguous(), w_scale.contiguous(), torch.float32).T).bfloat16()


class Buffer:
    """A symmetric buffer of one rank."""

    def __init__(self, group: object, experts: int, tokens: int, top_k: int, hidden: int, inter: int) -> None:
        self.experts = experts
        self.x = torch.zeros(tokens + 3, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn)
        self.x_sf = torch.zeros(tokens + 3, hidden // 128)
        self.topk_idx = torch.zeros(tokens + 3, top_k, dtype=torch.int64)
        self.topk_weights = torch.zeros(tokens + 3, top_k)


def fused(out: Tensor, up: Any, down: Any, buffer: Buffer) -> None:
    out.zero_()
    total = out.float()
    for t, (ids, weights) in enumerate(zip(buffer.topk_idx[: len(out)], buffer.topk_weights, strict=False)):
        for e, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if e >= 0:
                z = product(buffer.x[t : t + 1], buffer.x_sf[t : t + 1], up[0][e], up[1][e]).float()
                gate, value = z.chunk(2, 1)
                w2 = dequantize(down[0][e], down[1][e], torch.float32)
                total[t] += weight * (torch.nn.functional.silu(gate) * value @ w2.T)[0]
    out.copy_(total)


def module() -> ModuleType:
    """A ``deep_gemm`` to be imported. Its weights are not interleaved."""
    deep_gemm = ModuleType("deep_gemm")
    vars(deep_gemm).update(
        fp8_mega_moe=fused,
        get_symm_buffer_for_sm90_mega_moe=Buffer,
        transform_weights_for_mega_moe_sm90=lambda up, down: (up, down),
    )
    return deep_gemm
