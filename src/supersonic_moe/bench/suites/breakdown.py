"""``bench breakdown``, measured by ``bench/breakdown.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.bench.shapes import LAYER_SHAPES
from supersonic_moe.bench.suite import OfLayers, Progress, RecipeOptions, Timed
from supersonic_moe.perf_model import LayerShape

if TYPE_CHECKING:
    from supersonic_moe.bench.breakdown import BreakdownResult
    from supersonic_moe.bench.layer import LayerConfig


@dataclass(frozen=True, kw_only=True)
class Breakdown(RecipeOptions, OfLayers["BreakdownResult"], Timed[LayerShape, "BreakdownResult"]):
    """What one forward + backward spends its time on: every function of the backend in order, beside its floor."""

    name = "breakdown"
    files: ClassVar = {"breakdown-fp8": {"recipe": "fp8"}}
    shapes = LAYER_SHAPES[:1]

    dtype: options.Dtype = None

    @cached_property
    def config(self) -> LayerConfig:
        from supersonic_moe.bench.layer import LayerConfig

        dtype = options.dtype(self.dtype, self.where, self.numerics)
        return LayerConfig(self.where, dtype, recipe=self.numerics, peers=(), warm_ms=self.warm_ms, min_ms=self.min_ms)

    @property
    def heading(self) -> str:
        return f"One forward + backward on {self.machine}, {self.config.dtype_name}"

    @property
    def method(self) -> str:
        times = f"{self.min_ms:g} ms of calls after {self.warm_ms:g} ms of load"
        return f"Medians of at least {times}; every function between two events."

    def run(self, case: LayerShape, progress: Progress) -> BreakdownResult:
        from supersonic_moe.bench.breakdown import run_case

        return run_case(case, self.config, progress)

    def columns(self, result: BreakdownResult) -> RenderableType:
        from supersonic_moe.bench.breakdown import breakdown_table

        return breakdown_table(result)
