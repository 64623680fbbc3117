"""DeepGEMM's calling convention of MegaMoE on Hopper, for code that has it: change the import, keep the calls.

    buffer = get_symm_buffer_for_mega_moe(group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate)
    l1, l2 = transform_weights_for_mega_moe_sm90((w13, w13_scale), (w2, w2_scale))     gate rows first, then up

    buffer.x[:n].copy_(codes); buffer.x_sf[:n].copy_(scales)                          every call
    buffer.topk_idx[:n].copy_(ids); buffer.topk_weights[:n].copy_(weights)
    fp8_mega_moe(y, l1, l2, buffer)                                                    y (n, H) bfloat16

Names and parameters are those of pull request 360 of deepseek-ai/DeepGEMM and of ``sgl-deep-gemm`` 0.1.5.post1, which
calls the first function ``get_symm_buffer_for_sm90_mega_moe`` too. The buffer is one of :class:`MegaMoE` and four input
tensors; intermediate buffers of the other kernel (``l1_acts`` and so on) do not exist. FP4 weights are refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.inference.operands import check_experts
from supersonic_moe.parallel.mega import MegaMoE
from supersonic_moe.quantization.block_format import E4M3, blocks

RECIPE = (128, 128, 128)
"""Blocks of the scales: of x along H, of weights along rows and columns."""


class SymmBuffer:
    """Where a caller puts the tokens of a call. ``max_tokens`` rows each, of which a call reads the first."""

    def __init__(
        self, group: dist.ProcessGroup | None, num_experts: int, max_tokens: int, top_k: int, hidden: int, inter: int
    ) -> None:
        self.mega = MegaMoE(group, num_experts, hidden, inter, top_k, max_tokens)
        self.group, self.num_experts, self.num_max_tokens_per_rank = group, num_experts, max_tokens
        self.num_topk, self.hidden, self.intermediate_hidden = top_k, hidden, inter
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self.x = torch.zeros(max_tokens, hidden, dtype=torch.uint8, device=device).view(E4M3)
        self.x_sf = torch.zeros(max_tokens, blocks(hidden), device=device)
        self.topk_idx = torch.full((max_tokens, top_k), -1, dtype=torch.int64, device=device)
        self.topk_weights = torch.zeros(max_tokens, top_k, device=device)

    def destroy(self) -> None:
        """Gives the memory back, and leaves the group. May be called twice."""
        if hasattr(self, "mega"):
            self.mega.close()
            del self.mega, self.x, self.x_sf, self.topk_idx, self.topk_weights


def get_symm_buffer_for_mega_moe(
    group: dist.ProcessGroup | None,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    use_fp8_dispatch: bool = True,
    activation: str = "swiglu",
) -> SymmBuffer:
    """A buffer for calls of up to ``num_max_tokens_per_rank`` tokens; on all ranks, with the same arguments.

    Raises:
        ValueError: ``use_fp8_dispatch=False`` or another activation, which do not exist.
    """
    if use_fp8_dispatch is not True:
        raise ValueError(f"use_fp8_dispatch must be True: rows travel in e4m3; got {use_fp8_dispatch!r}.")
    _check_activation(activation)
    sizes = num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden
    return SymmBuffer(group, *sizes)


get_symm_buffer_for_sm90_mega_moe = get_symm_buffer_for_mega_moe


class Weights(NamedTuple):
    """Experts of one projection as ``fp8_mega_moe`` reads them: gate rows, then up rows. DeepGEMM's own are interleaved
    in groups of eight and have the same shape, hence this type.
    """

    codes: Tensor
    scale: Tensor


def transform_weights_for_mega_moe_sm90(
    l1_weights: tuple[Tensor, Tensor], l2_weights: tuple[Tensor, Tensor]
) -> tuple[Weights, Weights]:
    """The same tensors, checked: our kernels read weights as a checkpoint stores them, and nothing is copied.

    Args:
        l1_weights: (E/R, 2 I, H) float8_e4m3fn with gate rows first, and (E/R, 2 ceil(I / 128), H / 128) float32.
        l2_weights: (E/R, H, I) float8_e4m3fn, and (E/R, H / 128, ceil(I / 128)) float32.

    Raises:
        TypeError, ValueError: other dtypes or shapes, FP4 weights and packed scales among them.
    """
    for name, given in (("l1_weights", l1_weights), ("l2_weights", l2_weights)):
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise TypeError(f"{name} must be a pair (codes, scale); got {checks.short(given)}.")
    (w13, w13_scale), (w2, w2_scale) = l1_weights, l2_weights
    check_experts(w13, w2, w13_scale, w2_scale, GateUpLayout.GATE_UP)
    return Weights(w13, w13_scale), Weights(w2, w2_scale)


transform_weights_for_mega_moe = transform_weights_for_mega_moe_sm90


def fp8_mega_moe(
    y: Tensor,
    l1_weights: Weights,
    l2_weights: Weights,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | None = None,
    recipe: tuple[int, int, int] = RECIPE,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
) -> None:
    """``y`` (n, H) bfloat16 = the weighted sum of the experts of the first n tokens of ``sym_buffer``. On all ranks.

    Args:
        l1_weights, l2_weights: what ``transform_weights_for_mega_moe_sm90`` of this module returned.
        cumulative_local_expert_recv_stats: (E/R,) int32, to which the rows of each expert of this rank are added.
        recipe: (128, 128, 128), the only one.
        activation_clamp: ``silu(min(gate, c)) * clamp(up, -c, c)``; None or infinity: no clamp.
        fast_math: without effect: there is one form of the exponential.

    Raises:
        TypeError, ValueError: as above, or as :class:`MegaMoE` does.
    """
    if not isinstance(sym_buffer, SymmBuffer):
        raise TypeError(
            "sym_buffer must come from get_symm_buffer_for_mega_moe of this module; got "
            f"{type(sym_buffer).__module__}.{type(sym_buffer).__name__}."
        )
    if not hasattr(sym_buffer, "mega"):
        raise ValueError("sym_buffer must not be destroyed before a call. Get another one.")
    with sym_buffer.mega.call():
        _check_call(y, l1_weights, l2_weights, sym_buffer.num_max_tokens_per_rank, recipe, activation)
        limit = None if activation_clamp is None or activation_clamp == math.inf else activation_clamp
        n = y.shape[0]
        sym_buffer.mega(
            sym_buffer.x[:n], l1_weights.codes, l2_weights.codes, l1_weights.scale, l2_weights.scale,
            sym_buffer.topk_weights[:n], sym_buffer.topk_idx[:n], gate_up_order=GateUpLayout.GATE_UP,
            x_scale=sym_buffer.x_sf[:n], swiglu_limit=limit, received_rows=cumulative_local_expert_recv_stats, out=y,
        )  # fmt: skip


def _check_call(
    y: Tensor, l1_weights: Weights, l2_weights: Weights, rows: int, recipe: object, activation: str
) -> None:
    for name, given in (("l1_weights", l1_weights), ("l2_weights", l2_weights)):
        if not isinstance(given, Weights):
            raise TypeError(
                f"{name} must come from transform_weights_for_mega_moe_sm90 of this module: DeepGEMM's own look the "
                f"same and have their rows in another order; got {type(given).__name__}."
            )
    if not isinstance(recipe, tuple | list) or tuple(recipe) != RECIPE:
        raise ValueError(f"recipe must be {RECIPE}: scales for 128 columns and for 128 x 128 weights; got {recipe}.")
    _check_activation(activation)
    checks.tensor("y", y, 2, "(n, H)")
    if y.dtype is not torch.bfloat16 or not y.is_contiguous():
        raise ValueError(f"y must be a contiguous bfloat16 tensor; got {checks.describe(y)}, strides {y.stride()}.")
    if y.shape[0] > rows:
        raise ValueError(
            f"y must not have more rows than the buffer, {rows}; got {y.shape[0]}. Make a buffer with a larger "
            "num_max_tokens_per_rank."
        )


def _check_activation(activation: str) -> None:
    if activation != "swiglu":
        raise ValueError(f"activation must be 'swiglu'; got {activation!r}.")
