"""The mega suite: dispatch to combine of FP8 experts on one rank, ours and DeepGEMM's fused kernel in one process.

Ids and weights are given, x is e4m3 with its scales and lies where a contender wants it: what is timed is one call.

    moe_fp8_topk      our operator without ``MegaMoE`` around it: what the class costs, on the device and on the host
    deep_gemm_fused   ``fp8_mega_moe`` of SGLang's build of DeepGEMM (``infer_peers.py``)

Cases are in ``mega_cases.py``; ``mega_ranks.py`` has what differs with several ranks. Everything is as in the inference
suite (``infer.py``) but for the check: ``calc_diff`` and the worst row against the reference in fp32 that quantizes
between the products, as all contenders do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.bench import infer, infer_peers
from supersonic_moe.bench.infer_cases import InferCase, Workload
from supersonic_moe.bench.infer_parts import Call, new_out
from supersonic_moe.bench.mega_cases import DEEP_GEMM, DIRECT, OPERATOR, MegaShape
from supersonic_moe.bench.mega_timeline import Span, spans_of
from supersonic_moe.bench.report import OURS, Metrics
from supersonic_moe.bench.timing import Missing
from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.inference import moe_fp8_topk
from supersonic_moe.parallel import MegaMoE

DIFFERENCE, WORST_ROW = 0.001, 0.03  # limits of ours
PEER_DIFFERENCE = 0.01  # the bound of DeepGEMM's own tests

# ---- contenders ------------------------------------------------------------------------------------------------------


def ours(work: Workload) -> Call:
    shape, top_k = work.case.shape, work.case.shape.rule.top_k
    return call_of(work, MegaMoE(None, shape.local, shape.hidden, shape.inter, top_k, max(1, work.case.tokens)))


def operator(work: Workload) -> Call:
    return call_of(work, moe_fp8_topk)


def call_of(work: Workload, function: Callable[..., Tensor]) -> Call:
    experts, out, x_scale = work.experts, new_out(work), work.x_scale.t().contiguous()

    def run() -> Tensor:
        return function(
            work.x, experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, work.weights, work.ids,
            x_scale=x_scale, gate_up_order=GateUpLayout.UP_GATE, out=out,
        )  # fmt: skip

    return run


def deep_gemm(work: Workload, ranks: int = 1) -> Call:
    buffer, launch = infer_peers.mega_moe(work, ranks)
    tokens = work.case.tokens
    buffer.topk_idx[:tokens].copy_(work.ids)
    buffer.topk_weights[:tokens].copy_(work.weights)
    return launch


# ---- measuring -------------------------------------------------------------------------------------------------------


class Runner(infer.Runner):
    """Measures cases as the inference suite does. ``timelines``: also when the kernels of a call of ours run."""

    def __init__(self, *args: Any, timelines: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.timelines: list[tuple[str, list[Span]]] = []
        self._draws = timelines

    def run(self, case: InferCase, progress: Callable[[str], None]) -> infer.InferResult:
        self._running = str(case)
        return super().run(case, progress)

    def timed(self, calls: Mapping[str, Call]) -> dict[str, Metrics | Missing]:
        found = super().timed(calls)
        if self._draws:
            self.timelines.append((self._running, spans_of(calls[OURS], self.device)))
        return found

    def _contenders(self) -> Mapping[str, Callable[[Workload], Call]]:
        known = {OPERATOR: operator} | ({DEEP_GEMM: deep_gemm} if self.device.type == "cuda" else {})
        return {OURS: ours} | {name: known[name] for name in self.peers if name in known}

    def workload_of(self, case: InferCase) -> Workload:
        work = super().workload_of(case)
        assert isinstance(case.shape, MegaShape)
        if case.shape.positive:
            drop_signs(work.x, work.x_scale, *work.experts)
        return work

    def _reference(self, work: Workload) -> tuple[Tensor, Tensor]:
        return infer.reference(work, requantize=True)

    def _errors(self, got: Tensor, expected: Tensor) -> Metrics:
        return {"calc_diff": calc_diff(got, expected), "worst_row": worst_row(got, expected)}

    def _judge(self, name: str, errors: Metrics) -> None:
        difference, row = errors["calc_diff"], errors["worst_row"]
        ours = name in (OURS, DIRECT)
        if not difference <= (DIFFERENCE if ours else PEER_DIFFERENCE):
            raise ArithmeticError(f"wrong result: its calc_diff is {difference:.2g}")
        if ours and not row <= WORST_ROW:
            raise ArithmeticError(f"wrong result: a row is off by {row:.2g}, over the limit of {WORST_ROW:g}")


def drop_signs(*tensors: Tensor) -> None:
    for t in tensors:
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
