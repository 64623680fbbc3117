"""``bench transformers``, measured by ``bench/transformers.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import typer

from supersonic_moe.bench import options
from supersonic_moe.bench.shapes import (
    CPU_HUGGING_FACE_MODELS,
    DECODE_TOKENS,
    HUGGING_FACE_MODELS,
    TRAINING_TOKENS,
    HuggingFaceModel,
)
from supersonic_moe.bench.suite import Progress, Timed

if TYPE_CHECKING:
    from supersonic_moe.bench.report import CaseResult
    from supersonic_moe.bench.transformers import Settings, TransformersCase

PEERS = "eager,grouped_mm,batched_mm,liger"


@dataclass(frozen=True, kw_only=True)
class Transformers(Timed["TransformersCase", "CaseResult"]):
    """Experts backends of Hugging Face Transformers: training step and decode of models shaped like real ones."""

    name = "transformers"
    files: ClassVar = {"transformers": {}}
    note = "In parentheses: how many times less ours takes."

    models: Annotated[
        str | None,
        typer.Option(help=f"With a comma, of {', '.join(model.name for model in HUGGING_FACE_MODELS)}. Default: all."),
    ] = None
    what: Annotated[str, typer.Option(help="layers (experts alone), model (two layers of it), or both.")] = "both"
    dtype: options.Dtype = None
    peers: Annotated[str, typer.Option(help=f"Of {PEERS}; none for ours alone.")] = PEERS
    pairs: options.Pairs = 4

    @cached_property
    def settings(self) -> Settings:
        from supersonic_moe.bench.transformers import Settings

        return Settings(
            device=self.where,
            dtype=options.dtype(self.dtype, self.where),
            peers=options.peers(self.peers, PEERS),
            warm_ms=self.warm_ms,
            min_ms=self.min_ms,
            pairs=self.pairs,
        )

    @property
    def heading(self) -> str:
        return f"Experts of Hugging Face Transformers on {self.machine}"

    def cases(self) -> Sequence[TransformersCase]:
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("this suite needs Transformers, which is not installed. Run pip install transformers.")
        from supersonic_moe.bench.transformers import TransformersCase

        options.peers(self.peers, PEERS)
        kinds: tuple[Literal["layers", "model"], ...] = ("layers", "model")
        if self.what not in (*kinds, "both"):
            raise ValueError(f"what is layers, model or both; got {self.what!r}.")
        gpu = self.where.type == "cuda"
        tokens = {"train": TRAINING_TOKENS if gpu else (64,), "decode": DECODE_TOKENS if gpu else (4,)}
        everything = [
            TransformersCase(model, kind, cast(Literal["train", "decode"], mode), count)
            for model in self._chosen(HUGGING_FACE_MODELS if gpu else CPU_HUGGING_FACE_MODELS)
            for kind in kinds
            if self.what in (kind, "both")
            for mode, counts in tokens.items()
            for count in counts
        ]
        middle = tokens["train"][len(tokens["train"]) // 2]
        return sorted(everything, key=lambda case: _place(case, middle))

    def _chosen(self, known: Sequence[HuggingFaceModel]) -> Sequence[HuggingFaceModel]:
        if self.models is None:
            return known
        by_name = {model.name: model for model in known}
        asked = [name for name in self.models.split(",") if name]
        unknown = [name for name in asked if name not in by_name]
        if unknown or not asked:
            raise ValueError(f"a model on {self.where.type} is one of {', '.join(by_name)}; got {self.models!r}.")
        return [by_name[name] for name in asked]

    def run(self, case: TransformersCase, progress: Progress) -> CaseResult:
        from supersonic_moe.bench.transformers import run_case

        return run_case(case, self.settings, progress)


def _place(case: TransformersCase, training_tokens: int) -> int:
    """Where a case stands in the order: of a run that is stopped, what tells most is left, of every model."""
    if case.mode == "decode":
        return 1 if case.what == "layers" else 2
    if case.tokens == training_tokens:
        return 0 if case.what == "layers" else 3
    return 4
