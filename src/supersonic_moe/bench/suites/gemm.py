"""``bench gemm``, measured by ``bench/gemm.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.bench.shapes import GEMM_CASES, GemmCase
from supersonic_moe.bench.suite import Progress, Timed

if TYPE_CHECKING:
    from supersonic_moe.bench.gemm import GemmResult


@dataclass(frozen=True, kw_only=True)
class Gemm(Timed[GemmCase, "GemmResult"]):
    """Grouped GEMM and weight gradient alone, plain, gathered, accumulating: TFLOP/s, watts, pJ/FLOP, error."""

    name = "gemm"
    files: ClassVar = {"gemm-bf16": {}, "gemm-fp8": {"precision": "fp8"}}

    case: Annotated[
        list[str] | None,
        typer.Option(help="A case by name, else gemm:E,rows,N,K or wgrad:E,rows,M,N. Repeatable. Default: all named."),
    ] = None
    precision: Annotated[str, typer.Option(help="bf16, or fp8: e4m3 with block scales.")] = "bf16"
    png: options.Png = None

    @property
    def heading(self) -> str:
        precision = {"bf16": "bfloat16", "fp8": "FP8, block scales"}[self.precision]
        return f"Grouped GEMMs on {self.machine}, {precision}"

    def cases(self) -> Sequence[GemmCase]:
        from supersonic_moe.bench.gemm import check_device

        if self.precision not in ("bf16", "fp8"):
            raise ValueError(f"a precision is bf16 or fp8; got {self.precision!r}.")
        cases = [GemmCase.parse(text) for text in self.case or ()]
        check_device(self.where)
        return cases or GEMM_CASES

    def run(self, case: GemmCase, progress: Progress) -> GemmResult:
        from supersonic_moe.bench import gemm, gemm_bf16, gemm_fp8
        from supersonic_moe.bench.timing import clock_for

        operands, compared = (
            (gemm_fp8.contenders, gemm_fp8.COMPARED)
            if self.precision == "fp8"
            else (gemm_bf16.contenders, gemm.COMPARED)
        )
        times = {"warm_ms": self.warm_ms, "min_ms": self.min_ms}
        clock = clock_for(self.where)
        return gemm.run_case(case, operands, self.where, clock, **times, compared=compared, progress=progress)

    def columns(self, result: GemmResult) -> RenderableType:
        from supersonic_moe.bench.report import contender_table

        return contender_table(result) if result.metrics else ""

    def summary(self, results: Sequence[GemmResult]) -> Iterable[RenderableType]:
        from supersonic_moe.bench.report import summary_tables

        return summary_tables(self.metrics(results), "us", "tflops")

    def figure(self, results: Sequence[GemmResult]) -> Sequence[Path]:
        if self.png is None or not self.metrics(results):
            return ()
        from supersonic_moe.bench.bar_chart import Panel, dense_products, write_png
        from supersonic_moe.perf_model import H200

        panels = [
            Panel(title, "tflops", measured)
            for title, kind in (("grouped GEMM", "gemm"), ("weight gradient", "wgrad"))
            if (measured := [result for result in results if result.kind == kind and result.metrics])
        ]
        return [write_png(self.png, panels, self.heading, dense_products(H200, fp8=self.precision == "fp8"))]
