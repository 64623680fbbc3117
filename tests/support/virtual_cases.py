"""What virtual ranks run: the cases of ``parallel_cases`` over copies, and ranks that are muted, late or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import parallel_cases as cases
import ranks
import torch
import torch.distributed as dist
from virtual_ranks import CarefulFlags, on_a_gpu, run_virtual, times_on

from supersonic_moe import Fp8Recipe
from supersonic_moe.bench.ep_timeline import Timeline, timeline
from supersonic_moe.bench.spans import Marks
from supersonic_moe.parallel import ranges
from supersonic_moe.parallel.beside import Way
from supersonic_moe.parallel.copies import Copies
from supersonic_moe.training import bf16
from supersonic_moe.training.arguments import Bf16Saved

GATHER = {"transport": "gather", "timeout_s": 30.0}


def way_of(transport: str) -> dict[str, Any]:
    """``"push"``: with NaN in all memory that nobody has written, as rows are that did not travel."""
    if transport == "push":
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
    return GATHER | {"transport": transport}


def same_as_one_process(size: int, gpus: int, calls: Sequence[tuple], transport: str = "gather") -> list[list[str]]:
    _start(gpus, careful=6 * len(calls) + 1)  # by then all have computed what they expect
    return run_virtual(size, cases.same_as_one_process, times_on(gpus) * [*calls], way_of(transport))


def fp8_wire(
    size: int, gpu: bool, tokens: Sequence[int], recipe: Fp8Recipe, hidden: int, transport: str = "gather"
) -> list[list[str]]:
    found = []
    for careful in (10**6, 0)[: times_on(gpu)]:
        _start(gpu, careful)
        found += run_virtual(size, cases.over_an_fp8_wire, tokens, recipe, True, hidden, way_of(transport))
    return found


def in_parts(size: int, gpu: bool, tokens: Sequence[int], hidden: int) -> list[list[str]]:
    """``fp8_wire``, with rows that travel beside products however few there are."""
    with _beside() as ways:
        found = fp8_wire(size, gpu, tokens, Fp8Recipe(scale="pow2"), hidden)
    assert ways == {(rank, phase) for rank in range(size) for phase in ("forward dispatch", "backward dispatch")}, ways
    return found


def exact_in_parts(size: int, gpu: bool, calls: Sequence[tuple]) -> list[list[str]]:
    """``same_as_one_process`` likewise."""
    with _beside() as ways:
        found = same_as_one_process(size, gpu, calls)
    assert ways == {(rank, phase) for rank in range(size) for phase in ("forward dispatch", "backward dispatch")}, ways
    return found


def dense_experts(size: int) -> list[bool]:
    return run_virtual(size, cases.with_a_product_of_all_rows, (9, 0, 5, 1), way_of("push"))


def exact_ends(size: int) -> list[list[str]]:
    """What becomes of gradients of rows that travel beside products."""
    with _beside() as ways:
        found = run_virtual(size, cases.ends_over_an_exact_wire, GATHER)
    assert (0, "backward dispatch") in ways, ways
    return found


def exact_scores(size: int, gpu: bool) -> tuple[list[list[str]], set[torch.dtype]]:
    """What other bits scores in fp64 give rows that travel beside products; and in which dtypes backward reads them:
    plain torch converts what a CUDA kernel would take for fp32.
    """
    _start(gpu, careful=10**6)
    backward, read = bf16.backward, set[torch.dtype]()

    def noted(k: Any, saved: Bf16Saved, *rest: Any) -> Any:
        read.add(saved.row_scores.dtype)
        return backward(k, saved, *rest)

    bf16.backward = noted
    with _beside():
        return run_virtual(size, cases.scores_in_fp64, GATHER), read


@contextmanager
def _beside() -> Iterator[set[tuple[int, str]]]:
    """However few rows there are: (rank, phase) of those that came beside a product."""
    least, arrive, ways = ranges.LEAST_ROWS, Way.arrive, set[tuple[int, str]]()

    def noted(way: Way, rows: torch.Tensor, phase: str) -> Any:
        ways.add((dist.get_rank(), phase))
        return arrive(way, rows, phase)

    ranges.LEAST_ROWS, Way.arrive = 0, noted
    try:
        yield ways
    finally:
        ranges.LEAST_ROWS, Way.arrive = least, arrive


def random_calls(size: int, gpus: int, count: int, transport: str = "gather") -> bool:
    """Twice, with other delays: the same bits."""
    results = []
    for careful in (10**6, 0):
        _start(gpus, careful)
        results.append(run_virtual(size, cases.calls_in_pairs, count, way_of(transport)))
        for gpu in range(gpus):
            torch.cuda.synchronize(gpu)
    return all(cases.same_bits(one, other) for one, other in zip(*results, strict=True))


def timelines(size: int, in_parts: bool, transport: str = "gather") -> list[Timeline]:
    """Of a forward and backward on each rank. ``in_parts``: with rows that travel beside products."""

    def of_rank() -> Timeline:
        ep, given = _after_one_call(30.0, transport)
        return timeline(lambda: cases.run(ep, given), Marks(), ep.ranks)

    with _beside() if in_parts else nullcontext():
        return run_virtual(size, of_rank)


def explanations(size: int, transport: str = "auto") -> list[str]:
    return run_virtual(size, lambda: cases.make(transport=transport).explain())


def _after_one_call(limit_s: float, transport: str = "gather") -> tuple[Any, Any]:
    """Experts of ranks with 5 tokens each, and what this one brings: one call is done."""
    tokens = [5] * dist.get_world_size()
    ep = cases.make(**way_of(transport) | {"timeout_s": limit_s})
    given = cases.here(cases.inputs(tokens, torch.bfloat16), tokens)
    cases.run(ep, given)
    return ep, given


def with_a_muted_rank(size: int, gpu: bool, phase: str, limit_s: float, transport: str = "gather") -> list[str]:
    """Rank 1 is late for a phase of the second call, until others have given up: what each rank raises."""
    _start(gpu, careful=6)
    return run_virtual(size, _muted, phase, limit_s, transport)


def _muted(phase: str, limit_s: float, transport: str) -> str:
    rank, (ep, given) = dist.get_rank(), _after_one_call(limit_s, transport)
    if rank == 1:
        _before(ep._channel.ranks, phase, lambda: ranks.stay(True, 2.5 * limit_s))

    def call() -> None:
        cases.run(ep, given)
        ep.check()

    told = cases.timed_error_of(call)
    if rank != 1:
        ranks.stay(False)
    return told


def with_a_rank_elsewhere(size: int, gpu: bool) -> list[str]:
    """Rank 1 runs no backward, and goes on to the next forward."""
    _start(gpu, careful=9)
    return run_virtual(size, _elsewhere)


def _elsewhere() -> str:
    ep, given = _after_one_call(5.0)

    @torch.no_grad()
    def forward() -> None:
        ep.experts(given.x, given.ids, given.scores, given.w1, given.w2)

    forward()

    def call() -> None:
        if dist.get_rank() == 1:
            forward()
            forward()
        else:
            cases.run(ep, given)
        ep.check()

    return cases.error_of(call)


def with_a_rank_out_of_memory(size: int, gpu: bool, limit_s: float) -> list[str]:
    """Rank 1 fails between dispatch and combine, for a reason of its own; nobody waits for the limit."""
    _start(gpu, careful=6)
    return run_virtual(size, _out_of_memory, limit_s)


def _out_of_memory(limit_s: float) -> str:
    rank, (ep, given) = dist.get_rank(), _after_one_call(limit_s)
    if rank == 1:
        _before(ep._channel.ranks, "forward combine", _no_memory)

    def call() -> None:
        cases.run(ep, given)
        ep.check()

    told = cases.timed_error_of(call)
    ranks.stay(rank == 1, 0.3 * limit_s)
    return told


def with_a_rank_that_refuses(size: int, gpu: bool, limit_s: float) -> list[str]:
    """All ranks refuse the second call, which ends nothing, and rank 1 alone the third one."""
    _start(gpu, careful=6)
    return run_virtual(size, _refused, limit_s)


def _refused(limit_s: float) -> str:
    rank, (ep, given) = dist.get_rank(), _after_one_call(limit_s)
    wrong = given._replace(w1=given.w1[:, :, 1:])
    assert "w1 must have hidden size" in cases.error_of(lambda: cases.run(ep, wrong))

    def call() -> None:
        cases.run(ep, wrong if rank == 1 else given)
        ep.check()

    told = cases.timed_error_of(call)
    ranks.stay(rank == 1, 0.3 * limit_s)
    return told


def with_a_rank_that_goes_on(size: int, gpu: bool, limit_s: float) -> list[str]:
    """Rank 1 alone refuses the second call, and goes on to the third."""
    _start(gpu, careful=6)
    return run_virtual(size, _goes_on, limit_s)


def _goes_on(limit_s: float) -> str:
    rank, (ep, given) = dist.get_rank(), _after_one_call(limit_s)
    if rank == 1:
        wrong = given._replace(w1=given.w1[:, :, 1:])
        assert "w1 must have hidden size" in cases.error_of(lambda: cases.run(ep, wrong))

    def call() -> None:
        for _ in range(2 - rank):
            cases.run(ep, given)
        ep.check()

    told = cases.timed_error_of(call)
    ranks.stay(rank == 1, 0.3 * limit_s)
    return told


def in_two_channels(size: int, gpu: bool, count: int) -> bool:
    """Two calls at a time, each on a stream of its own, against the same calls one after the other."""
    results = []
    for channels, careful in ((1, 10**6), (2, 10**6), (2, 0)):
        _start(gpu, careful)
        results.append(run_virtual(size, cases.calls_in_pairs, count, GATHER | {"channels": channels}))
        if gpu:
            torch.cuda.synchronize()
    one, *two = results
    return all(cases.same_bits(a, b) for other in two for a, b in zip(one, other, strict=True))


def _no_memory() -> None:
    raise torch.OutOfMemoryError("no memory for the experts of this rank")


def _before(copies: Any, phase: str, action: Any) -> None:
    """Do ``action`` once, before this rank enters that phase."""
    assert isinstance(copies, Copies)
    original = {name: getattr(copies, name) for name in ("gather", "exchange", "gather_in_parts", "departure")}

    def at(name: str) -> Any:
        def called(*args: Any) -> Any:
            if phase in args:
                for each in original:
                    delattr(copies, each)
                action()
            return original[name](*args)

        return called

    for name in original:
        setattr(copies, name, at(name))


def _start(gpus: int, careful: int) -> None:
    if gpus:
        on_a_gpu(gpus)
        CarefulFlags.CAREFUL = careful
        for index in range(gpus):
            gpu = torch.device("cuda", index)
            with ranks.on(gpu), torch.cuda.device(gpu):
                cases.one_process(cases.inputs((64, 5), torch.bfloat16, bias=True), 2)  # compiles, in one thread
