"""``bench kernels``, measured by ``bench/kernels.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.bench.shapes import LAYER_SHAPES
from supersonic_moe.bench.suite import OfLayers, Progress, Timed
from supersonic_moe.perf_model import LayerShape

if TYPE_CHECKING:
    from supersonic_moe.bench.kernels import KernelsResult
    from supersonic_moe.bench.layer import LayerConfig


@dataclass(frozen=True, kw_only=True)
class Kernels(OfLayers["KernelsResult"], Timed[LayerShape, "KernelsResult"]):
    """Every kernel of a layer alone, beside its floor: time, TFLOP/s, GB/s, watts, pJ/FLOP; roofline figure."""

    name = "kernels"
    files: ClassVar = {"kernels": {}}
    shapes = LAYER_SHAPES[:2]

    dtype: options.Dtype = None
    backend: options.Backend = "auto"
    png: options.Png = None

    @cached_property
    def config(self) -> LayerConfig:
        from supersonic_moe.bench.layer import LayerConfig

        dtype = options.dtype(self.dtype, self.where)
        return LayerConfig(self.where, dtype, backend=self.backend, peers=(), warm_ms=self.warm_ms, min_ms=self.min_ms)

    @property
    def heading(self) -> str:
        from supersonic_moe.bench.kernels import backend_of

        backends = dict.fromkeys(backend_of(case, self.config) for case in self.cases())
        on = f"{self.machine}, {self.config.dtype_name}, {', '.join(backends)}"
        return f"Kernels of one MoE layer, each alone, on {on}"

    def cases(self) -> Sequence[LayerShape]:
        from supersonic_moe.bench.kernels import backend_of

        cases = super().cases()
        for case in cases:
            backend_of(case, self.config)
        return cases

    def run(self, case: LayerShape, progress: Progress) -> KernelsResult:
        from supersonic_moe.bench.kernels import run_case

        return run_case(case, self.config, progress)

    def columns(self, result: KernelsResult) -> RenderableType:
        from supersonic_moe.bench.kernels import kernel_table

        return kernel_table(result)

    def figure(self, results: Sequence[KernelsResult]) -> Sequence[Path]:
        if self.png is None:
            return ()
        from supersonic_moe.bench.kernel_figure import write_figures
        from supersonic_moe.bench.report import document

        return write_figures(self.png, document(self.name, self.metrics(results), self.where, self.commit))
