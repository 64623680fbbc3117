"""Cases of the mega suite: the experts of one rank of eight in DeepGEMM's published tables, with as many rows for each.

A shape comes again with positive numbers alone, where a tensor core that adds up a whole row by itself is off by per
cents. ``of_ranks`` is one rank's part of a layer with as many experts and tokens on each of R ranks.

Floor: the hit experts' weights and scales, inputs and output at the copy bandwidth of an H200, or products at
``PRODUCTS``, whichever takes longer. Travel between the GPUs of one host would always take less, hidden behind that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from supersonic_moe.bench.infer_cases import InferCase, InferShape
from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.perf_model import H200
from supersonic_moe.quantization.block_format import blocks

OPERATOR, DIRECT, DEEP_GEMM = "moe_fp8_topk", "direct", "deep_gemm_fused"
"""Names of the other contenders."""
PRODUCTS = 1250e12  # FLOP/s: the best grouped FP8 product with promotion to fp32 that was seen on an H200
TOKENS = (16, 64, 256, 512, 1024, 4096, 8192)
POSITIVE_TOKENS = 1024


@dataclass(frozen=True)
class MegaShape(InferShape):
    """All experts of one rank, and where tokens choose among them."""

    positive: bool = False
    """x, weights and scales have no sign."""
    ranks: int = 1

    def floor(self, tokens: int, hits: int, rows: int) -> tuple[int, float]:
        per_token = 3 * self.hidden + 4 * blocks(self.hidden) + 8 * self.rule.top_k
        moved = hits * self.expert_bytes + tokens * per_token
        return moved, 1e6 * max(moved / H200.bandwidth, 6 * rows * self.hidden * self.inter / PRODUCTS)


def _shape(name: str, hidden: int, inter: int, experts: int, top_k: int) -> MegaShape:
    rule = GroupedRouting(num_experts=experts, top_k=top_k, n_group=1, topk_group=1, scoring=Scoring.SOFTMAX)
    return MegaShape(name, hidden, inter, experts, rule)


SHAPES = {
    shape.name: shape
    for shape in (
        _shape("flash", 4096, 2048, 32, 6),
        _shape("pro", 7168, 3072, 48, 6),
        _shape("mimo-2.5", 4096, 2048, 32, 8),
        _shape("mimo-2.5-pro", 6144, 2048, 48, 8),
    )
}


def cases_of(shape: MegaShape, tokens: tuple[int, ...] = TOKENS, positive: int = POSITIVE_TOKENS) -> list[InferCase]:
    of_one_sign = replace(shape, name=f"{shape.name}-positive", positive=True)
    return [*(InferCase(shape, t) for t in tokens), InferCase(of_one_sign, positive)]


#: What a CPU measures in seconds.
CPU_CASES = cases_of(_shape("tiny", 256, 128, 8, 3), (1, 19), 7)


def of_ranks(case: InferCase, ranks: int, rank: int) -> InferCase:
    """What ``rank`` of R has of R times as many experts; its tokens choose among all of them."""
    shape = case.shape
    assert isinstance(shape, MegaShape)
    rule = replace(shape.rule, num_experts=ranks * shape.local)
    return replace(
        case, shape=replace(shape, name=f"{shape.name}-R{ranks}", rule=rule, ranks=ranks), offset=rank * shape.local
    )


def must(tokens: int, ranks: int = 1) -> float:
    """How many times faster than DeepGEMM's kernel ours has to be."""
    if tokens <= 256:
        return 1.10
    if ranks == 1:
        return 1.25 if tokens <= 1024 else 1.35
    return 1.25 if tokens <= 512 else 1.45


AT_MOST_US = {
    "flash-R2": (235, 240, 250, 272, 425, 1310, 2480),
    "pro-R2": (735, 815, 835, 865, 1140, 3450, 6300),
    "mimo-2.5-R2": (238, 242, 262, 330, 525, 1720, 3280),
    "mimo-2.5-pro-R2": (465, 485, 505, 545, 930, 2690, 4950),
}


def at_most_us(shape: str, tokens: int) -> float | None:
    """What a call may take; None where there is no bar."""
    return dict(zip(TOKENS, AT_MOST_US.get(shape, ()), strict=False)).get(tokens)
