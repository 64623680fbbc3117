"""``bench ep``, measured by ``bench/ep.py``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from supersonic_moe.bench import options
from supersonic_moe.bench.shapes import LAYER_SHAPES
from supersonic_moe.bench.suite import OfLayers, OverRanks, Progress, RecipeOptions, Timed
from supersonic_moe.perf_model import LayerShape

if TYPE_CHECKING:
    from supersonic_moe.bench.ep import EpResult, Runner


@dataclass(frozen=True, kw_only=True)
class Ep(RecipeOptions, OfLayers["EpResult"], Timed[LayerShape, "EpResult"], OverRanks[LayerShape, "EpResult"]):
    """Expert parallelism, alone or under torchrun, against the layer of one GPU with the same load."""

    name = "ep"
    files: ClassVar = {"ep-world1-bf16": {}, "ep-world1-fp8": {"recipe": "fp8"}}
    shapes = LAYER_SHAPES

    transport: Annotated[
        str,
        typer.Option(
            help="all_to_all sends tokens to ranks that need them, gather all to all, push those needed to the places "
            "of gather."
        ),
    ] = "auto"
    wire: Annotated[
        str,
        typer.Option(
            help="How rows travel: exact, or fp8 for an FP8 layer, which takes --scale pow2 by itself where several "
            "ranks need it."
        ),
    ] = "exact"
    remote: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of a token's choices whose experts other ranks hold, as 0.875. Default: as uniform routing "
            "has it.",
        ),
    ] = None
    by_hand: Annotated[
        bool,
        typer.Option(
            help="Over several ranks, beside a BF16 layer written by hand: all-to-all and grouped_mm. Default: yes."
        ),
    ] = True
    pairs: options.Pairs = 4
    png: options.Png = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._rounds_twice and self.scale is None:
            object.__setattr__(self, "scale", "pow2")

    @property
    def _rounds_twice(self) -> bool:
        """Whether weight gradients read what was rounded for the way, which needs scales that are powers of two."""
        return self.ranks > 1 and (self.recipe, self.wire) == ("fp8", "fp8") and self.wgrad != "bf16"

    @property
    def heading(self) -> str:
        scales = " with scales of pow2" if self.scale == "pow2" else ""
        return (
            f"MoE layer over {self.ranks} rank(s), {self.machine}, {self.recipe}{scales}, against the plain layer of "
            "the same load"
        )

    def cases(self) -> Sequence[LayerShape]:
        if self.wire not in ("exact", "fp8"):
            raise ValueError(f"a wire is exact or fp8; got {self.wire!r}.")
        if self.transport not in ("auto", "all_to_all", "gather", "push"):
            raise ValueError(f"a transport is auto, all_to_all, gather or push; got {self.transport!r}.")
        if self.remote is not None and self.ranks == 1:
            raise ValueError("remote is a share of choices on other ranks, and here is one. Run it under torchrun.")
        if self.wire == "fp8" and self.recipe != "fp8":
            raise ValueError(f"wire fp8 is for an FP8 layer; got recipe {self.recipe}. Add --recipe fp8.")
        if self._rounds_twice and self.scale != "pow2":
            raise ValueError(
                f"wire fp8 between ranks needs scales of pow2, or weight gradients in bf16; got scale {self.scale}. "
                "Leave --scale out, or add --wgrad bf16."
            )
        return super().cases()

    @cached_property
    def runner(self) -> Runner:
        from supersonic_moe.bench.ep import EpConfig, Runner
        from supersonic_moe.bench.ep_contenders import Numbers

        kind = options.dtype(None, self.where, self.numerics)
        numbers = Numbers(self.where, kind, self.numerics, self.remote, self.by_hand)
        return Runner(EpConfig(numbers, self.transport, self.wire, self.warm_ms, self.min_ms, self.pairs))

    def around(self) -> AbstractContextManager[None]:
        return self.runner.over_ranks()

    def run(self, case: LayerShape, progress: Progress) -> EpResult:
        return self.runner.run(case, progress)

    def figure(self, results: Sequence[EpResult]) -> Sequence[Path]:
        timelines = [(result.case, result.timeline) for result in results if result.timeline is not None]
        if self.png is None or not timelines:
            return ()
        from supersonic_moe.bench.ep_timeline import draw
        from supersonic_moe.bench.infer_figure import write_png

        return [write_png(self.png, draw(timelines, self.heading))]
