"""Hopper's e4m3 tensor core with promotion every 128 of K, emulated on a CPU: what an exact kernel may be off by.

A wgmma step takes 32 products. Each is exact; all of them and the accumulator are cut (towards zero) to 13 bits below
the largest exponent among them, exponents of a product being those of its factors added; the sum is cut to a mantissa
of 13 bits. Four steps are one block of 128, which is then scaled and added to fp32. The 13 bits are what others found
by probing the hardware (SageAttention2, arXiv 2411.10958: "FP22"); with them, sums of one sign come out 6e-4 low over a
block, which is what our kernels showed on an H200 (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION = 13
STEP, BLOCK = 32, 128
_LOWEST = -(2**20)  # exponent of zero


def product(
    a_RK: Tensor, a_scale_RB: Tensor, b_NK: Tensor, b_scale_NB: Tensor, fraction: int = FRACTION, rows: int = 4
) -> Tensor:
    """(R, N) fp32: a b^T of e4m3 codes whose scales are given for each row and block of 128 of K."""
    out = torch.zeros(a_RK.shape[0], b_NK.shape[0])
    b = b_NK.float()
    b_exponent = exponent(b)
    for first in range(0, a_RK.shape[0], rows):
        a = a_RK[first : first + rows].float()
        a_exponent, total = exponent(a), out[first : first + rows]
        for block in range(a.shape[1] // BLOCK):
            sums = torch.zeros_like(total)
            for step in range(block * BLOCK, (block + 1) * BLOCK, STEP):
                k = slice(step, step + STEP)
                terms = a[:, None, k] * b[None, :, k]
                top = (a_exponent[:, None, k] + b_exponent[None, :, k]).amax(2)
                top = torch.maximum(top, exponent(sums))
                grid = torch.exp2((top.clamp(min=-100) - fraction).float())
                cut = (terms / grid[..., None]).trunc().sum(2) + (sums / grid).trunc()
                sums = short(cut * grid, fraction)
            total += a_scale_RB[first : first + rows, block, None] * b_scale_NB[None, :, block] * sums
    return out


def exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), int32; far below all others for zero."""
    mantissa, power = torch.frexp(x)
    return torch.where(mantissa == 0, _LOWEST, power - 1).int()


def short(x: Tensor, fraction: int) -> Tensor:
    """x with its mantissa cut to ``fraction`` bits."""
    bits = x.view(torch.int32)
    return (bits & -(1 << (23 - fraction))).view(torch.float32)
