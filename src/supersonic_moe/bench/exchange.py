"""The exchange suite on one rank: what a rank does by itself before tokens leave and after they came back.

A case has the tables of an expert-parallel call of R ranks, uniformly routed; nothing leaves the GPU, so its parts are
those of the rank alone (``parallel/trip.py``, ``departures.py``, ``copies.py``):

    final_sum                the rows of each token's copies, added at home
    packing                  rows of x in the order in which they leave, a token once for each rank that needs it
    staging                  x into the bank that other ranks read
    departures               where each token goes, if it goes to ranks that need it
    departures_everywhere    the same if all tokens go to all ranks
    choices_message          ids and scores into one message, and out of what came from R ranks
    begin_and_meet           the flags of an exchange of one rank: two launches of one warp

Bytes are compulsory: what a part reads, each byte once (a row that goes to several ranks too), and what it writes.
Beside each part runs a copy within the GPU of as many bytes, half of them read and half written, in the same rounds:
``of_copy`` is the rate of the part over that of its copy. What fits into L2 stays there from call to call, for copies
too. Short calls are timed in a CUDA graph (``timing.in_graphs``).

Several ranks: ``exchange_ranks.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import RenderableType
from rich.table import Table

from supersonic_moe.bench.report import METRICS, OURS, CaseResult, Metrics, short
from supersonic_moe.bench.shapes import LAYER_SHAPES
from supersonic_moe.bench.timing import (
    Call,
    Missing,
    Timing,
    attempt,
    clock_for,
    in_graphs,
    measure,
    of_a_call,
    required,
)
from supersonic_moe.jit.driver import copy_bytes
from supersonic_moe.kernels.sm90.exchange_flags import ExchangeFlags
from supersonic_moe.parallel.departures import Departures, departures, departures_everywhere
from supersonic_moe.parallel.symmetric import HEAD
from supersonic_moe.parallel.trip import Trip
from supersonic_moe.private_api import raw_stream

LIMIT_S = 60.0
"""Longest wait for another rank: each compiles what it needs in front of its first call, so one may come late."""


@dataclass(frozen=True)
class Tables:
    """A call of T tokens a rank, with E experts over all R ranks."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    ranks: int

    def __str__(self) -> str:
        return f"T{self.tokens}_H{self.hidden}_E{self.experts}_K{self.top_k}_R{self.ranks}"


def _of_layers(ranks: int) -> list[Tables]:
    """The reference shape and the one with most experts, which have theirs on each rank, and Qwen3-30B-A3B."""
    layers = [LAYER_SHAPES[i] for i in (0, 3)]
    loads = [Tables(s.tokens, s.hidden, s.experts * ranks, s.top_k, ranks) for s in layers]
    return [*loads, Tables(8192, 2048, 128, 8, ranks)]


CASES = [case for ranks in (2, 8) for case in _of_layers(ranks)]
CPU_CASES = [Tables(64, 32, 8, 2, 2), Tables(33, 16, 8, 2, 4)]


@dataclass
class ExchangeResult(CaseResult):
    """Metrics by part; ``missing`` says why a part has none."""

    excused: frozenset[str] = frozenset()
    """What this machine cannot do."""

    @property
    def failed(self) -> list[str]:
        return [name for name in self.missing if name not in self.excused]

    def cases(self) -> list[CaseResult]:
        return [CaseResult(f"{self.case}/{name}", {OURS: metrics}) for name, metrics in self.metrics.items()]


class Part(NamedTuple):
    call: Call
    bytes: int
    """Read and written; 0 where a part is not bound by them."""


def run_case(
    case: Tables, device: torch.device, *, warm_ms: float, min_ms: float, progress: Callable[[str], None]
) -> ExchangeResult:
    """Time all parts that run, and their copies."""
    result, clock = ExchangeResult(str(case)), clock_for(device)
    progress("tables of random choices")
    parts = required(str(case), partial(parts_of, case, device))
    copies = _copies(parts, device)
    ready: dict[str, tuple[Call, int]] = {}
    for name, part in (parts | copies).items():
        progress(f"first call of {name}")
        prepared = attempt(partial(in_graphs, part.call, clock, device.type == "cuda"))
        if isinstance(prepared, Missing):
            result.missing[name] = prepared.reason
        else:
            ready[name] = prepared
    progress(f"timing {len(ready)} parts and copies")
    run = partial(measure, {name: call for name, (call, _) in ready.items()}, clock, warm_ms=warm_ms, min_ms=min_ms)
    for name, timing in required(f"{case}, timing", run).items():
        if isinstance(timing, Missing):
            result.missing[name] = timing.reason
        else:
            of_one = of_a_call(timing, ready[name][1])
            result.metrics[name] = rates(of_one, (parts | copies)[name].bytes)
    for name, part in parts.items():
        metrics, copy = result.metrics.get(name, {}), result.metrics.get(_copy_of(part.bytes), {})
        if part.bytes and metrics and copy:
            metrics["of_copy"] = metrics["gbps"] / copy["gbps"]
    return result


def rates(timing: Timing, size: int) -> Metrics:
    found = {"us": timing.us, "spread": timing.spread}
    return found | ({"bytes": size, "gbps": size / timing.us / 1e3} if size else {})


# ---- parts -----------------------------------------------------------------------------------------------------------


class _Here:
    """In place of other ranks: what leaves is what there is to time, and ``message`` is what comes."""

    def __init__(self, message: torch.Tensor) -> None:
        self._message = message

    def gather(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._message

    def exchange(self, rows_SC: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return rows_SC


def parts_of(case: Tables, device: torch.device) -> dict[str, Part]:
    torch.manual_seed(0)
    T, K, R = case.tokens, case.top_k, case.ranks
    x_TH = torch.randn(T, case.hidden, device=device, dtype=torch.bfloat16)
    ids_TK = torch.rand(T, case.experts, device=device).topk(K, dim=1).indices.to(torch.int32)
    scores_TK = torch.rand(T, K, device=device)
    needed = departures(ids_TK, case.experts, R)
    everywhere = departures_everywhere(ids_TK, case.experts, R, T)
    sent = needed.tokens_R.tolist()
    message_UC = torch.randint(0, case.experts, (R * T, 2 * K), device=device, dtype=torch.int32)
    token_S = needed.token_M[: sum(sent)]

    def trip(tables: Departures, token_S: torch.Tensor, counts: list[int] | None) -> Trip:
        places, here = (token_S, tables.copy_TR, tables.copy_TK), case.experts // R
        return Trip(_Here(message_UC), 1, *places, counts, counts, counts is None, 0, here)  # type: ignore[arg-type]

    packs, gathers = trip(needed, token_S, sent), trip(everywhere, everywhere.token_M, None)
    rows_SH = torch.randn(len(token_S), case.hidden, device=device, dtype=torch.bfloat16)
    bank = torch.empty(x_TH.nbytes, dtype=torch.uint8, device=device)
    leaving = int((needed.copy_TR >= 0).any(1).sum()) * case.hidden * x_TH.itemsize

    def stage() -> None:
        copy_bytes(bank.data_ptr(), x_TH.data_ptr(), x_TH.nbytes, current_stream(device))

    def size(*tensors: torch.Tensor) -> int:
        return sum(t.nbytes for t in tensors)

    found = {
        "final_sum": Part(lambda: packs.summed(rows_SH), size(rows_SH, needed.copy_TR, x_TH)),
        "packing": Part(lambda: packs.send("forward dispatch", x_TH), leaving + size(token_S, rows_SH)),
        "staging": Part(stage, 2 * x_TH.nbytes),
        "departures": Part(lambda: departures(ids_TK, case.experts, R), size(ids_TK, *needed)),
        "departures_everywhere": Part(
            lambda: departures_everywhere(ids_TK, case.experts, R, T), size(ids_TK, *everywhere)
        ),
        "choices_message": Part(
            lambda: gathers.send_choices("forward dispatch", ids_TK, scores_TK),
            2 * size(ids_TK, scores_TK) + 2 * size(message_UC),
        ),
    }
    if device.type == "cuda":
        found["begin_and_meet"] = Part(_flags(device), 0)
    return found


def _flags(device: torch.device) -> Call:
    block = torch.zeros(HEAD, dtype=torch.uint8, device=device)
    flags, banks = ExchangeFlags([block], 0, LIMIT_S), itertools.cycle((0, 1))

    def exchange(of: torch.Tensor = block) -> None:  # which has to live as long
        flags.begin(next(banks), 1, 0)
        flags.meet(0, 1, 0)

    return exchange


def current_stream(device: torch.device) -> int | None:
    """What ``copy_bytes`` takes: None for memory of the host."""
    return raw_stream(device.index) if device.type == "cuda" else None


def _copies(parts: Mapping[str, Part], device: torch.device) -> dict[str, Part]:
    """A copy for each number of bytes."""
    sizes = {_copy_of(part.bytes): part.bytes // 2 for part in parts.values() if part.bytes}
    source, to = (torch.zeros(max(sizes.values()), dtype=torch.uint8, device=device) for _ in range(2))
    source.random_(0, 256)
    return {name: Part(partial(to[:size].copy_, source[:size]), 2 * size) for name, size in sizes.items()}


def _copy_of(size: int) -> str:
    return f"copy_{size / 1e6:.3g}MB"


# ---- terminal --------------------------------------------------------------------------------------------------------

COLUMNS = ("us", "gbps", "tflops", "of_copy", "slowdown")
_METRICS = {metric.name: metric for metric in METRICS}


def parts_table(result: CaseResult) -> RenderableType:
    """A row for each part, a column for each of the metrics that any has."""
    if not result.metrics:
        return f"[bold]{result.case}[/bold]"
    table = Table(title=result.case, title_justify="left", title_style="bold", box=None, pad_edge=False)
    columns = [name for name in COLUMNS if any(name in metrics for metrics in result.metrics.values())]
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(_METRICS[name].label, justify="right", no_wrap=True)
    for part, metrics in result.metrics.items():
        cells = [short(metrics[name] / _METRICS[name].shown_in) if name in metrics else "-" for name in columns]
        table.add_row(part, *cells)
    return table
