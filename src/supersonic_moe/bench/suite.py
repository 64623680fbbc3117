"""What a suite is: a command of ``supersonic-moe bench`` as an object. ``bench/__init__`` says how to add one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.perf_model import LayerShape

if TYPE_CHECKING:
    import torch

    from supersonic_moe.bench.report import CaseResult
    from supersonic_moe.config.recipe import Recipe

Case = TypeVar("Case")
Result = TypeVar("Result", bound="CaseResult")
Progress = Callable[[str], None]  # takes what is going on now


@dataclass(frozen=True, kw_only=True)
class Suite(ABC, Generic[Case, Result]):
    """The options that all suites have, and what they do with them. A case is anything with a ``str``."""

    name: ClassVar[str]
    """Of the command, and in the files that it writes."""
    files: ClassVar[Mapping[str, Mapping[str, Any]]]
    """What ``bench all`` writes: the name of a file, and the options that differ from their defaults."""

    device: options.Device = None
    json: options.Json = None
    commit: options.Commit = None

    @cached_property
    def where(self) -> torch.device:
        return options.device(self.device)

    @property
    def machine(self) -> str:
        from supersonic_moe.bench.report import device_name

        return device_name(self.where)

    @property
    def rank(self) -> int:
        """Of several processes that run the command together; 0 is the one that writes."""
        return 0

    @property
    @abstractmethod
    def heading(self) -> str:
        """What is measured, on what."""

    @property
    @abstractmethod
    def method(self) -> str:
        """How, in a sentence."""

    def around(self) -> AbstractContextManager[None]:
        """What all cases run inside."""
        return nullcontext()

    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """What to measure. Raises ValueError for options that do not fit together, or not this machine."""

    @abstractmethod
    def run(self, case: Case, progress: Progress) -> Result:
        """Measure one case. Raises NoResultError where we have no result ourselves, LastCaseError if that ends all."""

    def metrics(self, results: Sequence[Result]) -> list[CaseResult]:
        """The cases of the file."""
        return [case for result in results for case in result.cases()]

    def write(self, results: Sequence[Result], missing: Sequence[str], commit: str) -> Sequence[Path]:
        """Write what is measured so far, after every case: ``missing`` names those without a result yet. Returns the
        files.
        """
        from supersonic_moe.bench.report import document, write_json

        if self.json is None:
            return ()
        write_json(self.json, document(self.name, self.metrics(results), self.where, commit, missing))
        return (self.json,)

    def columns(self, result: Result) -> RenderableType:
        """What is printed as soon as a case is measured."""
        from supersonic_moe.bench.report import case_table

        return case_table(result)

    def summary(self, results: Sequence[Result]) -> Iterable[RenderableType]:
        """What is printed at the end, about all cases together."""
        return ()

    def figure(self, results: Sequence[Result]) -> Sequence[Path]:
        """Draw what the options ask for, at the end; returns the files that were written."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Timed(Suite[Case, Result]):
    """Times contenders against each other (``timing.measure``)."""

    note: ClassVar[str] = ""
    """What else the method says."""

    min_ms: options.MinMs = 400
    warm_ms: options.WarmMs = 300

    @property
    def method(self) -> str:
        return (
            f"Medians ± half the spread of the middle 80 %, of at least {self.min_ms:g} ms each, interleaved, "
            f"after {self.warm_ms:g} ms of load. {self.note}".rstrip()
        )


@dataclass(frozen=True, kw_only=True)
class OverRanks(Suite[Case, Result]):
    """Runs in one process, or in each of those that torchrun starts: on a GPU each, and the first one writes."""

    def __post_init__(self) -> None:
        if self.ranks > 1:
            from torch.distributed import is_torchelastic_launched

            if not is_torchelastic_launched():
                raise ValueError(
                    f"several ranks are started by torchrun; got WORLD_SIZE={self.ranks} without it. "
                    "Unset WORLD_SIZE for one rank, or run torchrun -m supersonic_moe bench."
                )
        if self.rank:
            for name in ("json", "png"):
                object.__setattr__(self, name, None)

    @property
    def rank(self) -> int:
        return _whole_number("RANK", os.environ.get("RANK", "0"))

    @property
    def ranks(self) -> int:
        return _whole_number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))

    @cached_property
    def where(self) -> torch.device:
        import torch

        rank = os.environ.get("LOCAL_RANK")
        on_gpu = rank is not None and self.device is None and torch.cuda.is_available()
        return options.device(f"cuda:{rank}" if on_gpu else self.device)


def _whole_number(variable: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{variable}, which torchrun sets, must be a whole number; got {text!r}. Unset it.")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class OfLayers(Suite[LayerShape, Result]):
    """Its cases are layers: those asked for, or ``shapes``."""

    shapes: ClassVar[Sequence[LayerShape]]

    shape: options.Shapes = None

    def cases(self) -> Sequence[LayerShape]:
        return options.shapes_or(self.shape, self.shapes, self.where)


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """The choices of an FP8 recipe."""

    save_preactivation: options.Saved = None
    wgrad: options.Wgrad = None
    scale: options.Scale = None

    def recipe_named(self, name: str) -> Recipe:
        return options.recipe(name, self.save_preactivation, self.wgrad, self.scale)


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Fp8Options):
    """Options of a layer that may compute in FP8."""

    recipe: options.RecipeName = "bf16"

    @cached_property
    def numerics(self) -> Recipe:
        return self.recipe_named(self.recipe)
