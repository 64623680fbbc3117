"""``bench cold-start``, measured by ``bench/cold_start.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import RenderableType

from supersonic_moe.bench.shapes import LAYER_SHAPES
from supersonic_moe.bench.suite import OfLayers, Progress
from supersonic_moe.perf_model import LayerShape

if TYPE_CHECKING:
    from supersonic_moe.bench.cold_start import ColdStartResult


@dataclass(frozen=True, kw_only=True)
class ColdStart(OfLayers["ColdStartResult"]):
    """Time to the first finished forward + backward in a new process, with cold and with warm kernel caches."""

    name = "cold-start"
    files: ClassVar = {"cold-start": {}}
    shapes = LAYER_SHAPES[:1]

    repeats: Annotated[int, typer.Option(min=1, help="New processes for each state of the caches.")] = 3

    @property
    def heading(self) -> str:
        return f"Cold start of a bfloat16 layer on {self.machine}"

    @property
    def method(self) -> str:
        return (
            f"Medians of {self.repeats} new processes each: with empty kernel caches, then with the caches that such "
            "a process left behind."
        )

    def run(self, case: LayerShape, progress: Progress) -> ColdStartResult:
        from supersonic_moe.bench.cold_start import run_case

        return run_case(case, self.where, self.repeats, progress)

    def columns(self, result: ColdStartResult) -> RenderableType:
        from supersonic_moe.bench.report import facts_table

        return facts_table(result)
