"""``bench train``, measured by ``bench/train.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.bench.suite import Fp8Options, Progress, Suite
from supersonic_moe.config.recipe import Bf16Recipe

if TYPE_CHECKING:
    from supersonic_moe.bench.report import CaseResult
    from supersonic_moe.bench.train import PairResult
    from supersonic_moe.demo.data import Corpus
    from supersonic_moe.demo.train import TrainConfig


@dataclass(frozen=True)
class Pair:
    """A case: two runs from the weights and on the batches of one seed."""

    seed: int

    def __str__(self) -> str:
        return f"pair {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Train(Fp8Options, Suite[Pair, "PairResult"]):
    """The demo's model trained in FP8 and in BF16 from the same weights on the same batches: held-out bits per byte.

    Chance alone moves the end of one run by 1 to 2 per cent, so what counts is the mean over several pairs of runs.
    """

    name = "train"
    files: ClassVar = {"train-fp8": {}}

    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 600
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs; each has weights and batches of its own.")] = 3
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a step; default: the demo's.")] = None
    png: options.Png = None

    @cached_property
    def config(self) -> TrainConfig:
        from supersonic_moe.bench.train import config_for

        return config_for(self.where, self.batch)

    @cached_property
    def corpus(self) -> Corpus:
        from supersonic_moe.demo.train import corpus_for

        return corpus_for(self.config)

    @property
    def heading(self) -> str:
        size = f"{self.steps} steps of {self.config.batch} x {self.config.model.context} bytes"
        return f"The demo's model, {size} on {self.machine}"

    @property
    def method(self) -> str:
        return f"In FP8 and in BF16, {self.seeds} pairs of runs; each is judged on held-out files in its own recipe."

    def cases(self) -> Sequence[Pair]:
        return [Pair(seed) for seed in range(self.seeds)]

    def run(self, case: Pair, progress: Progress) -> PairResult:
        from supersonic_moe.bench.train import PairResult, train

        given = (self.config, self.corpus, self.steps, case.seed, self.where, progress)
        return PairResult(str(case), pair=(train(self.recipe_named("fp8"), *given), train(Bf16Recipe(), *given)))

    def metrics(self, results: Sequence[PairResult]) -> list[CaseResult]:
        from supersonic_moe.bench import train

        return train.cases([result.pair for result in results], self.config)

    def columns(self, result: PairResult) -> RenderableType:
        from supersonic_moe.bench.train import gap

        return f"{result.case}: FP8 ends {100 * gap(*result.pair):+.2f} % from BF16"

    def summary(self, results: Sequence[PairResult]) -> Iterable[RenderableType]:
        from supersonic_moe.bench.report import case_table

        return [case_table(self.metrics(results)[-1])]

    def figure(self, results: Sequence[PairResult]) -> Sequence[Path]:
        if self.png is None:
            return ()
        from supersonic_moe.bench.train import write_curve

        write_curve(self.png, [result.pair for result in results], self.heading)
        return [self.png]
