"""``bench precision``, measured by ``bench/precision.py``."""

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
    from supersonic_moe.bench.layer import LayerConfig
    from supersonic_moe.bench.precision import PrecisionResult


@dataclass(frozen=True, kw_only=True)
class Precision(OfLayers["PrecisionResult"], Timed[LayerShape, "PrecisionResult"]):
    """Every choice of the FP8 recipe: step time, saved bytes, and errors against fp32 on easy and hard inputs."""

    name = "precision"
    files: ClassVar = {"precision-fp8": {}}
    shapes = LAYER_SHAPES[:1]
    note = "Errors against the reference in fp32."

    markdown: options.Markdown = None

    @cached_property
    def config(self) -> LayerConfig:
        import torch

        from supersonic_moe.bench.layer import LayerConfig

        return LayerConfig(self.where, torch.bfloat16, peers=(), warm_ms=self.warm_ms, min_ms=self.min_ms)

    @property
    def heading(self) -> str:
        return f"FP8 recipes on {self.machine}, experts alone, forward + backward"

    def run(self, case: LayerShape, progress: Progress) -> PrecisionResult:
        from supersonic_moe.bench.precision import run_case

        return run_case(case, self.config, progress)

    def columns(self, result: PrecisionResult) -> RenderableType:
        from supersonic_moe.bench.precision import ablation_table

        return ablation_table(result)

    def write(self, results: Sequence[PrecisionResult], missing: Sequence[str], commit: str) -> Sequence[Path]:
        written = super().write(results, missing, commit)
        if self.markdown is None:
            return written
        from supersonic_moe.bench.precision import write_markdown
        from supersonic_moe.bench.report import document

        write_markdown(self.markdown, results, document(self.name, [], self.where, commit, missing))
        return (*written, self.markdown)
