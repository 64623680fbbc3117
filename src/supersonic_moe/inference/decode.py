"""The experts in BF16 or fp16 where a forward brings few rows: decode.

The layer's own way sorts rows, makes tiles of 128 of them and launches eight kernels for that; with a token or eight,
launches and the host are all that it does. This way is three launches of ``kernels/triton/decode.py``, which read the
weights of the experts that are hit. ``suits`` is the only place that decides. Both compute the same sums with fp32
accumulators, A rounded to the dtype of x; Y stays in fp32 here until it is combined, in the layer it is rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.ops import caller
from supersonic_moe.private_api import constant_when_compiled, exporting
from supersonic_moe.training.arguments import Static
from supersonic_moe.training.fields import Fields, on_flat

MOST_SLOTS = 512  # (token, choice) pairs; each program looks at all of them
MOST_ROWS = 8  # an expert, on average: gpt-oss with 8 takes 0.91 of the layer's time, DeepSeek-V3 with 16 takes 1.38
_DTYPES = (torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """Shapes: T tokens, K choices, E experts, H hidden, I intermediate, N1 = 2I (gated) or I."""

    x: Tensor
    """(T, H), as all of them but ids and scores in BF16 or fp16."""
    ids: Tensor
    """(T, K); outside [0, E): skipped."""
    scores: Tensor
    """(T, K), any float dtype."""
    w1: Tensor
    """(E, N1, H)"""
    b1: Tensor | None
    """(E, N1)"""
    w2: Tensor
    """(E, H, I)"""
    b2: Tensor | None
    """(E, H)"""


def suits(operands: Operands, gate: Gate) -> bool:
    """Whether this forward is one for :func:`run`: tensors of one dtype on a GPU, few rows. Sizes and dtypes alone
    decide, so equal batches take equal ways, compiled or not. An exported program keeps the layer's way, which takes
    any number of tokens.
    """
    x, ids, scores, w1, b1, w2, b2 = operands
    num_experts, hidden, intermediate = w2.shape
    dtype = x.dtype
    if not _on_gpu(x.device, dtype, hidden, intermediate) or (torch.compiler.is_compiling() and exporting()):
        return False  # before sizes are compared, which bounds them in what is compiled
    slots = ids.numel()
    turned = w1.stride(2) != 1  # stored (E, H, N1)
    return (
        0 < slots <= MOST_SLOTS
        and slots <= MOST_ROWS * num_experts
        and dtype in _DTYPES
        and w1.dtype is dtype
        and w2.dtype is dtype
        and (b1 is None or b1.dtype is dtype)
        and (b2 is None or b2.dtype is dtype)
        and not (turned and gate.activation.gated and gate.layout is not GateUpLayout.INTERLEAVED)
        and x.is_contiguous()
        and ids.is_contiguous()
        and scores.is_contiguous()
    )


@constant_when_compiled
def _on_gpu(device: torch.device, dtype: torch.dtype, hidden: int, intermediate: int) -> bool:
    if device.type != "cuda":
        return False
    return registry.choose(device, dtype, hidden=hidden, intermediate=intermediate).name != "reference"


def run(operands: Operands, gate: Gate) -> Tensor:
    """(T, H) in the dtype of x, without gradient, of a forward that :func:`suits`."""
    out: Tensor = _decode(*_CALL.flat(operands, Static.of(gate.activation, gate.layout, "auto")))
    return out


# ---- the op ----------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    operands: Operands
    static: Static


def _run(call: _Call) -> Tensor:
    from supersonic_moe.kernels.triton.decode import decode  # Triton may not be there

    return decode(*call.operands, call.static.gate())


def _fake(call: _Call) -> Tensor:
    x = call.operands.x
    return x.new_empty(x.shape)


def _flops(call: _Call) -> int:
    """Products and sums of both projections."""
    _, ids, _, w1, _, w2, _ = call.operands
    return 2 * ids.numel() * w1.shape[2] * (w1.shape[1] + w2.shape[2])


_CALL = Fields(_Call)
_kernel = on_flat(_run, _CALL)
torch.library.define("supersonic_moe::decode", f"({_CALL.schema}) -> Tensor")
torch.library.impl("supersonic_moe::decode", ("cpu", "cuda"))(_kernel)
torch.library.register_fake("supersonic_moe::decode")(on_flat(_fake, _CALL))
_counted = on_flat(_flops, _CALL)
register_flop_formula(torch.ops.supersonic_moe.decode, get_raw=True)(lambda *args, out_val: _counted(*args))
_decode = caller(torch.ops.supersonic_moe.decode.default, _kernel)
