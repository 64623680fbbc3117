"""``bench exchange``, measured by ``bench/exchange.py`` and ``bench/exchange_ranks.py``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import RenderableType

from supersonic_moe.bench.suite import OverRanks, Progress

if TYPE_CHECKING:
    from supersonic_moe.bench.exchange import ExchangeResult, Tables
    from supersonic_moe.bench.exchange_ranks import Runner


@dataclass(frozen=True, kw_only=True)
class Exchange(OverRanks["Tables | str", "ExchangeResult"]):
    """What an exchange between ranks is made of: on one rank, what it does alone; under torchrun, what links give."""

    name = "exchange"
    files: ClassVar = {"exchange-world1": {}}

    part: Annotated[
        list[str] | None,
        typer.Option(help="Of several ranks: copies, kernels, all_to_all, gemm or flags. Repeatable. Default: each."),
    ] = None
    min_ms: Annotated[float, typer.Option(min=0, help="Timed work of each contender, milliseconds.")] = 60
    warm_ms: Annotated[float, typer.Option(min=0, help="Load before anything is timed, milliseconds.")] = 40

    @property
    def heading(self) -> str:
        what = "Parts of an exchange, one rank" if self.ranks == 1 else f"Exchanges between {self.ranks} ranks"
        return f"{what}, {self.machine}"

    @property
    def method(self) -> str:
        how = f"Medians of at least {self.min_ms:g} ms each, interleaved, after {self.warm_ms:g} ms of load"
        if self.ranks > 1:
            return f"{how}; products four times as long. The slowest rank counts, call by call."
        return f"{how}; on a GPU, short calls in a CUDA graph."

    @cached_property
    def runner(self) -> Runner:
        from supersonic_moe.bench.exchange_ranks import Runner

        return Runner(self.where, warm_ms=self.warm_ms, min_ms=self.min_ms)

    def around(self) -> AbstractContextManager[None]:
        return super().around() if self.ranks == 1 else self.runner.over_ranks()

    def cases(self) -> Sequence[Tables | str]:
        from supersonic_moe.bench.exchange import CASES, CPU_CASES
        from supersonic_moe.bench.exchange_ranks import PARTS

        if self.ranks == 1:
            if self.part:
                raise ValueError(f"a part is of several ranks; got {', '.join(self.part)} and one. Leave --part out.")
            return CASES if self.where.type == "cuda" else CPU_CASES
        if unknown := [name for name in self.part or () if name not in PARTS]:
            raise ValueError(f"a part is one of {', '.join(PARTS)}; got {', '.join(unknown)}.")
        return self.part or list(PARTS)

    def run(self, case: Tables | str, progress: Progress) -> ExchangeResult:
        if isinstance(case, str):
            return self.runner.run(case, progress)
        from supersonic_moe.bench.exchange import run_case

        return run_case(case, self.where, warm_ms=self.warm_ms, min_ms=self.min_ms, progress=progress)

    def columns(self, result: ExchangeResult) -> RenderableType:
        from supersonic_moe.bench.exchange import parts_table

        return parts_table(result)
