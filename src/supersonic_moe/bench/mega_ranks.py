"""The mega suite over several ranks: FP8 experts spread over them, tokens of each, one call on all ranks at once.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m supersonic_moe bench mega

    supersonic-moe     ``MegaMoE`` as it is: rows of all ranks gathered, composed of dispatch, operator and combine
    direct             ``MegaMoE(direct=True)``, up to as many tokens as it takes: nothing is copied
    deep_gemm_fused    ``fp8_mega_moe`` of SGLang's build of DeepGEMM, in its symmetric memory

Each rank makes the weights of all ranks and tokens of its own, and checks its outputs against the reference with all
experts in one place. Times are those of the slowest rank, call by call: CUDA-graph replays with a cold L2, one behind
the other, so that ranks wait for nothing but each other. Errors, rows and floor are the largest of all ranks.

What a contender does in front of its calls is tried on all ranks before any goes on, and one that fails on a rank is
missing on all. Nobody waits for ever: the others wait ``LIMIT_S`` for a rank, so they end where it is stuck in a call,
and torchrun then ends it; ``faulthandler`` ends a rank that stays in one step for twice as long, and prints where.
"""

from __future__ import annotations

import faulthandler
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from supersonic_moe.bench import infer, mega
from supersonic_moe.bench.infer_cases import InferCase, Workload, workload
from supersonic_moe.bench.infer_parts import Call
from supersonic_moe.bench.mega_cases import DEEP_GEMM, DIRECT, MegaShape
from supersonic_moe.bench.ranks import SlowestRank, agreed, group_of_ranks, told_by_all
from supersonic_moe.bench.report import OURS, Metrics
from supersonic_moe.bench.timing import Clock, LastCaseError, Missing, NoResultError, attempt, missing
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.parallel import MegaMoE
from supersonic_moe.parallel.few_rows import most_places

LIMIT_S = 60.0
"""Longest wait for another rank: each compiles what it needs in front of its first call, so one may come late."""


class Runner(mega.Runner):
    """Measures cases over the ranks of torchrun, inside ``over_ranks``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._host: dist.ProcessGroup | None = None
        self._case: InferCase | None = None
        self._layers: list[MegaMoE] = []

    @contextmanager
    def over_ranks(self) -> Iterator[None]:
        with group_of_ranks(self.device, LIMIT_S) as self._host:
            yield

    def run(self, case: InferCase, progress: Callable[[str], None]) -> infer.InferResult:
        """After an error that not all ranks have agreed on they may be in different calls: no other case follows."""
        self._case = case

        def step(doing: str) -> None:
            limit = 2 * LIMIT_S + (self.warm_ms + self.min_ms) / 50  # 20 times what timing one contender is asked for
            faulthandler.dump_traceback_later(limit, exit=True, file=2)  # where a test has replaced sys.stderr, too
            progress(doing)

        try:
            result = super().run(case, step)
            step("comparing ranks")
            self._take_largest(result)
        except NoResultError:
            raise
        except Exception as error:
            raise LastCaseError(f"{case}: {missing(error).reason}.") from error
        finally:
            for layer in self._layers:
                layer.close()
            self._layers.clear()
            faulthandler.cancel_dump_traceback_later()
        return result

    # ---- contenders --------------------------------------------------------------------------------------------------

    def _contenders(self) -> Mapping[str, Callable[[Workload], Call]]:
        assert self._case is not None
        shape, known = self._case.shape, {DEEP_GEMM: self._deep_gemm}
        if self._case.tokens <= most_places(dist.get_world_size(), shape.rule.top_k, shape.local):
            known[DIRECT] = partial(self._ours, direct=True)
        return {OURS: self._ours} | {name: known[name] for name in self.peers if name in known}

    def _ours(self, work: Workload, direct: bool = False) -> Call:
        shape, top_k = work.case.shape, work.case.shape.rule.top_k
        layer = MegaMoE(
            dist.group.WORLD, shape.rule.num_experts, shape.hidden, shape.inter, top_k, work.case.tokens,
            direct=direct, timeout_s=LIMIT_S,
        )  # fmt: skip
        self._layers.append(layer)
        if direct and "way: direct" not in layer.explain():
            raise NoResultError("ranks do not reach each other's memory")
        return mega.call_of(work, layer)

    def _deep_gemm(self, work: Workload) -> Call:
        found = self._attempt(partial(importlib.import_module, "deep_gemm"))
        if isinstance(found, Missing):  # on any rank, before one waits for others
            raise NoResultError(found.reason)
        return mega.deep_gemm(work, dist.get_world_size())

    # ---- tokens and weights ------------------------------------------------------------------------------------------

    def workload_of(self, case: InferCase) -> Workload:
        """``counts`` are rows from all ranks."""
        shape = case.shape
        assert isinstance(shape, MegaShape)
        every, own = self._all_experts(shape), slice(case.offset, case.offset + shape.local)
        work = workload(case, Fp8Experts(*(t[own] for t in every)), self.device, seed=dist.get_rank())
        if shape.positive:
            mega.drop_signs(work.x, work.x_scale, *every)
        rows_E = torch.bincount(work.ids.flatten().cpu(), minlength=shape.rule.num_experts)
        dist.all_reduce(rows_E, group=self._host)
        work.counts = rows_E[own].tolist()
        return work

    def _all_experts(self, shape: MegaShape) -> Fp8Experts:
        return self._weights(replace(shape, local=shape.rule.num_experts))

    def _reference(self, work: Workload) -> tuple[Tensor, Tensor]:
        shape = work.case.shape
        assert isinstance(shape, MegaShape)
        alone = replace(work.case, shape=replace(shape, local=shape.rule.num_experts), offset=0)
        everything = Workload(alone, self._all_experts(shape), work.logits, work.bias, work.x, work.x_scale)
        return infer.reference(everything, requantize=True)

    # ---- what ranks agree on -----------------------------------------------------------------------------------------

    def clock(self) -> Clock:
        assert self._host is not None
        return SlowestRank(super().clock(), self._host)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        return self._agreed(attempt(action))

    def timed(self, calls: Mapping[str, Call]) -> dict[str, Metrics | Missing]:
        measured = super().timed(calls)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # before any rank lets go of what the others' last calls reach
        return {name: self._agreed(found) for name, found in measured.items()}

    def _agreed(self, found: Any) -> Any:
        """``found``, or Missing where it is so on any rank."""
        assert self._host is not None
        return agreed(found, self._host, LIMIT_S)

    def _take_largest(self, result: infer.InferResult) -> None:
        assert self._host is not None
        own = result.metrics, result.untimed
        of_ranks = told_by_all(own, self._host, LIMIT_S)
        for found, told in zip(own, zip(*of_ranks, strict=True), strict=True):
            for name, metrics in found.items():
                metrics |= {metric: _largest(of_rank[name][metric] for of_rank in told) for metric in metrics}


def _largest(values: Iterable[float]) -> float:
    """NaN where one is."""
    return max(values, key=lambda value: (math.isnan(value), value))
