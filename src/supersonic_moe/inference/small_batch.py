"""The FP8 layer in inference mode through the operator for serving, where a batch brings few rows an expert.

Both ways compute the same numbers but for roundings: x and A quantized 1 x 128, W in 128 x 128, sums in fp32; here Y
stays in fp32 until it is combined, in the layer it is rounded to bf16 once more. The layer's own kernels compute tiles
of 128 rows in eight or more launches, these read the weights once in two or three. ``suits`` is the only place that
decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.config.activation import ActivationType
from supersonic_moe.config.grouped_routing import MAX_TOP_K
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.inference.operands import MAX_LOCAL_EXPERTS
from supersonic_moe.inference.topk import moe_fp8_topk
from supersonic_moe.inference.workspace import streams
from supersonic_moe.kernels import registry
from supersonic_moe.quantization.block_format import BLOCK
from supersonic_moe.training.arguments import Weight
from supersonic_moe.training.ops import with_fp8_copies
from supersonic_moe.training.options import Options


def suits(x_TH: Tensor, w1: Tensor, w2: Tensor, choices: int, options: Options) -> bool:
    """Whether this call of a layer is one for :func:`run`: inference in FP8 on Hopper, SwiGLU without biases, sizes in
    whole blocks, rows that are streamed. Sizes alone decide, so equal batches take equal ways. Compiled graphs keep the
    layer's ways.
    """
    if not options.inference or not isinstance(options.recipe, Fp8Recipe) or torch.compiler.is_compiling():
        return False
    (tokens, hidden), (experts, inter), activation = x_TH.shape, w2.shape[::2], options.activation
    return (
        tokens > 0
        and streams(tokens * choices, tokens * choices, hidden, inter, experts)
        and choices <= MAX_TOP_K
        and experts <= MAX_LOCAL_EXPERTS
        and hidden % BLOCK == 0
        and inter % BLOCK == 0
        and (activation.type, activation.alpha, activation.up_offset) == (ActivationType.SWIGLU, 1.0, 0.0)
        and options.b1 is None
        and options.b2 is None
        and _on_hopper(x_TH, inter, options.backend)
    )


def _on_hopper(x_TH: Tensor, inter: int, backend: str) -> bool:
    return registry.choose_fp8(x_TH.device, hidden=x_TH.shape[1], intermediate=inter, backend=backend).name == "sm90"


def run(x_TH: Tensor, ids_TK: Tensor, scores_TK: Tensor, w1: Weight, w2: Weight, options: Options) -> Tensor:
    """(T, H) bf16 of a call that :func:`suits`. Ids outside [0, E) are skipped."""
    recipe = options.recipe
    assert isinstance(recipe, Fp8Recipe)
    with torch.no_grad():
        w1, w2 = with_fp8_copies(w1, w2, recipe, options.backend, options.weight_cache)
        return moe_fp8_topk(
            x_TH.detach(), w1.fp8.q, w2.fp8.q, w1.fp8.scale, w2.fp8.scale, scores_TK.detach().float().contiguous(),
            ids_TK.contiguous(), num_experts=w1.value.shape[0], gate_up_order=options.layout,
            swiglu_limit=options.activation.limit, pow2_scales=recipe.pow2,
        )  # fmt: skip


def rows_of_experts(ids_TK: Tensor, num_experts: int) -> Tensor:
    """(E,) int32: how often each expert was chosen."""
    experts = torch.arange(num_experts, device=ids_TK.device, dtype=ids_TK.dtype)
    return (ids_TK.reshape(-1, 1) == experts).sum(0, dtype=torch.int32)
