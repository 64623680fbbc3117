"""What tests of ``MegaMoE`` run, on one rank and on several. Every rank knows the tokens of all of them.

The expectation is exact: an output is the sum, in order of ranks and rounded once, of what the operator gives for the
experts of one rank alone. On a GPU this needs sizes at which both stream rows, or both take tiles.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ranks
import torch
import torch.distributed as dist
from few_rows_in_torch import FewRowsInTorch
from inference_oracle import Case, make_case
from parallel_cases import error_of, timed_error_of
from torch import Tensor
from virtual_cases import way_of
from virtual_ranks import CarefulFlags, ThreadFlags, on_a_gpu, run_virtual, times_on

from supersonic_moe.inference import moe_fp8_topk
from supersonic_moe.jit.launch import kernel_of
from supersonic_moe.kernels.sm90 import rank_tokens
from supersonic_moe.parallel import MegaMoE, mega_deep_gemm
from supersonic_moe.parallel import mega as parallel_mega
from supersonic_moe.parallel.few_rows import FewRows

E, K, H, I, MOST = 8, 3, 256, 128, 400  # noqa: E741


def case_of(tokens: int, kind: str = "contest", masked: float = 0.0, seed: int = 0, **sizes: Any) -> Case:
    """Tokens whose choices have no expert with probability ``masked``."""
    sizes = {"hidden": H, "inter": I, "local": E, "num_experts": E, "choices": K} | sizes
    case = make_case(kind, tokens=tokens, order="gate_up", seed=seed, **sizes)
    g = torch.Generator().manual_seed(seed + tokens)
    nowhere = torch.rand(case.ids.shape, generator=g) < masked
    no_expert = torch.tensor([-1, sizes["num_experts"], 2**31 - 1, -7], dtype=torch.int32)[: sizes["choices"]]
    case.ids = torch.where(nowhere, no_expert, case.ids)
    return case


def on_gpu(case: Case) -> Case:
    for name, value in vars(case).items():
        if isinstance(value, Tensor):
            setattr(case, name, value.cuda())
    return case


def mega(group: Any = None, **changes: Any) -> MegaMoE:
    sizes = {"num_experts": E, "hidden": H, "intermediate": I, "top_k": K, "max_tokens_per_rank": MOST}
    return MegaMoE(group, **(sizes | changes))


def call(layer: MegaMoE, case: Case, rows: slice = slice(None), experts: slice = slice(None), **options: Any) -> Tensor:
    weights = (case.w13[experts], case.w2[experts], case.w13_scale[experts], case.w2_scale[experts])
    given = {"gate_up_order": case.order} | options
    if "x_scale" not in given:
        given["x_scale"] = case.x_scale[rows]
    return layer(given.pop("x", case.x[rows]), *weights, case.weights[rows], case.ids[rows], **given)


def calc_diff(got: Tensor, want: Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>); 0 where both are zero."""
    x, y = got.double().cpu(), want.double().cpu()
    size = float((x * x + y * y).sum())
    return 1 - 2 * float((x * y).sum()) / size if size else 0.0


def worst_row(got: Tensor, want: Tensor) -> float:
    """The largest relative error of a row; a row that should be zero and is not counts as infinite."""
    off, size = (got.double() - want.double()).norm(dim=1), want.double().norm(dim=1)
    errors = torch.where(off == 0, 0.0, off / size)
    return float(errors.max()) if len(errors) else 0.0


# ---- several ranks ---------------------------------------------------------------------------------------------------


def parts(case: Case, size: int, **options: Any) -> Tensor:
    """(T, H) of one process: what each rank's experts give, summed in order of ranks and rounded once."""
    here, total = E // size, torch.zeros(case.x.shape, device=case.x.device)
    for first in range(0, E, here):
        own = slice(first, first + here)
        total += moe_fp8_topk(
            case.x, case.w13[own], case.w2[own], case.w13_scale[own], case.w2_scale[own], case.weights, case.ids,
            x_scale=case.x_scale, local_expert_offset=first, num_experts=E, gate_up_order=case.order, **options,
        ).float()  # fmt: skip
    return total.bfloat16()


Call = tuple[tuple[int, ...], float, float | None]
"""Tokens of each rank, share of masked choices, clamp."""


def same_as_one_process(
    calls: Sequence[Call], transport: str, most: int = MOST, direct: bool = False, times: int = 1
) -> list[str]:
    """Where the outputs or counts of this rank differ. Two instances take turns; e4m3 and bf16 do. ``times``: the same
    again, launch by launch, when all that it needs is loaded.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    sizes = {"transport": transport, "max_tokens_per_rank": most, "direct": direct, "timeout_s": 60.0}
    layers = [mega(dist.group.WORLD, **sizes) for _ in range(2)]
    own, wrong = slice(rank * E // size, (rank + 1) * E // size), []
    for number, (tokens, masked, limit) in times * [*enumerate(calls)]:
        case = case_of(sum(tokens), masked=masked, seed=number)
        if ranks.device().type == "cuda":
            case = on_gpu(case)
        first = sum(tokens[:rank])
        rows = slice(first, first + tokens[rank])
        received = torch.full((E // size,), 5, dtype=torch.int32, device=case.x.device)
        out = torch.full((tokens[rank], H), 7.0, device=case.x.device).bfloat16()
        options: dict[str, Any] = {"swiglu_limit": limit, "pow2_scales": number % 3 == 1}
        if number % 3 == 2:
            x = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(number)).bfloat16().to(case.x.device)
            case.x, case.x_scale = x, None
            case.ids = case.ids.long()
        options["x_scale"] = None if case.x_scale is None else case.x_scale[rows]
        want = parts(case, size, swiglu_limit=limit, pow2_scales=options["pow2_scales"])[rows]
        got = call(layers[number % 2], case, rows, own, received_rows=received, out=out, **options)
        chosen = torch.bincount(case.ids[(case.ids >= 0) & (case.ids < E)].long().cpu(), minlength=E)[own]
        if got is not out or not torch.equal(got, want):
            wrong.append(f"output of call {number}: {calc_diff(got, want)}")
        if not torch.equal(received.cpu(), 5 + chosen.int()):
            wrong.append(f"counts of call {number}")
        again = call(layers[number % 2], case, rows, own, out=out, accumulate=True, **options)
        if not torch.equal(again, want + want):
            wrong.append(f"accumulated output of call {number}")
    for layer in layers:
        layer.check()
        layer.close()
    return wrong


def over_copies(size: int, calls: Sequence[Call], transport: str, most: int = MOST) -> list[list[str]]:
    """The same of ranks that are threads and reach each other's memory."""
    return run_virtual(size, same_as_one_process, calls, way_of(transport)["transport"], most)


def over_small_copies(
    size: int, calls: Sequence[Call], transport: str, most: int, largest_bank: int
) -> tuple[list[list[str]], list[str]]:
    """``over_copies`` of more rows than a bank holds, and what ``explain`` says."""
    parallel_mega.LARGEST_BANK = largest_bank
    layer = {"max_tokens_per_rank": most, "transport": transport}
    explained = run_virtual(size, lambda: mega(dist.group.WORLD, **layer).explain())
    return over_copies(size, calls, transport, most), explained


def bf16_over_ranks(pow2: bool) -> tuple[bool, str, str]:
    """Whether x in bf16 is quantized at home, to the codes that the operator makes of it; what ``explain`` says, and a
    call after ``close``.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    case = case_of(9 * size)
    x = torch.randn(9 * size, H, generator=torch.Generator().manual_seed(3)).bfloat16()
    rows, own = slice(9 * rank, 9 * rank + 9), slice(rank * E // size, (rank + 1) * E // size)
    layer = mega(dist.group.WORLD, timeout_s=60.0)
    given = {"x": x[rows], "x_scale": None, "pow2_scales": pow2}
    got = call(layer, case, rows, own, **given)
    said = layer.explain()
    layer.close()
    closed = error_of(lambda: call(layer, case, rows, own, **given))
    case.x, case.x_scale = x, None
    return torch.equal(got, parts(case, size, pow2_scales=pow2)[rows]), said, closed


# ---- few rows: nothing is copied -------------------------------------------------------------------------------------


def few_tokens(size: int) -> int:
    """Tokens of a rank up to which all rows are streamed."""
    return 128 * E // (size * size * K)


def without_copies(size: int, gpu: bool, calls: Sequence[Call]) -> list[list[str]]:
    """``over_copies`` with direct objects, of as many tokens as these may have."""
    _start(size, gpu, careful=len(calls) + 1)  # two launches a call that wait, of two objects that take turns
    return run_virtual(size, same_as_one_process, calls, "gather", few_tokens(size), True, times_on(gpu))


def random_launches(size: int, gpu: bool, count: int) -> list[list[int]]:
    """Any tokens of each rank in each launch: those whose outputs are not the bits of one process."""
    _start(size, gpu, careful=8)
    return run_virtual(size, _random_launches, count)


def _random_launches(count: int) -> list[int]:
    rank, size, draw = dist.get_rank(), dist.get_world_size(), random.Random(0)
    most, own = few_tokens(size), slice(rank * E // size, (rank + 1) * E // size)
    case = case_of(most * size, masked=0.3)
    case = on_gpu(case) if ranks.device().type == "cuda" else case
    layer = mega(dist.group.WORLD, max_tokens_per_rank=most, direct=True, timeout_s=30.0)
    assert layer._ranks is not None and layer._ranks.few is not None
    out, launched = torch.zeros(count, most, H, device=case.x.device).bfloat16(), []
    for number in range(count):
        firsts = [r * most + draw.randrange(most) for r in range(size)]
        launched.append([slice(first, draw.randint(first, (r + 1) * most)) for r, first in enumerate(firsts)])
        mine = launched[-1][rank]
        call(layer, case, mine, own, out=out[number, : mine.stop - mine.start])
    layer.check()
    layer.close()
    wrong = []
    for number, rows in enumerate(launched):
        given = {name: getattr(case, name) for name in ("x", "x_scale", "ids", "weights")}
        taken = {name: torch.cat([t.view(torch.uint8)[r].view(t.dtype) for r in rows]) for name, t in given.items()}
        want = parts(replace(case, **taken), size)
        before = sum(r.stop - r.start for r in rows[:rank])
        length = rows[rank].stop - rows[rank].start
        if not torch.equal(out[number, :length], want[before : before + length]):
            wrong.append(number)
    return wrong


def explanations(size: int) -> list[tuple[str, str, str]]:
    """With 8192 tokens of the largest published shape, with 64, and with 64 directly."""
    sizes = {"num_experts": 48 * size, "hidden": 7168, "intermediate": 3072, "top_k": 6}

    def of_rank() -> tuple[str, ...]:
        ways = ((8192, False), (64, False), (64, True))
        layers = [mega(dist.group.WORLD, **sizes, max_tokens_per_rank=most, direct=direct) for most, direct in ways]
        return tuple(layer.explain() for layer in layers)

    return run_virtual(size, of_rank)


def with_a_late_rank(size: int, gpu: bool, phase: str, limit_s: float) -> list[str]:
    """Rank 1 is late for a phase of the third call, until others have given up: what each rank raises."""
    _start(size, gpu, careful=2)  # two launches that wait in each of two calls
    return run_virtual(size, _late, phase, limit_s)


def _late(phase: str, limit_s: float) -> str:
    rank, size = dist.get_rank(), dist.get_world_size()
    own = E // size
    layer = mega(dist.group.WORLD, max_tokens_per_rank=few_tokens(size), direct=True, timeout_s=limit_s)
    assert layer._ranks is not None and layer._ranks.few is not None
    case = case_of(3, seed=rank)
    case = on_gpu(case) if ranks.device().type == "cuda" else case
    experts = slice(rank * own, (rank + 1) * own)
    for _ in range(2):
        call(layer, case, experts=experts)
    # without a check(), which waits for the whole GPU, so for a rank that waits in the third call for this one
    if rank == 1:
        _before[phase] = lambda: ranks.stay(True, 2.5 * limit_s)

    def third() -> None:
        call(layer, case, experts=experts)
        layer.check()

    told = timed_error_of(third)
    if rank != 1:
        ranks.stay(False)
    return told


_before: dict[str, Callable[[], None]] = {}
"""What rank 1 does once before a phase of few rows."""


def _start(size: int, gpu: bool, careful: int) -> None:
    """Where a test makes rank 1 late. On a GPU, ranks share its multiprocessors: a kernel that waits must leave some to
    those that it waits for.
    """
    run, tell, posts, sums = FewRows.run, ThreadFlags.tell, rank_tokens.post_tokens, rank_tokens.sum_parts

    def late(phase: str) -> None:
        if dist.get_rank() == 1 and phase in _before:
            _before.pop(phase)()

    def run_late(self: FewRows, *args: Any, **options: Any) -> None:
        late("forward dispatch")
        run(self, *args, **options)

    def tell_late(self: ThreadFlags, left: int) -> None:
        if left == 0:
            late("forward combine")
        tell(self, left)

    def post(tokens: Any, *args: Any, **options: Any) -> Any:
        launch = posts(tokens, *args, **options)
        return SimpleNamespace(run=lambda: tokens.flags.around(launch.run))

    def sum_late(tokens: Any, *args: Any, **options: Any) -> Any:
        launch = sums(tokens, *args, **options)

        def run() -> None:  # all launches of a call have been made before the first one runs
            late("forward combine")
            tokens.flags.around(launch.run)

        return SimpleNamespace(run=run)

    FewRows.run, ThreadFlags.tell = run_late, tell_late  # type: ignore[method-assign]
    rank_tokens.post_tokens, rank_tokens.sum_parts = post, sum_late
    if not gpu:
        parallel_mega.FewRows = FewRowsInTorch  # type: ignore[misc]
    else:
        from supersonic_moe.inference import sm90
        from supersonic_moe.kernels.sm90 import stream_experts

        on_a_gpu()
        sm90.streams = lambda *sizes: True  # one process too, so that bits compare: tiles round otherwise
        CarefulFlags.CAREFUL = careful
        share = torch.cuda.get_device_properties(0).multi_processor_count // (size + 1)
        stream_experts.multiprocessors = rank_tokens.multiprocessors = lambda device: share
        _load_what_waits()


def _load_what_waits() -> None:
    """The kernels that wait for other ranks, before there are ranks: loading may wait for the whole GPU, and so for a
    rank that waits for the one that loads. ``cuFuncLoad``, because the driver would else do a part at the first launch.
    """
    from supersonic_moe.jit.driver import binding, call
    from supersonic_moe.kernels.sm90 import stream_experts

    for spec in (*rank_tokens.SPECS, stream_experts.SPECS[True]):
        kernel = kernel_of(spec)
        kernel.new_slots(0)
        function = call(f"finding {spec} in the context", binding().cuKernelGetFunction, kernel._handle)
        call(f"loading {spec}", binding().cuFuncLoad, function)


def mistakes(transport: str) -> tuple[list[str], list[str], str]:
    """Mistakes of all ranks in one call, which harm nothing; then rank 1 has another limit, or asks for another way,
    then too many tokens. What this rank is told.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    changes: list[dict[str, Any]] = [
        {"max_tokens_per_rank": 4 + rank},
        {"intermediate": I * (1 + rank)},
        {"max_tokens_per_rank": 4, "direct": rank == 1},
        {"max_tokens_per_rank": 1 + few_tokens(size), "direct": True},
    ]
    refused = [error_of(lambda change=change: mega(dist.group.WORLD, **change)) for change in changes]
    layer = mega(dist.group.WORLD, transport=transport, max_tokens_per_rank=4, timeout_s=3.0)
    own, case = slice(rank * E // size, (rank + 1) * E // size), case_of(3)
    wrong: list[dict[str, Any]] = [
        {"swiglu_limit": -1.0}, {"x_scale": None}, {"pow2_scales": 1}, {"out": case.x.bfloat16()[:2]}, {"experts": own}
    ]  # fmt: skip
    common = [error_of(lambda options=options: call(layer, case, **{"experts": own, **options})) for options in wrong]
    error = error_of(lambda: call(layer, case_of(5 if rank else 2), experts=own))
    if transport == "gather":
        ranks.stay(rank == 1)  # until the other, who waits, has asked what is wrong
    return common, refused, error


def refused_by_one(how: str) -> str:
    """What the other rank hears, and this one says, where rank 1 alone makes a mistake."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own, case = slice(rank * E // size, (rank + 1) * E // size), case_of(3)
    if how == "deep_gemm":
        buffer = mega_deep_gemm.get_symm_buffer_for_mega_moe(dist.group.WORLD, E, 8, K, H, I)
        pairs = (case.w13[own], case.w13_scale[own]), (case.w2[own], case.w2_scale[own])
        weights, y = mega_deep_gemm.transform_weights_for_mega_moe(*pairs), torch.zeros(3, H).bfloat16()
        error = error_of(lambda: mega_deep_gemm.fp8_mega_moe(y.float() if rank else y, *weights, buffer))
    else:
        layer = mega(dist.group.WORLD, max_tokens_per_rank=4, timeout_s=20.0)
        error = error_of(lambda: call(layer, case, experts=own, accumulate=bool(rank)))
    ranks.stay(rank == 1)  # until the other, who waits, has asked what is wrong
    return error


def in_a_graph(most: int, direct: bool) -> list[str]:
    """A captured call of this rank, replayed with other contents, against the call itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = slice(rank * E // size, (rank + 1) * E // size)
    layer = mega(dist.group.WORLD, max_tokens_per_rank=most, direct=direct)
    case = on_gpu(case_of(33, seed=rank))
    call(layer, case, experts=own)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(layer, case, experts=own)
    wrong = []
    for seed in range(3):
        other = on_gpu(case_of(33, masked=0.3, seed=10 * seed + rank))
        for name in ("x", "x_scale", "ids", "weights"):
            getattr(case, name).copy_(getattr(other, name))
        out.fill_(float("nan"))
        graph.replay()
        if not torch.equal(out, call(layer, case, experts=own)):
            wrong.append(f"replay {seed}")
    layer.check()
    layer.close()
    return wrong
