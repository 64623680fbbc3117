"""The mega suite: dispatch to combine of FP8 experts on one rank, ours and DeepGEMM's fused kernel in one process.

Ids and weights are given, x is e4m3 with its scales and lies where a contender wants it: what is timed is one call.

    moe_fp8_topk      our operator without ``MegaMoE`` around it: what the class costs, on the device and on the host
    deep_gemm_fused   ``fp8_mega_moe`` of SGLang's build of DeepGEMM (``infer_peers.py``)

Experts are those of one rank of eight in DeepGEMM's published tables, with as many rows for each. Everything is as in
the inference suite (``infer.py``) but for the check: ``calc_diff`` and the worst row against the reference in fp32 that
quantizes between the products, as all contenders do. A shape comes again with positive numbers alone, where a tensor
core that adds up a whole row by itself is off by per cents. Floor: the hit experts' weights and scales, inputs and
output at the copy bandwidth of an H200, or products at ``PRODUCTS``, whichever takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from supersonic_moe.bench import infer, infer_peers
from supersonic_moe.bench.infer_cases import InferCase, InferShape, Workload
from supersonic_moe.bench.infer_parts import Call, new_out
from supersonic_moe.bench.report import OURS, Metrics
from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.inference import moe_fp8_topk
from supersonic_moe.parallel import MegaMoE
from supersonic_moe.perf_model import H200
from supersonic_moe.quantization.block_format import blocks

OPERATOR, DEEP_GEMM = "moe_fp8_topk", "deep_gemm_fused"
PRODUCTS = 1250e12  # FLOP/s: the best grouped FP8 product with promotion to fp32 that was seen on an H200
DIFFERENCE, WORST_ROW = 0.001, 0.03  # limits of ours
PEER_DIFFERENCE = 0.01  # the bound of DeepGEMM's own tests
TOKENS = (16, 64, 256, 512, 1024, 4096, 8192)
POSITIVE_TOKENS = 1024


@dataclass(frozen=True)
class MegaShape(InferShape):
    """All experts of one rank, and where tokens choose among them."""

    positive: bool = False
    """x, weights and scales have no sign."""

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


def must(tokens: int) -> float:
    """How many times faster than DeepGEMM's kernel ours has to be."""
    if tokens <= 256:
        return 1.10
    return 1.25 if tokens <= 1024 else 1.35


# ---- contenders ------------------------------------------------------------------------------------------------------


def ours(work: Workload) -> Call:
    shape, top_k = work.case.shape, work.case.shape.rule.top_k
    return _call(work, MegaMoE(None, shape.local, shape.hidden, shape.inter, top_k, max(1, work.case.tokens)))


def operator(work: Workload) -> Call:
    return _call(work, moe_fp8_topk)


def _call(work: Workload, function: Callable[..., Tensor]) -> Call:
    experts, out, x_scale = work.experts, new_out(work), work.x_scale.t().contiguous()

    def run() -> Tensor:
        return function(
            work.x, experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, work.weights, work.ids,
            x_scale=x_scale, gate_up_order=GateUpLayout.UP_GATE, out=out,
        )  # fmt: skip

    return run


def deep_gemm(work: Workload) -> Call:
    buffer, launch = infer_peers.mega_moe(work)
    tokens = work.case.tokens
    buffer.topk_idx[:tokens].copy_(work.ids)
    buffer.topk_weights[:tokens].copy_(work.weights)
    return launch


# ---- measuring -------------------------------------------------------------------------------------------------------


class Runner(infer.Runner):
    """Measures cases as the inference suite does."""

    def _contenders(self) -> Mapping[str, Callable[[Workload], Call]]:
        known = {OPERATOR: operator} | ({DEEP_GEMM: deep_gemm} if self.device.type == "cuda" else {})
        return {OURS: ours} | {name: known[name] for name in self.peers if name in known}

    def workload_of(self, case: InferCase) -> Workload:
        work = super().workload_of(case)
        assert isinstance(case.shape, MegaShape)
        if case.shape.positive:
            for tensor in (work.x, work.x_scale, *work.experts):
                _drop_signs(tensor)
        return work

    def _reference(self, work: Workload) -> tuple[Tensor, Tensor]:
        return infer.reference(work, requantize=True)

    def _errors(self, name: str, got: Tensor, expected: Tensor) -> Metrics:
        difference, row = calc_diff(got, expected), worst_row(got, expected)
        if not difference <= (DIFFERENCE if name == OURS else PEER_DIFFERENCE):
            raise ArithmeticError(f"wrong result: its calc_diff is {difference:.2g}")
        if name == OURS and not row <= WORST_ROW:
            raise ArithmeticError(f"wrong result: a row is off by {row:.2g}, over the limit of {WORST_ROW:g}")
        return {"calc_diff": difference, "worst_row": row}


def _drop_signs(t: Tensor) -> None:
    if t.dtype is torch.float32:
        t.abs_()
    else:
        t.view(torch.uint8).bitwise_and_(0x7F)


def calc_diff(got: Tensor, expected: Tensor) -> float:
    """DeepGEMM's measure, 1 - 2 <x, y> / (<x, x> + <y, y>): about half of the squared relative error."""
    x, y = got.double(), expected.double()
    return 1 - 2 * float((x * y).sum()) / float((x * x + y * y).sum())


def worst_row(got: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())
