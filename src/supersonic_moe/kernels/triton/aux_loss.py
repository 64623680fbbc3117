"""The load-balancing loss and its gradient; maths: ``kernels/reference/aux_loss.py``.

Both kernels give a program a tile of whole rows of logits, make the probabilities in registers, and take the experts'
shares from the E counts, which every program adds up for itself. Forward: one partial sum a program, then torch adds
the partial sums in a fixed order. Backward: the probabilities again, so nothing but the logits is kept, which live
anyway as the router's output.

Bytes: forward T·E read, backward T·E read and T·E written. Roofline on H200 at 4.26 TB/s, T 32768, E 128, bf16: 2 us
and 4 us, less than launching them. What they save is host time: in plain torch the loss and its gradient are some 25
launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supersonic_moe.config.router import SUM_EPS
from supersonic_moe.kernels.triton.launch import launch
from supersonic_moe.kernels.triton.tiling import cdiv, warps, whole_rows

TILE = 2048  # logits of one program, 16 for each of 128 threads
MAX_TOKENS = 64  # of one program

_EPS = tl.constexpr(SUM_EPS)


@triton.jit
def _logits(logits_ptr, token, num_tokens, logits_stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """A tile of rows, -inf past the last column; rows past the last token are zeros."""
    column = tl.arange(0, BLOCK_E)[None, :]
    x = tl.load(logits_ptr + token * logits_stride + column, mask=(token < num_tokens) & (column < E), other=0.0).to(
        tl.float32
    )
    return tl.where(column < E, x, -float("inf"))


@triton.jit
def _probabilities(x, SIGMOID: tl.constexpr):
    if SIGMOID:
        unnormalized = tl.sigmoid(x)
        return unnormalized / (tl.sum(unnormalized, 1, keep_dims=True) + _EPS)
    else:
        unnormalized = tl.exp(x - tl.max(x, 1, keep_dims=True))
        return unnormalized / tl.sum(unnormalized, 1, keep_dims=True)


@triton.jit
def _shares(counts_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Counts over their sum; zeros where nothing was counted."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0).to(tl.float32)
    total = tl.sum(count, 1, keep_dims=True)
    return count / tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    logits_ptr, counts_ptr, partial_ptr, num_tokens, logits_stride,
    E: tl.constexpr, SIGMOID: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    p = _probabilities(_logits(logits_ptr, token, num_tokens, logits_stride, E, BLOCK_E), SIGMOID)
    f_dot_p = tl.sum(_shares(counts_ptr, E, BLOCK_E) * p, 1, keep_dims=True)
    total = tl.sum(tl.sum(tl.where(token < num_tokens, f_dot_p, 0.0), 1), 0)
    tl.store(partial_ptr + tl.program_id(0), total * (E / num_tokens))


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    dloss_ptr, logits_ptr, counts_ptr, dlogits_ptr, num_tokens, logits_stride,
    E: tl.constexpr, SIGMOID: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    x = _logits(logits_ptr, token, num_tokens, logits_stride, E, BLOCK_E)
    p = _probabilities(x, SIGMOID)
    f = _shares(counts_ptr, E, BLOCK_E)
    scale = tl.load(dloss_ptr) * (E / num_tokens)
    dlogits = scale * p * (f - tl.sum(f * p, 1, keep_dims=True))
    if SIGMOID:
        dlogits *= tl.sigmoid(-x)  # 1 - a, exact where a rounds to 1
    column = tl.arange(0, BLOCK_E)[None, :]
    tl.store(
        dlogits_ptr + token * E + column,
        dlogits.to(dlogits_ptr.dtype.element_ty),
        mask=(token < num_tokens) & (column < E),
    )


def switch_loss_forward(logits_TE: Tensor, counts_E: Tensor, sigmoid: bool = False) -> Tensor:
    """() fp32."""
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        return logits_TE.new_zeros((), dtype=torch.float32)
    tokens, block_e = whole_rows(num_experts, TILE, MAX_TOKENS)
    programs = cdiv(num_tokens, tokens)
    partial = logits_TE.new_empty(programs, dtype=torch.float32)
    launch(
        _forward_kernel,
        (programs,),
        (logits_TE, counts_E, partial, num_tokens, logits_TE.stride(0)),
        (num_experts, sigmoid, tokens, block_e),
        num_warps=warps(tokens * block_e),
    )
    return torch.sum(partial, 0, out=partial.new_empty(()))  # which a tape can hold (jit/tape.py)


def switch_loss_backward(dloss: Tensor, logits_TE: Tensor, counts_E: Tensor, sigmoid: bool = False) -> Tensor:
    """dlogits (T, E) in the dtype of the logits."""
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = logits_TE.new_empty(num_tokens, num_experts)
    if num_tokens == 0:
        return dlogits_TE
    tokens, block_e = whole_rows(num_experts, TILE, MAX_TOKENS)
    launch(
        _backward_kernel,
        (cdiv(num_tokens, tokens),),
        (dloss, logits_TE, counts_E, dlogits_TE, num_tokens, logits_TE.stride(0)),
        (num_experts, sigmoid, tokens, block_e),
        num_warps=warps(tokens * block_e),
    )
    return dlogits_TE
