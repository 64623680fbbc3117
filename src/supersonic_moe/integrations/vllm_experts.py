"""vLLM: the FP8 inference operator as an experts class of its modular Mixture-of-Experts kernels.

vLLM routes, quantizes and dispatches; ``SupersonicExperts`` computes the experts of this rank and returns combined
rows. Importing this module imports vLLM. ``register`` is meant as an entry point of the group ``vllm.general_plugins``:

    [project.entry-points."vllm.general_plugins"]
    supersonic_moe = "supersonic_moe.integrations.vllm_experts:register"

after which ``--moe-backend supersonic_moe`` selects it. That needs the registry of out-of-tree FP8 backends of vLLM
pull request 53897, which was open in November 2026; until then a plugin has to patch the choice in vLLM's
``fused_moe/oracle/fp8.py`` itself.

Signatures are those of ``FusedMoEExpertsModular`` in vLLM at 003d383e (``fused_moe/modular_kernel.py``).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

from supersonic_moe.inference import moe_fp8_topk, workspace_bytes
from supersonic_moe.inference.workspace import ALIGNMENT
from supersonic_moe.quantization.block_format import BLOCK

NAME = "supersonic_moe"
REGISTRY = "vllm.model_executor.layers.fused_moe.oracle.fp8_registry"


def register() -> None:
    """Offer ``--moe-backend supersonic_moe``. Raises RuntimeError where this vLLM has no registry of FP8 backends."""
    try:
        registry = importlib.import_module(REGISTRY)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"vLLM must have {REGISTRY} to take FP8 MoE backends from outside; this one has none. Use a version with "
            "pull request 53897."
        ) from error
    registry.register_fp8_moe_backend(NAME, [f"{__name__}.{SupersonicExperts.__name__}"], auto_select=False)


class SupersonicExperts(mk.FusedMoEExpertsModular):
    """Experts with 128 x 128 block-scaled e4m3 weights [gate; up], on Hopper."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config=moe_config, quant_config=quant_config)
        if quant_config.block_shape != [BLOCK, BLOCK]:
            raise ValueError(
                f"SupersonicExperts needs weights in blocks of {BLOCK} x {BLOCK}; got block_shape "
                f"{quant_config.block_shape}. Choose another --moe-backend."
            )

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return bool((weight_key, activation_key) == (kFp8Static128BlockSym, kFp8Dynamic128Sym))

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return bool(activation == MoEActivation.SILU)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @staticmethod
    def _supports_shape(hidden_dim: int) -> bool:
        return hidden_dim % BLOCK == 0

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No first workspace, which vLLM shares with the output; all scratch is the second, in bf16 elements."""
        needed = workspace_bytes(M, topk, K, N // 2, local_num_experts) + ALIGNMENT
        return (0,), (-(-needed // torch.bfloat16.itemsize),), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes ``output``: (M, K) bf16, weighted and summed."""
        if apply_router_weight_on_input:  # vLLM has multiplied the input already
            topk_weights = torch.ones_like(topk_weights)
        known = None if expert_map is not None or global_num_experts < 0 else global_num_experts
        moe_fp8_topk(
            hidden_states, w1, w2, self.w1_scale, self.w2_scale, topk_weights, topk_ids, x_scale=a1q_scale,
            expert_map=expert_map, num_experts=known, gate_up_order="gate_up",
            swiglu_limit=self.quant_config.gemm1_clamp_limit, out=output, workspace=_aligned(workspace2),
        )  # fmt: skip


def _aligned(workspace: Tensor) -> Tensor:
    """The bytes from the first multiple of ``ALIGNMENT`` on."""
    scratch = workspace.view(-1).view(torch.uint8)
    return scratch[-scratch.data_ptr() % ALIGNMENT :]
