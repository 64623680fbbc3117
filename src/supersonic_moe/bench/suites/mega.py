"""``bench mega``, measured by ``bench/mega.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.bench.suite import OverRanks, Progress, Timed

if TYPE_CHECKING:
    from supersonic_moe.bench.infer import InferResult
    from supersonic_moe.bench.infer_cases import InferCase
    from supersonic_moe.bench.mega import Runner

PEERS = "moe_fp8_topk,direct,deep_gemm_fused"


@dataclass(frozen=True, kw_only=True)
class Mega(Timed["InferCase", "InferResult"], OverRanks["InferCase", "InferResult"]):
    """FP8 experts of one rank, or of those of torchrun, beside DeepGEMM's fused kernel: cold L2, in a CUDA graph."""

    name = "mega"
    files: ClassVar = {"mega-world1": {}}

    shape: Annotated[
        list[str] | None, typer.Option(help="flash, pro, mimo-2.5 or mimo-2.5-pro. Repeatable. Default: each.")
    ] = None
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a call, a rank. Repeatable. Default: 16, 64, 256, 512, 1024, 4096, 8192."),
    ] = None
    peers: Annotated[
        str,
        typer.Option(
            help=f"Of {PEERS}; none for ours alone. moe_fp8_topk takes part with one rank, direct with several."
        ),
    ] = PEERS
    png: options.Png = None
    timeline: Annotated[
        Path | None, typer.Option(help="Chart of when kernels run. The profiler costs host time: not beside --json.")
    ] = None

    @property
    def heading(self) -> str:
        experts = "of one rank on" if self.ranks == 1 else f"over {self.ranks} ranks,"
        return f"FP8 experts {experts} {self.machine}, dispatch to combine"

    @property
    def method(self) -> str:
        if self.where.type != "cuda":
            return super().method
        slowest = " Of several ranks the slowest counts, replay by replay." if self.ranks > 1 else ""
        return f"CUDA-graph replays, L2 overwritten before each.{slowest} {super().method}"

    @cached_property
    def runner(self) -> Runner:
        from supersonic_moe.bench import mega, mega_ranks

        peers = options.peers(self.peers, PEERS)
        timings = {"warm_ms": self.warm_ms, "min_ms": self.min_ms}
        kind = mega.Runner if self.ranks == 1 else mega_ranks.Runner
        return kind(self.where, peers=peers, timelines=self.timeline is not None, **timings)

    def around(self) -> AbstractContextManager[None]:
        from supersonic_moe.bench import mega_ranks

        return self.runner.over_ranks() if isinstance(self.runner, mega_ranks.Runner) else super().around()

    def cases(self) -> Sequence[InferCase]:
        from supersonic_moe.bench.mega_cases import CPU_CASES, SHAPES, TOKENS, cases_of, of_ranks
        from supersonic_moe.kernels import registry

        if not registry.HAS_TRITON:
            raise ValueError('this suite needs triton, which is not installed: pip install "supersonic-moe[cuda13]"')
        options.peers(self.peers, PEERS)
        if self.ranks > 1 and self.timeline is not None:
            raise ValueError(f"a timeline is of one rank; got {self.ranks}. Leave --timeline out, or torchrun.")
        if unknown := [name for name in self.shape or () if name not in SHAPES]:
            raise ValueError(f"a shape is one of {', '.join(SHAPES)}; got {', '.join(unknown)}.")
        if any(tokens < 1 for tokens in self.tokens or ()):
            raise ValueError(f"tokens must be at least 1; got {min(self.tokens or ())}.")
        if self.where.type != "cuda":
            if self.shape or self.tokens:
                raise ValueError("a CPU runs three tiny cases of its own. Leave --shape and --tokens out.")
            found = CPU_CASES
        else:
            tokens = tuple(self.tokens or TOKENS)
            found = [case for name in self.shape or SHAPES for case in cases_of(SHAPES[name], tokens)]
        return found if self.ranks == 1 else [of_ranks(case, self.ranks, self.rank) for case in found]

    def run(self, case: InferCase, progress: Progress) -> InferResult:
        return self.runner.run(case, progress)

    def summary(self, results: Sequence[InferResult]) -> Iterable[RenderableType]:
        from supersonic_moe.bench.mega_figure import bars

        return [bars(results)]

    def figure(self, results: Sequence[InferResult]) -> Sequence[Path]:
        from supersonic_moe.bench import mega_figure, mega_timeline
        from supersonic_moe.bench.infer_figure import write_png

        written = []
        if self.png is not None:
            written.append(write_png(self.png, mega_figure.draw(results, self.heading)))
        if self.timeline is not None:
            written.append(write_png(self.timeline, mega_timeline.draw(self.runner.timelines, self.heading)))
        return written
