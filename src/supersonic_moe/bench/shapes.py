"""Benchmark cases. Only shapes live here: every result, a peer's included, is measured in the run that prints it."""

from __future__ import annotations

from supersonic_moe.perf_model import LayerShape

#: T, H, I, E, K of the layer suite: coarse to fine-grained experts, narrow to wide hidden sizes.
LAYER_SHAPES = (
    LayerShape(8192, 3072, 1536, 8, 8),  # the reference shape: no sparsity at all, pure GEMM
    LayerShape(32768, 4096, 1024, 128, 8),  # long batch, fine-grained
    LayerShape(8192, 4096, 4096, 8, 8),  # the widest experts
    LayerShape(16384, 2048, 768, 128, 8),  # Qwen3-30B-A3B: the smallest GEMMs, the most overhead
    LayerShape(16384, 7168, 2048, 32, 8),  # DeepSeek-V3 sizes, one rank of eight
)

#: What ``bench layer`` runs on a CPU when no shape is given: the same code paths in a second or two.
CPU_LAYER_SHAPES = (LayerShape(512, 256, 128, 8, 2),)
