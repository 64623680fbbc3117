"""What the ranks of tests/parallel run. Every rank knows the inputs of all of them, so each can compute alone what one
process with all tokens and all experts would.

The expectation is exact: an output is the sum, in order of ranks and rounded once, of what the layer gives when only
the experts of one rank take part.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ranks
import torch
import torch.distributed as dist
from oracle import rel_fro
from parallel_places import Places
from torch import Tensor

from supersonic_moe import Bf16Recipe, Fp8Recipe, topk_experts
from supersonic_moe.parallel import ExpertParallel
from supersonic_moe.parallel.watch import Watch

E, K, H, I = 8, 3, 32, 32  # noqa: E741  # rows of 64 bytes or more: the bits of a BLAS depend on where they start


class Inputs(NamedTuple):
    """Of all ranks together."""

    x: Tensor
    ids: Tensor
    scores: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    dout: Tensor


def inputs(tokens: Sequence[int], dtype: torch.dtype, routing: str = "random", *, bias: bool = False) -> Inputs:
    g = torch.Generator().manual_seed(sum(t * 7**i for i, t in enumerate(tokens)))
    total = sum(tokens)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    ids = torch.rand(total, E, generator=g).argsort(1)[:, :K]
    if routing == "skewed":  # three quarters of all choices to expert 5
        ids = torch.where(torch.rand(total, 1, generator=g) < 0.75, (ids[:, :1] * 0 + torch.tensor([5, -1, -1])), ids)
    elif routing == "one rank":
        ids = ids % 2
        ids[:, 1:] = -1
    elif routing == "masked":
        ids = torch.where(torch.rand(total, K, generator=g) < 0.6, torch.tensor([-1, E, 2**40])[:K], ids)
    elif routing == "nobody":
        ids = torch.full_like(ids, -1)
    scores = torch.rand(total, K, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    w1, w2 = normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
    biases = (normal(E, 2 * I), normal(E, H)) if bias else (None, None)
    return on_device(Inputs(normal(total, H), ids, scores, w1, biases[0], w2, biases[1], normal(total, H)))


def on_device(given: Inputs) -> Inputs:
    """Drawn on the CPU, so that they are the same everywhere."""
    return Inputs(*(None if t is None else t.to(ranks.device()) for t in given))  # type: ignore[arg-type]


class Results(NamedTuple):
    out: Tensor
    dx: Tensor
    dscores: Tensor
    dw1: Tensor
    dw2: Tensor
    db1: Tensor | None
    db2: Tensor | None


def leaf(t: Tensor | None) -> Any:
    return None if t is None else t.detach().clone().requires_grad_()


def one_process(given: Inputs, size: int, **options: Any) -> Results:
    """Outputs and dx as sums over ranks, everything else of the whole layer."""
    x, scores, w1, b1, w2, b2 = map(leaf, given[:1] + given[2:7])
    here = E // size
    accumulate = torch.promote_types(given.x.dtype, torch.float32)
    parts, dxs = [], []
    for first in range(0, E, here):
        mine = (given.ids >= first) & (given.ids < first + here)
        ids = torch.where(mine, given.ids, -1)
        xr = leaf(given.x)
        part = topk_experts(xr, ids, scores.detach(), w1.detach(), w2.detach(), b1=b1, b2=b2, **options)
        part.backward(given.dout)
        parts.append(part.detach().to(accumulate))
        dxs.append(xr.grad.to(accumulate))
    for b in (b1, b2):
        if b is not None:
            b.grad = None
    whole = topk_experts(x, given.ids, scores, w1, w2, b1=b1, b2=b2, **options)
    whole.backward(given.dout)
    out, dx = map(_in_order, (parts, dxs))
    dtype = given.x.dtype
    grads = [None if t is None else t.grad for t in (b1, b2)]
    results = Results(out.to(dtype), dx.to(dtype), scores.grad, w1.grad, w2.grad, *grads)
    if dtype is torch.float64:
        torch.testing.assert_close(results.out, whole.detach())
        torch.testing.assert_close(results.dx, x.grad)
    return results


def _in_order(parts: list[Tensor]) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def here(given: Inputs, tokens: Sequence[int]) -> Inputs:
    """The share of this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    first, experts = sum(tokens[:rank]), E // size
    rows, own = slice(first, first + tokens[rank]), slice(rank * experts, (rank + 1) * experts)
    x, ids, scores, *weights, dout = given
    w1, b1, w2, b2 = (None if w is None else w[own] for w in weights)
    return Inputs(x[rows], ids[rows], scores[rows], w1, b1, w2, b2, dout[rows])  # type: ignore[arg-type]


def run(ep: ExpertParallel, given: Inputs, **options: Any) -> Results:
    x, scores, w1, b1, w2, b2 = map(leaf, given[:1] + given[2:7])
    out = ep.experts(x, given.ids, scores, w1, w2, b1=b1, b2=b2, **options)
    out.backward(given.dout)
    grads = [None if t is None else t.grad for t in (b1, b2)]
    return Results(out.detach(), x.grad, scores.grad, w1.grad, w2.grad, *grads)


def make(**changes: Any) -> ExpertParallel:
    arguments = {"num_experts": E, "top_k": K, "hidden": H, "max_tokens": 512, "timeout_s": 60.0} | changes
    return ExpertParallel(dist.group.WORLD, **arguments)


def differences(case: Any, got: Results, want: Results, tokens: Sequence[int]) -> list[str]:
    """Where the share of this rank has other bits."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    own = slice(rank * (E // size), (rank + 1) * (E // size))
    found = []
    for name, g, w in zip(Results._fields, got, want, strict=True):
        if w is None:
            continue
        w = w[own if name.startswith(("dw", "db")) else rows]
        if g.dtype is not w.dtype or not torch.equal(g, w):
            worst = float((g.double() - w.double()).abs().max()) if g.shape == w.shape else (g.shape, w.shape)
            found.append(f"{case}: {name} of rank {rank} differs by {worst}")
    return found


def same_as_one_process(cases: Sequence[tuple[Any, ...]], changes: dict[str, Any] | None = None) -> list[str]:
    """Each case is (tokens by rank, dtype, routing, whether there are biases)."""
    ep = make(**changes or {})
    found = []
    for tokens, dtype, routing, bias in cases:
        given = inputs(tokens, dtype, routing, bias=bias)
        got = run(ep, here(given, tokens))
        found += differences((tokens, dtype, routing), got, one_process(given, dist.get_world_size()), tokens)
    ep.close()
    return found


def same_with(options: dict[str, Any], tokens: Sequence[int]) -> list[str]:
    """The same of one call in bfloat16 with other ``options`` of the experts."""
    ep, given = make(), inputs(tokens, torch.bfloat16, bias=True)
    got = run(ep, here(given, tokens), **options)
    ep.close()
    want = one_process(given, dist.get_world_size(), **options)
    return differences((tokens, options), got, want, tokens)


def random_calls(count: int, way: dict[str, Any], delays: int) -> list[Results]:
    """``calls_in_pairs`` with a random rest before each phase."""
    enter = Watch.enter
    rest = random.Random(1000 * delays + dist.get_rank())

    def delayed(watch: Watch, call: int, phase: str) -> None:
        time.sleep(rest.random() * 0.003)
        enter(watch, call, phase)

    Watch.enter = delayed  # type: ignore[method-assign]
    found = calls_in_pairs(count, way)
    Watch.enter = enter  # type: ignore[method-assign]
    return found


def calls_in_pairs(count: int, way: dict[str, Any]) -> list[Results]:
    """Calls of any sizes and routing, two at a time with both forwards first; through two channels, where there are
    so many, and on a GPU then on a stream each.
    """
    size, calls = dist.get_world_size(), random.Random(1)
    ep, found = make(**way), []
    places = Places(ep)
    for _ in range(count // 2):
        pair = []
        for number in range(2):
            tokens = [calls.choice((0, 1, 2, 17, calls.randrange(64))) for _ in range(size)]
            given = here(inputs(tokens, torch.bfloat16, calls.choice(("random", "skewed", "masked", "nobody"))), tokens)
            x, scores, w1, _, w2, _ = map(leaf, given[:1] + given[2:7])
            with places.of(number):
                pair.append((given, (x, scores, w1, w2), ep.experts(x, given.ids, scores, w1, w2)))
        for number, (given, _, out) in enumerate(pair):
            with places.of(number):
                out.backward(given.dout)
        places.meet()
        found += [Results(out.detach(), *(t.grad for t in leaves), None, None) for _, leaves, out in pair]
    ep.close()
    return found


def same_bits(one: Sequence[Results], other: Sequence[Results]) -> bool:
    """Of calls without biases."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x[:5], y[:5], strict=True))


def repeats_to_the_bit(count: int, way: dict[str, Any]) -> bool:
    first, second = (random_calls(count, way, delays) for delays in (0, 1))
    return len(first) == count and same_bits(first, second)


def over_an_fp8_wire(
    tokens: Sequence[int], recipe: Fp8Recipe, positive: bool, hidden: int, way: dict[str, Any]
) -> list[str]:
    """Against the same layer over an exact wire: the same outputs and dx; weight gradients within their bounds."""
    g = torch.Generator().manual_seed(sum(tokens))

    def normal(*shape: int, scale: float) -> Tensor:
        t = scale * torch.randn(*shape, generator=g)
        return (t.abs() if positive else t).bfloat16()

    total, inner = sum(tokens), 128
    w1, w2 = normal(E, 2 * inner, hidden, scale=hidden**-0.5), normal(E, hidden, inner, scale=inner**-0.5)
    ids = torch.rand(total, E, generator=g).argsort(1)[:, :K]
    scores, x, dout = torch.rand(total, K, generator=g), normal(total, hidden, scale=1), normal(total, hidden, scale=1)
    everything = on_device(Inputs(x, ids, scores, w1, None, w2, None, dout))
    given = here(everything, tokens)
    exact, fp8 = (make(wire=wire, hidden=hidden, max_tokens=700, **way) for wire in ("exact", "fp8"))
    want, got = run(exact, given, recipe=recipe), run(fp8, given, recipe=recipe)
    floats = Inputs(*(t.float() if t is not None and t.is_floating_point() else t for t in everything))
    precise = one_process(floats, dist.get_world_size())
    own = slice(exact.first_expert, exact.first_expert + exact.experts_here)
    found = [f"{n} differs" for n in ("out", "dx", "dscores") if not torch.equal(getattr(got, n), getattr(want, n))]
    for name in ("dw1", "dw2"):
        error, usual = (rel_fro(getattr(r, name), getattr(precise, name)[own]) for r in (got, want))
        if error > 0.08 or (error > 1.01 * usual and recipe.scale == "pow2" and recipe.wgrad == "fp8"):
            found.append(f"{name} of rank {dist.get_rank()} has an error of {error:.4f}, not {usual:.4f}")
    again = run(fp8, given, recipe=recipe)
    found += [
        f"{n} varies" for n, a, b in zip(Results._fields, again, got, strict=True) if b is not None and (a != b).any()
    ]
    with torch.no_grad():
        if not torch.equal(fp8.experts(given.x, given.ids, given.scores, given.w1, given.w2, recipe=recipe), got.out):
            found.append("inference differs")
    return found + _ends_of_backward(fp8, given, got, "do not exist over an FP8 wire", recipe=recipe)


def ends_over_an_exact_wire(way: dict[str, Any]) -> list[str]:
    tokens = [9, 40, 0, 3][: dist.get_world_size()]
    ep, given = make(**way), here(inputs(tokens, torch.bfloat16), tokens)
    return _ends_of_backward(ep, given, run(ep, given), "of the experts do not exist across ranks")


def scores_in_fp64(way: dict[str, Any]) -> list[str]:
    """What differs from the same scores in fp32, in which a layer of bfloat16 reads them."""
    tokens = [9, 40, 0, 3][: dist.get_world_size()]
    ep, given = make(**way), here(inputs(tokens, torch.bfloat16), tokens)
    want, got = run(ep, given), run(ep, given._replace(scores=given.scores.double()))
    got = got._replace(dscores=got.dscores.float())
    return [n for n, a, b in zip(Results._fields[:5], got, want, strict=False) if not torch.equal(a, b)]


def _ends_of_backward(ep: ExpertParallel, given: Inputs, got: Results, refusal: str, **options: Any) -> list[str]:
    """Second derivatives are refused, and weight gradients, those of ``got``, added to ``main_grad``."""
    found = []
    x, w1 = leaf(given.x), leaf(given.w1)
    out = ep.experts(x, given.ids, given.scores, w1, given.w2, **options)
    (dx,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
    if refusal not in error_of(lambda: torch.autograd.grad(dx.float().sum(), w1)):
        found.append("second derivatives are not refused")
    buffers = [w.clone().requires_grad_() for w in (given.w1, given.w2)]
    for buffer in buffers:
        buffer.main_grad = torch.ones_like(buffer, dtype=torch.float32)  # type: ignore[attr-defined]
    out = ep.experts(given.x, given.ids, given.scores, *buffers, **options, accumulate_into_main_grad=True)
    out.backward(given.dout)
    for name, buffer in zip(("dw1", "dw2"), buffers, strict=True):
        if buffer.grad is not None or rel_fro(buffer.main_grad - 1, getattr(got, name)) > 0.01:  # type: ignore[attr-defined]
            found.append(f"{name} in main_grad differs")
    return found


def with_experts_of_ones_own(tokens: Sequence[int]) -> bool:
    """Whether gradients are right where a rank adds the scores to x, so that all of them are expanded numbers.
    Ids lie by choice, then token.
    """
    given, ep = here(inputs(tokens, torch.float64), tokens), make()
    x, scores = leaf(given.x), leaf(given.scores)
    got = ep.dispatch(x, given.ids.t().contiguous().t(), scores)
    ep.combine(got.x + got.scores.sum(1, keepdim=True), got.handle).sum().backward()
    ep.close()
    copies = [len(set(ids)) for ids in (given.ids // ep.experts_here).tolist()]
    return x.grad[:, 0].tolist() == copies and bool((scores.grad == H).all())


def with_a_product_of_all_rows(tokens: Sequence[int], way: dict[str, Any]) -> bool:
    """Whether gradients are finite where a rank multiplies all that arrived, places without a token included."""
    given, ep = here(inputs(tokens, torch.bfloat16, "skewed"), tokens), make(**way)
    x, w = leaf(given.x), leaf(given.w1[0, :H])
    got = ep.dispatch(x, given.ids, given.scores)
    ep.combine(got.x @ w, got.handle).sum().backward()
    ep.close()
    return bool(w.grad.isfinite().all() and x.grad.isfinite().all())


def in_a_graph(way: dict[str, Any]) -> list[str]:
    tokens = [64] * dist.get_world_size()
    sets = [here(inputs(tokens, torch.bfloat16, r), tokens) for r in ("random", "masked", "skewed")]
    return replayed(make(**way), sets)


def replayed(ep: ExpertParallel, sets: Sequence[Inputs], **options: Any) -> list[str]:
    """Forward and backward captured, and replayed with the tokens and routing of each set, against eager calls."""
    x, ids, scores, w1, _, w2, _, dout = (None if t is None else t.clone() for t in sets[0])
    for t in (x, scores, w1, w2):
        t.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = ep.experts(x, ids, scores, w1, w2, **options)
        return out, *torch.autograd.grad(out, (x, scores, w1, w2), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    found = []
    for number, given in enumerate(sets):
        with torch.no_grad():
            for static, value in zip(
                (x, ids, scores, dout), (given.x, given.ids, given.scores, given.dout), strict=True
            ):
                static.copy_(value)
        graph.replay()
        for name, t, eager in zip(("out", "dx", "dscores", "dw1", "dw2"), captured, step(), strict=True):
            if not torch.equal(t, eager):
                found.append(f"{name} of replay {number}")
    ep.check()
    ep.close()
    return found


def warmed_up(path: str, limit_s: float) -> bool:
    """Whether rank 1, which comes later than any wait of a call may last, has come."""
    ep = make(timeout_s=limit_s)
    if ep.rank == 1:
        time.sleep(2 * limit_s)
        open(path, "x").close()
    ep.warm_up()
    ep.close()
    return os.path.exists(path)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def timed_error_of(function: Callable[[], object]) -> str:
    """After how many seconds, and what."""
    start = time.monotonic()
    error = error_of(function)
    return f"{time.monotonic() - start:.1f} s: {error}"


def errors_on_every_rank() -> list[str]:
    """What each mistake of one rank says on this one; the group works afterwards."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = [error_of(lambda: make(max_tokens=512 + rank)), error_of(lambda: make(num_experts=size * 4 + 1))]
    ep = make(max_tokens=8)
    found.append(error_of(lambda: run(ep, here(inputs(t := [5] * (size - 1) + [9], torch.float32), t))))
    given = here(inputs([4] * size, torch.float32), [4] * size)

    def without_gradient_on_one() -> None:
        with torch.set_grad_enabled(rank != 1):
            ep.experts(leaf(given.x), given.ids, given.scores, given.w1, given.w2)

    found.append(error_of(without_gradient_on_one))
    found.append(error_of(lambda: make(transport="gather", capacity=3)))
    small = make(capacity=3)
    t = [0] * (size - 1) + [4]  # all of them to rank 0
    found.append(error_of(lambda: run(small, here(inputs(t, torch.float32, "one rank"), t))))
    wired = make(wire="fp8")
    given = here(inputs([4] * size, torch.bfloat16), [4] * size)
    found += [error_of(lambda r=r: run(wired, given, recipe=r)) for r in (Fp8Recipe(), Bf16Recipe())]
    for still in (ep, small):
        t = [2] * size
        run(still, here(inputs(t, torch.float32, "one rank"), t))
        still.close()
        still.close()
    found.append(error_of(lambda: run(ep, given)))
    return found


def at_phase(call: int, phase: str, action: Callable[[], None]) -> None:
    """Do ``action`` once on this rank, before it enters that phase."""
    enter = Watch.enter

    def entered(watch: Watch, now: int, what: str) -> None:
        if (now, what) == (call, phase):
            Watch.enter = enter  # type: ignore[method-assign]
            action()
        enter(watch, now, what)

    Watch.enter = entered  # type: ignore[method-assign]


def explanation() -> str:
    return make().explain()


def with_a_lost_rank(phase: str, how: str, limit_s: float, way: dict[str, Any] | None = None) -> str:
    """Rank 1 is killed before a phase of the second call, or late for it until others have given up. What ranks raise,
    and after how long.
    """
    if dist.get_rank() == 1:
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        at_phase(2, phase, kill if how == "killed" else functools.partial(ranks.stay, True, 2.5 * limit_s))
    ep, tokens = make(timeout_s=limit_s, **way or {}), [5] * dist.get_world_size()
    given = here(inputs(tokens, torch.bfloat16 if way else torch.float32), tokens)
    run(ep, given)

    def call() -> None:
        run(ep, given)
        ep.check()

    told = timed_error_of(call)
    if dist.get_rank() != 1:
        ranks.stay(False)
    return told


def with_too_many_tokens_to_gather() -> str:
    """Rank 1 finds out alone; the others, who wait for it, are told long before the limit."""
    ep, size = make(transport="gather", max_tokens=8, timeout_s=5), dist.get_world_size()
    tokens = [5] * (size - 1) + [9]
    given = here(inputs(tokens, torch.float32), tokens)
    error = error_of(lambda: run(ep, given))
    ranks.stay(dist.get_rank() == size - 1)
    return error
