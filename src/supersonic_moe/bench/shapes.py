"""Benchmark cases. Only shapes live here: every result, a peer's included, is measured in the run that prints it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from supersonic_moe.perf_model import LayerShape

# ---- the layer suite and the cold start ------------------------------------------------------------------------------

#: T, H, I, E, K: coarse to fine-grained experts, narrow to wide hidden sizes.
LAYER_SHAPES = (
    LayerShape(8192, 3072, 1536, 8, 8),  # the reference shape: no sparsity at all, pure GEMM
    LayerShape(32768, 4096, 1024, 128, 8),  # long batch, fine-grained
    LayerShape(8192, 4096, 4096, 8, 8),  # the widest experts
    LayerShape(16384, 2048, 768, 128, 8),  # Qwen3-30B-A3B: the smallest GEMMs, the most overhead
    LayerShape(16384, 7168, 2048, 32, 8),  # DeepSeek-V3 sizes, one rank of eight
)

#: After the granularity sweep of SonicMoE (arXiv 2512.14080): the experts of a 7B model cut three ways at equal FLOPs,
#: then the finest ones of a 30B and a 120B model.
FINE_GRAINED_SHAPES = (
    LayerShape(24576, 1536, 256, 128, 8),
    LayerShape(24576, 1536, 512, 64, 4),
    LayerShape(24576, 1536, 1024, 32, 2),
    LayerShape(32768, 4096, 256, 256, 16),
    LayerShape(32768, 4096, 512, 256, 16),
)

#: Short batches of the reference shape, where the host and, in FP8, quantizing the weights weigh most.
SHORT_SHAPES = tuple(LayerShape(tokens, 3072, 1536, 8, 8) for tokens in (512, 1024, 2048, 4096))

LAYER_SETS = {"default": LAYER_SHAPES, "fine-grained": FINE_GRAINED_SHAPES, "short": SHORT_SHAPES}

#: What runs on a CPU when no shape is given: the same code paths in a second or two.
CPU_LAYER_SHAPES = (LayerShape(512, 256, 128, 8, 2),)

# ---- the GEMM suite --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmCase:
    """A grouped product over E experts of equally many rows, P in all: 2 P times the product of both sizes FLOPs.

    gemm     ragged rows, the forward product:                  D (P, N) = A (P, K) · W (E, N, K)ᵀ      sizes N, K
    wgrad    ragged contraction, the gradient of the weights:   D (E, M, N) = A (P, M)ᵀ · B (P, N)      sizes M, N
    """

    name: str
    kind: Literal["gemm", "wgrad"]
    experts: int
    rows_per_expert: int
    sizes: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.experts, self.rows_per_expert) < 1:
            raise ValueError(f"a case needs at least one expert and one row an expert; got {self.name}.")
        if any(size < 8 or size % 8 for size in self.sizes):
            raise ValueError(
                f"sizes must be multiples of 8, so that TMA can load rows of whole 16 bytes; got {self.name}."
            )

    @property
    def rows(self) -> int:
        """P"""
        return self.experts * self.rows_per_expert

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.sizes[0] * self.sizes[1]

    @classmethod
    def parse(cls, text: str) -> GemmCase:
        """The name of a case of :data:`GEMM_CASES`, else ``gemm:E,rows,N,K`` or ``wgrad:E,rows,M,N``."""
        known = {case.name: case for case in GEMM_CASES}
        if text.strip() in known:
            return known[text.strip()]
        match = re.fullmatch(r"\s*(gemm|wgrad):(\d+),(\d+),(\d+),(\d+)\s*", text)
        if match is None:
            raise ValueError(
                f"a case is one of {', '.join(known)}, or whole numbers as gemm:E,rows,N,K or wgrad:E,rows,M,N "
                f"(experts, rows of each expert, sizes); got {text!r}."
            )
        experts, rows, first, second = map(int, match.groups()[1:])
        kind: Literal["gemm", "wgrad"] = "gemm" if match[1] == "gemm" else "wgrad"
        a, b = "NK" if kind == "gemm" else "MN"
        return cls(f"{kind}_E{experts}_R{rows}_{a}{first}_{b}{second}", kind, experts, rows, (first, second))

    def __str__(self) -> str:
        return self.name


#: Up- and down-projections of the reference shape, of two DeepSeek-like models and of Qwen3-30B-A3B, then weight
#: gradients: coarse to fine-grained.
GEMM_CASES = (
    GemmCase("ref_up", "gemm", 8, 8192, (3072, 3072)),
    GemmCase("ref_down", "gemm", 8, 8192, (3072, 1536)),
    GemmCase("flash_l1", "gemm", 32, 1536, (4096, 4096)),
    GemmCase("flash_l2", "gemm", 32, 1536, (4096, 2048)),
    GemmCase("pro_l1", "gemm", 48, 1024, (6144, 7168)),
    GemmCase("pro_l2", "gemm", 48, 1024, (7168, 3072)),
    GemmCase("qwen_up", "gemm", 128, 1024, (1536, 2048)),
    GemmCase("ref_dw1", "wgrad", 8, 8192, (3072, 3072)),
    GemmCase("ref_dw2", "wgrad", 8, 8192, (3072, 1536)),
    GemmCase("h4096_dw1", "wgrad", 8, 8192, (8192, 4096)),
    GemmCase("e128_dw1", "wgrad", 128, 2048, (2048, 4096)),
    GemmCase("qwen_dw1", "wgrad", 128, 1024, (1536, 2048)),
)

# ---- the transformers suite ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HuggingFaceModel:
    """Two layers of a model of Hugging Face Transformers, in the sizes of a real one but for a vocabulary of 32768."""

    name: str
    model_type: str
    sizes: tuple[int, int, int, int]
    """H, I, E, K of the experts."""
    others: tuple[tuple[str, object], ...]
    """What else its config is told."""
    gated: bool = True
    swiglu: bool = True
    """Whether its experts are a plain SwiGLU. Others are timed beside our layer on one of the same FLOPs."""

    @property
    def config(self) -> dict[str, object]:
        hidden, width, experts, top_k = self.sizes
        return {
            "vocab_size": 32768,
            "num_hidden_layers": 2,
            "hidden_size": hidden,
            **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), width),
            **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts),
            "num_experts_per_tok": top_k,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            **dict(self.others),
        }

    @property
    def vocabulary(self) -> int:
        size = self.config["vocab_size"]
        assert isinstance(size, int)
        return size

    def shape(self, tokens: int) -> LayerShape:
        return LayerShape(tokens, *self.sizes)

    def __str__(self) -> str:
        return self.name


def _heads(heads: int, key_value_heads: int, size: int) -> tuple[tuple[str, object], ...]:
    return ("num_attention_heads", heads), ("num_key_value_heads", key_value_heads), ("head_dim", size)


HUGGING_FACE_MODELS = (
    HuggingFaceModel("qwen3-30b-a3b", "qwen3_moe", (2048, 768, 128, 8), _heads(32, 4, 128)),
    HuggingFaceModel(
        "deepseek-v3-32of256",
        "deepseek_v3",
        (7168, 2048, 32, 8),
        (*_heads(128, 128, 64), ("first_k_dense_replace", 0), ("n_group", 1), ("topk_group", 1)),
    ),
    HuggingFaceModel("gpt-oss-20b", "gpt_oss", (2880, 2880, 32, 4), _heads(64, 8, 64), swiglu=False),
    HuggingFaceModel(
        "nemotron-3-nano",
        "nemotron_h",
        (2688, 1856, 128, 6),
        (
            *_heads(32, 2, 128),
            ("layers_block_type", ["full_attention", "moe", "full_attention", "moe"]),
            ("num_hidden_layers", 4),
            ("moe_shared_expert_intermediate_size", 3712),
        ),
        gated=False,
        swiglu=False,
    ),
    HuggingFaceModel(
        "glm-4.5-air",
        "glm4_moe",
        (4096, 1408, 128, 8),
        (*_heads(96, 8, 128), ("first_k_dense_replace", 0), ("n_group", 1), ("topk_group", 1)),
    ),
)

#: What runs on a CPU: the same code paths in seconds.
CPU_HUGGING_FACE_MODELS = (
    HuggingFaceModel("qwen3-tiny", "qwen3_moe", (64, 32, 8, 2), (*_heads(4, 2, 16), ("vocab_size", 256))),
    HuggingFaceModel("gpt-oss-tiny", "gpt_oss", (64, 32, 8, 2), (*_heads(4, 2, 16), ("vocab_size", 256)), swiglu=False),
)

TRAINING_TOKENS, DECODE_TOKENS = (512, 2048, 8192), (1, 8, 64)
