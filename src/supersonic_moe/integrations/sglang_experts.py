"""SGLang: the FP8 inference operator as a fused function of its MoE runner, and as a runner backend of its own.

``fused_experts`` has the signature of SGLang's fused functions (``moe_runner/base.py``: what ``register_fused_func``
takes). Their registry accepts SGLang's own backend names only, so ``register`` adds a backend by name that hands the
same three arguments on; call it from an entry point of the group ``sglang.srt.plugins`` and start the server with
``--moe-runner-backend supersonic_moe``:

    [project.entry-points."sglang.srt.plugins"]
    supersonic_moe = "supersonic_moe.integrations.sglang_experts:register"

SGLang routes and, with tensor or expert parallelism, sums over ranks; ids are local, -1 where another rank has the
expert. Signatures are those of SGLang 0.5.23. Nothing of SGLang is imported before a function is called.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from supersonic_moe.inference import moe_fp8_topk
from supersonic_moe.quantization.block_format import BLOCK

NAME = "supersonic_moe"


def fused_experts(dispatch_output: Any, quant_info: Any, runner_config: Any) -> Any:
    """``StandardCombineInput`` of a ``StandardDispatchOutput``, a ``TritonMoeQuantInfo`` and a ``MoeRunnerConfig``.

    x is taken in bf16 and quantized inside. Raises ValueError for what the operator does not compute: other numbers
    than block-scaled FP8, biases, other activations than SwiGLU, rows that are not combined.
    """
    _refuse(quant_info, runner_config)
    weights, ids = dispatch_output.topk_output[:2]
    factor = runner_config.routed_scaling_factor
    out: Tensor = moe_fp8_topk(
        dispatch_output.hidden_states, quant_info.w13_weight, quant_info.w2_weight, quant_info.w13_scale,
        quant_info.w2_scale, weights, ids, num_experts=quant_info.w13_weight.shape[0], gate_up_order="gate_up",
        swiglu_limit=runner_config.swiglu_limit, routed_scaling_factor=1.0 if factor is None else factor,
        apply_router_weight_on_input=runner_config.apply_router_weight_on_input,
    )  # fmt: skip
    standard = importlib.import_module("sglang.srt.layers.moe.token_dispatcher.standard")
    return standard.StandardCombineInput(hidden_states=out)


def register(name: str = NAME) -> None:
    """Add a runner backend of that name to SGLang."""
    base = importlib.import_module("sglang.srt.layers.moe.moe_runner.base")
    runner = importlib.import_module("sglang.srt.layers.moe.moe_runner.runner")
    utils = importlib.import_module("sglang.srt.layers.moe.utils")

    class Core(base.DispatchMoeRunnerCore):  # type: ignore[misc, name-defined]
        @property
        def runner_backend(self) -> Any:
            return utils.resolve_moe_runner_backend(name)

        def run_from_dispatch(
            self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None
        ) -> Any:
            if hooks is not None:
                raise ValueError(f"{name} has no LoRA hooks; got some. Choose another --moe-runner-backend.")
            return fused_experts(dispatch_output, quant_info, runner_config)

    runner.register_moe_runner_core(name, Core)


def _refuse(quant_info: Any, runner_config: Any) -> None:
    block = list(quant_info.block_shape or ())
    if not quant_info.use_fp8_w8a8 or block != [BLOCK, BLOCK]:
        raise ValueError(
            f"{NAME} needs FP8 weights in blocks of {BLOCK} x {BLOCK}; got use_fp8_w8a8={quant_info.use_fp8_w8a8}, "
            f"block_shape={block}. Choose another --moe-runner-backend."
        )
    unsupported = {
        "biases": quant_info.b13 is not None or quant_info.b2 is not None,
        "interleaved gate and up": quant_info.fuse_swiglu_interleaved,
        f"activation {runner_config.activation!r}": runner_config.activation != "silu" or not runner_config.is_gated,
        "gemm1_alpha or gemm1_clamp_limit": (runner_config.gemm1_alpha, runner_config.gemm1_clamp_limit)
        != (None, None),
        "rows that are not combined": runner_config.no_combine,
    }
    if found := [what for what, present in unsupported.items() if present]:
        raise ValueError(f"{NAME} computes SwiGLU experts and their weighted sum; got {', '.join(found)}.")
