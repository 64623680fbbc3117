"""``bench infer``, measured by ``bench/infer.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.bench.suite import Progress, Suite

if TYPE_CHECKING:
    from supersonic_moe.bench.infer import InferResult, Runner
    from supersonic_moe.bench.infer_cases import InferCase
    from supersonic_moe.bench.report import CaseResult

PEERS = "deep_gemm_fused,deep_gemm,sgl_cutlass,sgl_cutlass_es,sgl_triton,sgl_triton_untuned"


@dataclass(frozen=True, kw_only=True)
class Infer(Suite["InferCase", "InferResult"]):
    """The FP8 inference operator, logits to output, beside others': cold L2, in a CUDA graph; eager and host time."""

    name = "infer"
    files: ClassVar = {"infer-ds": {}, "infer-models": {"set": "models"}}

    set: Annotated[str, typer.Option(help="ds: the 19 sizes of the contest, three routings; models: ten others.")] = (
        "ds"
    )
    case: Annotated[
        list[str] | None, typer.Option(help="A case by name, as ds_T80_skewed. Repeatable. Default: all of the set.")
    ] = None
    routing: Annotated[str | None, typer.Option(help="uniform, skewed or hot. Default: each.")] = None
    peers: Annotated[str, typer.Option(help=f"Of {PEERS}; none for ours alone.")] = PEERS
    png: options.Png = None
    min_ms: Annotated[float, typer.Option(min=0, help="Timed work of each contender, milliseconds.")] = 60
    warm_ms: Annotated[float, typer.Option(min=0, help="Load before anything is timed, milliseconds.")] = 60

    @property
    def heading(self) -> str:
        return f"FP8 inference operator on {self.machine}, routing to combined rows"

    @property
    def method(self) -> str:
        return (
            f"Medians ± half the spread of the middle 80 %, CUDA-graph replays of {self.min_ms:g} ms each, L2 "
            "overwritten before each, interleaved."
        )

    @cached_property
    def runner(self) -> Runner:
        from supersonic_moe.bench.infer import Runner

        return Runner(self.where, warm_ms=self.warm_ms, min_ms=self.min_ms, peers=options.peers(self.peers, PEERS))

    def cases(self) -> Sequence[InferCase]:
        from supersonic_moe.bench.infer_cases import CPU_CASES, ROUTINGS, SETS, parse
        from supersonic_moe.kernels import registry

        if not registry.HAS_TRITON:
            raise ValueError('this suite needs triton, which is not installed: pip install "supersonic-moe[cuda13]"')
        options.peers(self.peers, PEERS)
        if self.set not in SETS:
            raise ValueError(f"a set is one of {', '.join(SETS)}; got {self.set!r}.")
        if self.routing not in (None, *ROUTINGS):
            raise ValueError(f"a routing is one of {', '.join(ROUTINGS)}; got {self.routing!r}.")
        if self.case:
            return [parse(text) for text in self.case]
        cases = SETS[self.set] if self.where.type == "cuda" else CPU_CASES
        return [case for case in cases if self.routing in (None, case.routing)]

    def run(self, case: InferCase, progress: Progress) -> InferResult:
        return self.runner.run(case, progress)

    def metrics(self, results: Sequence[InferResult]) -> list[CaseResult]:
        from supersonic_moe.bench.infer import fits

        return [*super().metrics(results), *fits(results)]

    def summary(self, results: Sequence[InferResult]) -> Iterable[RenderableType]:
        from supersonic_moe.bench.infer import fits
        from supersonic_moe.bench.infer_figure import winners
        from supersonic_moe.bench.report import case_table

        return [winners(results), *(case_table(fit) for fit in fits(results))]

    def figure(self, results: Sequence[InferResult]) -> Sequence[Path]:
        if self.png is None:
            return ()
        from supersonic_moe.bench.infer_figure import draw, write_png

        return [write_png(self.png, draw(results, self.heading))]
