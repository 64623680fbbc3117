"""Whole MoE layers to compare ours with: two in plain PyTorch (``peers.py``), the others imported where installed.

sonicmoe
    SonicMoE (``sonic-moe``; arXiv 2512.14080), BF16; its products are QuACK's. Both tune themselves at the first call
    of a size, over lists that take more than nine minutes. They get the entries that win on Hopper, ``SONIC_TILES``
    and ``sums``, and choose among them as they always do. Set ``QUACK_COMPILE_WORKERS=1``: otherwise QuACK starts
    eight processes for each product, which takes longer than compiling four kernels.
liger
    ``LigerFusedMoEFunction`` of Liger-Kernel, BF16 SwiGLU in Triton; it waits for the host once. Tuned over a short
    list too (``LIGER``), for its own takes minutes a size.
torchao
    The layer of ``grouped_mm`` around torchao's FP8 grouped product, scales of 1 x 128 and 128 x 128: forward and both
    gradients multiply in DeepGEMM. Where torchao would fall back to emulation, it is missing. Scales that DeepGEMM
    would transpose, but cannot, reach it transposed (``deepgemm_scales``).

All take w1 (E, 2I, H) as [gate; up], as Hugging Face stores it, but those of ``INTERLEAVED``, which take ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.bench.peers import grouped_mm, route, sorted_layer, torch_loop
from supersonic_moe.config.activation import ActivationType

INTERLEAVED = frozenset({"sonicmoe"})
FP8 = frozenset({"torchao"})  # peers that multiply in FP8; the others' products are those of the tensors' dtype

#: (rows, columns, whether two warpgroups take turns) of a tile, all in clusters of 2 x 1.
SONIC_TILES = ((128, 256, False), (256, 128, False), (256, 192, False), (128, 192, True))


def keep(tuner: Any, wanted: Callable[[Any], bool]) -> None:
    """Leave an autotuner only those of its configurations."""
    left = [config for config in tuner.configs if wanted(config)]
    if not left:
        raise LookupError("none of the configurations that this benchmark keeps is left in this version")
    tuner.configs = left


def compile_together(tuner: Any) -> None:
    """Have a tuner of Triton compile its configurations side by side before it times them: one after the other they
    take a second each, and a layer has 28.
    """
    from triton import AsyncCompileMode

    prune = tuner.prune_configs

    def pruned(kwargs: dict[str, Any]) -> Any:
        """What the tuner calls first of all for sizes that it does not know, with its arguments in ``nargs``."""
        configs = prune(kwargs)
        with ThreadPoolExecutor() as threads, AsyncCompileMode(threads, ignore_errors=True):
            for config in configs:
                tuner.fn.run(*tuner.nargs.values(), **{**kwargs, **config.all_kwargs(), "warmup": True})
        return configs

    tuner.prune_configs = pruned


# ---- SonicMoE --------------------------------------------------------------------------------------------------------


def sonicmoe(
    x_TH: Tensor,
    router_EH: Tensor,
    w1_ENH: Tensor,
    w2_EHI: Tensor,
    top_k: int,
    router: str,
    activation: ActivationType,
) -> Tensor:
    routers = {
        "softmax_after_topk": (True, False),
        "softmax_before_topk": (False, False),
        "softmax_before_topk_renormalized": (False, True),
    }
    if router not in routers:
        raise NotImplementedError(f"SonicMoE routes by softmax only, not by {router}")
    after_topk, renormalized = routers[router]
    out_TH: Tensor = _sonicmoe()(
        x_TH, router_EH, w1_ENH.permute(1, 2, 0), None, w2_EHI.permute(1, 2, 0), None, top_k,
        0, activation.value,  # 0: a stream that it does not read
        is_inference_mode_enabled=not torch.is_grad_enabled(), is_softmax_over_topk=after_topk,
        norm_topk_probs=renormalized,
    )[0]  # fmt: skip
    return out_TH


@cache
def _sonicmoe() -> Callable[..., tuple[Tensor, ...]]:
    functional = importlib.import_module("sonicmoe.functional")
    products = importlib.import_module("quack.gemm_interface")
    for name in ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned"):
        keep(getattr(products, name), _sonic_tile)

    def sums(config: Any) -> bool:  # long pieces of a row, several rows at a time
        width, rows = config.kwargs["BLOCK_H"], config.kwargs["BLOCK_K"]
        return bool(width >= 512 and 4096 <= width * rows <= 16384)

    keep(importlib.import_module("sonicmoe.functional.reduction_over_k_gather").token_gather_sum_kernel, sums)
    layer: Callable[..., tuple[Tensor, ...]] = functional.moe_TC_softmax_topk_layer
    return layer


def _sonic_tile(config: Any) -> bool:
    c = config.kwargs["config"]
    usual = (c.device_capacity, c.cluster_m, c.cluster_n, c.swap_ab) == (9, 2, 1, False)
    return usual and (c.tile_m, c.tile_n, c.pingpong) in SONIC_TILES


# ---- Liger -----------------------------------------------------------------------------------------------------------

#: Which entries of its lists remain, by what they tune.
LIGER: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            "_fused_up_proj_swiglu_kernel",
            "_fused_down_proj_kernel",
            "_moe_bwd_down_proj_kernel",
            "_moe_bwd_dX_expanded_kernel",
        ),
        lambda c: (c.kwargs["BLOCK_N"], c.kwargs["BLOCK_K"]) == (128, 64) and c.num_stages in (3, 4),
    ),
    **dict.fromkeys(
        ("_moe_bwd_dW1_kernel", "_moe_bwd_dW2_kernel"),
        lambda c: (c.kwargs["BLOCK_N"], c.kwargs["BLOCK_K"]) == (128, 32),
    ),
    "_token_gather_weighted_sum_kernel": lambda c: c.kwargs["BLOCK_H"] == 512 and c.kwargs["BLOCK_K"] in (4, 8),
}


def liger(
    x_TH: Tensor, router_EH: Tensor, w1_ENH: Tensor, w2_EHI: Tensor, top_k: int, router: str, activation: ActivationType
) -> Tensor:
    if activation is not ActivationType.SWIGLU:
        raise NotImplementedError(f"Liger's fused layer has SwiGLU only, not {activation.value}")
    scores_TK, ids_TK = route(F.linear(x_TH, router_EH), top_k, router)
    out_TH: Tensor = liger_function()(x_TH, w1_ENH, w2_EHI, ids_TK.int(), scores_TK)
    return out_TH


@cache
def liger_function() -> Callable[..., Tensor]:
    """``LigerFusedMoEFunction.apply`` with its tuning lists cut short, in this process."""
    kernels = importlib.import_module("liger_kernel.ops.fused_moe_kernels")
    for name, wanted in LIGER.items():
        keep(getattr(kernels, name), wanted)
        compile_together(getattr(kernels, name))
    function: Callable[..., Tensor] = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction.apply
    return function


# ---- torchao ---------------------------------------------------------------------------------------------------------


def torchao(
    x_TH: Tensor, router_EH: Tensor, w1_ENH: Tensor, w2_EHI: Tensor, top_k: int, router: str, activation: ActivationType
) -> Tensor:
    return sorted_layer(_torchao_product, x_TH, router_EH, w1_ENH, w2_EHI, top_k, router, activation)


def _torchao_product(rows_SK: Tensor, w_EKN: Tensor, *, offs: Tensor) -> Tensor:
    uses_deepgemm, product = _torchao()
    if not uses_deepgemm(rows_SK, torch.bfloat16, 128):
        raise RuntimeError("torchao would emulate its FP8 product: it needs DeepGEMM and Hopper")
    return product(rows_SK, w_EKN, offs=offs)


@cache
def _torchao() -> tuple[Callable[..., bool], Callable[..., Tensor]]:
    """Whether torchao would multiply in DeepGEMM, and its product. It looks for DeepGEMM's functions once, at the first
    of those questions: that of the weight gradient is replaced before.
    """
    kernels = importlib.import_module("torchao.prototype.blockwise_fp8_training.deepgemm_grouped_kernels")
    training = importlib.import_module("torchao.prototype.moe_training.blockwise_fp8.grouped_mm")
    deepgemm: Any = importlib.import_module("deep_gemm")
    multiply = deepgemm.k_grouped_fp8_gemm_nt_contiguous

    def weight_gradient(lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> None:
        pairs = [(values, deepgemm_scales(scales)) for values, scales in (lhs, rhs)]
        multiply(*pairs, *args, **kwargs)

    deepgemm.k_grouped_fp8_gemm_nt_contiguous = weight_gradient
    return kernels.can_use_deepgemm_grouped_training, training._to_fp8_blockwise_then_scaled_grouped_mm


def deepgemm_scales(scales_DB: Tensor) -> Tensor:
    """Scales of a weight gradient's operand, D columns of B blocks of 128 rows, as DeepGEMM can take them.

    It reads them column-major. Row-major ones, which torchao writes where D >= 4096, it transposes first, with 64 rows
    at a time in shared memory, each padded to an odd number of floats. Where these are more bytes than a block can have
    (227 KiB on Hopper: B > 907, or 116,096 rows), CUDA refuses the kernel as an invalid argument.
    """
    if not scales_DB.is_contiguous():
        return scales_DB
    properties: Any = torch.cuda.get_device_properties(scales_DB.device)
    needed = 64 * (scales_DB.shape[1] | 1) * scales_DB.element_size()
    return scales_DB if needed <= properties.shared_memory_per_block_optin else scales_DB.t().contiguous().t()


PEERS: dict[str, Callable[..., Tensor]] = {
    "torch_loop": torch_loop,
    "grouped_mm": grouped_mm,
    "sonicmoe": sonicmoe,
    "liger": liger,
    "torchao": torchao,
}
