"""Token rounding: against the paper's algorithms written out token by token, and the properties they promise."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from host_waits import no_host_waits
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from supersonic_moe.config.router import MODES, SigmoidGroupedTopK, SoftmaxAfterTopK, SoftmaxBeforeTopK, TokenRounding
from supersonic_moe.kernels.reference.token_rounding import mix, uniform
from supersonic_moe.routing.plan import plan_from_sorted_triples, plan_from_triples
from supersonic_moe.routing.token_rounding import token_rounding, token_rounding_capacity
from supersonic_moe.routing.topk import route

BASES = [
    SoftmaxAfterTopK(),
    SoftmaxBeforeTopK(renormalize=True),
    SigmoidGroupedTopK(scaling_factor=2.5),
]
SAMPLED = ("SR-f", "NR-s")
pytestmark = pytest.mark.filterwarnings("ignore:token rounding may leave")  # most problems here are tiny


# ---- the paper, literally --------------------------------------------------------------------------------------------


def paper(logits, k, config, u):
    """Algorithms 4 and 6 with loops; u[e] is the draw of expert e. Returns ({(token, expert): weight}, f, r)."""
    num_tokens, num_experts = logits.shape
    sigmoid = isinstance(config.base, SigmoidGroupedTopK)
    ranking, s, f = np.zeros_like(logits), np.zeros_like(logits), [0] * num_experts
    for t in range(num_tokens):
        e_x = 1 / (1 + np.exp(-logits[t])) if sigmoid else np.exp(logits[t])
        p = e_x if sigmoid else e_x / e_x.sum()
        topk = sorted(range(num_experts), key=lambda e: -logits[t, e])[:k]
        for e in range(num_experts):
            s[t, e] = p[e] / sum(p[i] for i in topk) if e in topk else p[e]
            ranking[t, e] = s[t, e] if e in topk else s[t, e] - 1
        for e in topk:
            f[e] += 1
    m = config.tile
    rounded, kept, z = [], set(), 0
    for e in range(num_experts):
        floor, ceil = f[e] // m * m, math.ceil(f[e] / m) * m
        order = sorted(range(num_tokens), key=lambda t: -ranking[t, e])
        best = [s[t, e] for t in order]
        if config.mode == "UP":
            up = True
        elif config.mode == "DOWN":
            up = False
        elif config.mode == "NR-f":
            up = ceil - f[e] < f[e] - floor
        elif config.mode == "SR-f":
            up = u[e] < (f[e] - floor) / m
        elif config.mode == "NR-s":
            up = ceil > floor and u[e] < sum(best[floor : f[e]]) / sum(best[floor:ceil])
        else:
            up = abs(ceil - f[e] + z) < abs(floor - f[e] + z)
            z += (ceil if up else floor) - f[e]
        rounded.append(min(ceil if up else floor, num_tokens))
        kept |= {(t, e) for t in order[: rounded[-1]]}
    weights = {}
    for t, e in kept:
        mine = [i for i in range(num_experts) if (t, i) in kept]
        value = (lambda v: 1 / (1 + math.exp(-v))) if sigmoid else math.exp
        scale = config.base.scaling_factor if sigmoid else 1.0
        weights[t, e] = scale * value(logits[t, e]) / sum(value(logits[t, i]) for i in mine)
    return weights, f, rounded


@st.composite
def problems(draw, dtype=torch.float64):
    """(logits, k, config). Repeated tokens tie in every column; but not under a sigmoid, whose vector and scalar code
    (the tail of a tensor) differ in the last bit."""
    experts = draw(st.integers(1, 8))
    tokens = draw(st.integers(0, 40))
    k = draw(st.integers(1, experts))
    config = TokenRounding(
        base=draw(st.sampled_from(BASES)),
        mode=draw(st.sampled_from(MODES)),
        tile=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 64])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 2 * torch.randn(tokens, experts, generator=rng, dtype=dtype)
    logits = logits + draw(st.sampled_from([0.0, 2.0])) * torch.arange(experts)  # popular experts
    if not isinstance(config.base, SigmoidGroupedTopK) and draw(st.booleans()):
        logits = logits[torch.randint(2, (tokens,), generator=rng).clamp(max=tokens - 1)]
    return logits, k, config


@settings(deadline=None, max_examples=250)
@given(problem=problems(), step=st.integers(0, 2**40))
def test_matches_the_paper(problem, step):
    logits, k, config = problem
    result = token_rounding(logits, k, config, step=step)
    u = uniform(result.counts, config.seed, step).tolist()
    weights, _, rounded = paper(logits.numpy(), k, config, u)
    assert result.counts.tolist() == rounded
    n = sum(rounded)
    tokens, experts = result.token_indices.tolist(), result.expert_indices.tolist()
    assert list(zip(tokens[:n], experts[:n], strict=True)) == sorted(weights)
    np.testing.assert_allclose(result.scores[:n].tolist(), [weights[pair] for pair in sorted(weights)], rtol=1e-12)
    assert tokens[n:] == [len(logits)] * (len(tokens) - n) and set(experts[n:]) <= {-1}
    assert not result.scores[n:].any()
    assert len(tokens) == token_rounding_capacity(len(logits), k, logits.shape[1], config)


# ---- what rounding promises ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(problem=problems(torch.float32), step=st.integers(0, 2**20))
def test_promises(problem, step):
    logits, k, config = problem
    num_tokens, num_experts = logits.shape
    tile = config.tile
    result = token_rounding(logits, k, config, step=step)
    _, ids = route(logits, k, config.base)
    chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, ids.long(), True)
    f, r = chosen.sum(0), result.counts.long()

    assert (((r % tile == 0) | (r == num_tokens)) & ((r - f).abs() < tile)).all()
    assert config.mode != "UP" or (r >= f).all()
    assert config.mode != "DOWN" or (r <= f).all()
    assert config.mode != "NR-f" or (2 * (r - f).abs() <= tile).all()
    if config.mode == "Balance-f" and (r % tile == 0).all():
        assert 2 * abs(int((r - f).sum())) <= tile

    n = int(r.sum())
    token, expert, score = result.token_indices[:n].long(), result.expert_indices[:n].long(), result.scores[:n]
    kept = torch.zeros_like(chosen).index_put_((token, expert), torch.tensor(True))
    assert int(kept.sum()) == n and torch.equal(kept.sum(0), r)
    # An extra token only where every token that chose the expert was kept.
    extra, dropped = (kept & ~chosen).any(0), (chosen & ~kept).any(0)
    assert not (extra & dropped).any()
    total = torch.zeros(num_tokens).index_add_(0, token, score)
    scale = getattr(config.base, "scaling_factor", 1.0)
    torch.testing.assert_close(total, scale * kept.any(1).float())

    plan = plan_from_triples(result.token_indices, result.expert_indices, num_tokens, num_experts)
    assert torch.equal(plan.expert_counts, result.counts)
    same = plan_from_sorted_triples(*result[:2], result.token_offsets, num_experts)
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(plan).values(), vars(same).values(), strict=True)
    )


def test_capacity_is_reached():
    """The bounds are the best that T, K, E, M and the mode allow: some routing uses every slot."""

    def used(assignment, experts, tile, mode):
        logits = 9.0 * torch.nn.functional.one_hot(torch.tensor(assignment), experts)
        result = token_rounding(logits, 1, TokenRounding(mode=mode, tile=tile))
        return int(result.counts.sum()), len(result.scores)

    assert used([0, 1, 2, 3, 3, 3, 3, 3], 4, 4, "UP") == (20, 20)
    assert used([0] * 3 + [1] * 3 + [2] * 3, 3, 4, "NR-f") == (12, 12)
    assert used([0] * 4 + [1] * 3, 2, 4, "Balance-f") == (8, 8)
    assert used([0] * 4 + [1] * 4, 2, 4, "DOWN") == (8, 8)
    assert used([0, 1, 2], 3, 4, "UP") == (9, 9)  # T E
    assert used([0, 1, 2, 3], 8, 2, "UP") == (8, 8)  # four experts in use


def test_fewer_tokens_than_a_tile():
    logits = torch.randn(5, 4)
    _, ids = route(logits, 2)
    f = torch.bincount(ids.flatten(), minlength=4)
    assert token_rounding(logits, 2, TokenRounding(mode="UP")).counts.tolist() == [5 * bool(n) for n in f]
    down = token_rounding(logits.requires_grad_(), 2, TokenRounding(mode="DOWN"))
    assert not down.counts.any() and (down.expert_indices == -1).all()
    (dlogits,) = torch.autograd.grad(down.scores, logits, torch.full_like(down.scores, math.nan))
    assert not dlogits.any()


def test_ranking_separates_scores_that_fp32_minus_one_would_merge():
    """Extra tokens with probabilities of 1e-10 and 1e-12: computing S - 1 in fp32 gives -1 for both."""
    logits = torch.zeros(4, 2)
    logits[:, 1] = torch.tensor([-27.6, -23.0, -25.0, 3.0])
    result = token_rounding(logits, 1, TokenRounding(mode="UP", tile=2))
    assert [(t, e) for t, e in zip(*(x.tolist() for x in result[:2]), strict=True) if e == 1] == [(1, 1), (3, 1)]


def test_chosen_tokens_come_first_even_at_equal_scores():
    """Expert 0: token 0, kept from it by the group limit, has S - 1 = 0; token 1 chose it with a score of 0 (fp32)."""
    base = SigmoidGroupedTopK(num_groups=2, topk_groups=1)
    logits = torch.tensor([[200.0, -200.0, 1.0, 1.0], [-200.0] * 4])
    assert route(logits, 1, base)[1].tolist() == [[2], [0]]
    result = token_rounding(logits, 1, TokenRounding(base=base, mode="UP", tile=1))
    assert result.token_indices.tolist() == [0, 1] and result.expert_indices.tolist() == [2, 0]


@pytest.mark.parametrize("mode", MODES)
def test_nan_tokens_are_the_first_to_go(mode):
    logits = torch.randn(12, 4)
    logits[:, 0] += 4  # every token's first choice, so expert 0 has 12 = 2 * 5 + 2 tokens
    logits[7, 0] = math.nan
    result = token_rounding(logits, 1, TokenRounding(mode=mode, tile=5))
    n = int(result.counts.sum())
    token = result.token_indices[:n]
    assert (result.expert_indices[:n] >= 0).all() and (token < 12).all()
    assert result.scores[:n][token != 7].isfinite().all()
    if mode == "DOWN":
        assert 7 not in token.tolist() and result.counts.tolist() == [10, 0, 0, 0]


@pytest.mark.parametrize("mode", ["NR-f", "NR-s"])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_gradcheck(base, mode):
    logits = torch.randn(9, 4, dtype=torch.float64)
    logits[:, 0] += 3
    logits.requires_grad_()
    config = TokenRounding(base=base, mode=mode, tile=4)
    kept = token_rounding(logits, 2, config)
    per_token = torch.bincount(kept.token_indices[kept.expert_indices >= 0], minlength=9)
    assert per_token.max() > 2 or per_token.min() < 2  # rounding did change something
    assert torch.autograd.gradcheck(lambda x: token_rounding(x, 2, config).scores, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_compute_in_fp32(dtype):
    low = torch.randn(30, 6).to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    got, want = (token_rounding(x, 2, TokenRounding(tile=4)) for x in (low, full))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    (dlow,), (dfull,) = (torch.autograd.grad(r.scores.square().sum(), x) for r, x in ((got, low), (want, full)))
    assert dlow.dtype == dtype and torch.equal(dlow, dfull.to(dtype))


# ---- the sampled modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SAMPLED)
def test_seed_and_step_decide_the_draw(mode):
    logits = torch.randn(64, 32)

    def counts(seed, step):
        return token_rounding(logits, 4, TokenRounding(mode=mode, tile=8, seed=seed), step=step).counts

    first = counts(3, 5)
    for same in (5, torch.tensor(5), torch.tensor([5], dtype=torch.int32)):
        assert torch.equal(counts(3, same), first)
    assert not torch.equal(counts(4, 5), first) and not torch.equal(counts(3, 6), first)
    assert not torch.equal(counts(5, 3), first)


@pytest.mark.parametrize("mode", SAMPLED)
def test_expected_count(mode):
    """SR-f is unbiased, E[r] = f; NR-s goes up in proportion to the chosen tokens' share of the last tile's scores."""
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config, draws = TokenRounding(mode=mode, tile=8), 1200
    mean = sum(token_rounding(logits, 2, config, step=i).counts.double() for i in range(draws)) / draws
    _, f, down = paper(logits.numpy(), 2, config, [1.0] * 4)
    _, _, up = paper(logits.numpy(), 2, config, [0.0] * 4)
    f, down, up = (torch.tensor(v, dtype=torch.float64) for v in (f, down, up))
    assert ((f % 8 != 0) == (up > down)).all() and (up > down).sum() >= 3
    if mode == "SR-f":
        want = f
    else:
        share = [bisect_probability(logits.numpy(), config, e) for e in range(4)]
        want = down + (up - down) * torch.tensor(share)
        assert ((want - f).abs() > 0.5).any()  # else this would not tell NR-s from SR-f
    sigma = 4 / math.sqrt(draws)  # of a mean of two-point draws 8 apart, at most
    assert ((mean - want).abs() < 5 * sigma).all()


def bisect_probability(logits, config, e):
    """The u at which the paper's rule for expert e flips."""
    low, high = 0.0, 1.0
    floor = paper(logits, 2, config, [1.0] * 4)[2][e]
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if paper(logits, 2, config, [middle] * 4)[2][e] == floor else (middle, high)
    return low


def test_draws_are_uniform_and_unrelated():
    n = 4096
    like = torch.zeros(n)
    base = uniform(like, 0, 0)
    assert (base >= 0).all() and (base < 1).all()
    over_steps = torch.stack([uniform(torch.zeros(4), 7, step) for step in range(1024)]).flatten()
    for u in (base, over_steps):
        cells = torch.histc(u, 16, 0, 1)
        assert ((cells - n / 16).square() / (n / 16)).sum() < 45  # chi-square, 15 degrees of freedom, p < 1e-4
    for other in (uniform(like, 1, 0), uniform(like, 0, 1), base.roll(1)):
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 5 / math.sqrt(n)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20, unique=True))
@example([0, 1, 2**31, 2**32 - 1])
def test_hash_is_the_same_for_ints_and_tensors_and_never_merges_words(words):
    mixed = [mix(w) for w in words]
    assert mix(torch.tensor(words)).tolist() == mixed
    assert len(set(mixed)) == len(words) and all(0 <= m < 2**32 for m in mixed)


@settings(deadline=None, max_examples=40)
@given(problem=problems(torch.float32))
def test_unsampled_modes_do_not_look_at_seed_or_step(problem):
    logits, k, config = problem
    assume(config.mode not in SAMPLED)
    other = TokenRounding(base=config.base, mode=config.mode, tile=config.tile, seed=(config.seed + 1) % 2**32)
    results = token_rounding(logits, k, config), token_rounding(logits, k, other, step=9)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- compilation, capture, arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["NR-s", "Balance-f"])
def test_compiles_without_graph_breaks(mode):
    config, step = TokenRounding(mode=mode, tile=4), torch.tensor(3)
    compiled = torch.compile(
        lambda x, s: token_rounding(x, 2, config, step=s), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens in (12, 17):
        x = torch.randn(tokens, 6, requires_grad=True)
        got, want = compiled(x, step), token_rounding(x, 2, config, step=step)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(*(torch.autograd.grad(r.scores.square().sum(), x)[0] for r in (got, want)))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph_replays_without_synchronising(mode, device):
    config, tokens, experts = TokenRounding(mode=mode, tile=16), 500, 64
    batches = [torch.randn(tokens, experts, device=device) for _ in range(3)]
    logits, step = batches[0].clone().requires_grad_(), torch.zeros((), dtype=torch.int64, device=device)
    g = torch.randn(token_rounding_capacity(tokens, 4, experts, config), device=device)

    def forward_backward():
        result = token_rounding(logits, 4, config, step=step)
        return [*result, *torch.autograd.grad(result.scores, logits, g)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward()
        with no_host_waits():
            forward_backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward()
    for i, batch in enumerate(batches):
        with torch.no_grad():
            logits.copy_(batch)
            step.fill_(i)
        graph.replay()
        replayed = [t.detach().clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, forward_backward(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_gpu_rounds_like_the_cpu(mode, device):
    """Same draws, same counts, same kept pairs. In fp64, where no choice hangs on the last bit of an exp."""
    logits = torch.randn(700, 32, dtype=torch.float64)
    config = TokenRounding(mode=mode, tile=64, seed=11)
    cpu, gpu = (token_rounding(x, 4, config, step=2, backend="reference") for x in (logits, logits.to(device)))
    for name in ("counts", "token_indices", "expert_indices"):
        assert torch.equal(getattr(cpu, name), getattr(gpu, name).cpu()), name
    torch.testing.assert_close(cpu.scores, gpu.scores.cpu(), rtol=1e-12, atol=0)


X = torch.zeros(4, 6)
BAD = [
    (lambda: TokenRounding(mode="nr-f"), ValueError, "unknown token rounding mode 'nr-f'; choose one of NR-f, SR-f"),
    (lambda: TokenRounding(tile=0), ValueError, "tile must be at least 1"),
    (lambda: TokenRounding(tile=2.0), TypeError, "tile must be a positive integer"),
    (lambda: TokenRounding(tile=2**31), ValueError, "tile must be below 2..31"),
    (lambda: TokenRounding(seed=-1), ValueError, "seed must not be negative"),
    (lambda: TokenRounding(seed=2**32), ValueError, "seed must be below"),
    (lambda: TokenRounding(base="softmax_after_topk"), TypeError, "base must be a top-K router config"),
    (lambda: TokenRounding(base=TokenRounding()), TypeError, "base must be a top-K router config"),
    (lambda: TokenRounding(base=SoftmaxBeforeTopK()), ValueError, "so its base router must too"),
    (lambda: token_rounding(X, 2, SoftmaxAfterTopK()), TypeError, "config must be a TokenRounding"),
    (lambda: token_rounding(X, 7, TokenRounding()), ValueError, "k must not exceed the number of experts"),
    (lambda: token_rounding(X, 2, TokenRounding(), step=-1), ValueError, "step must not be negative"),
    (
        lambda: token_rounding(X, 2, TokenRounding(), step=torch.zeros(2).long()),
        ValueError,
        "step must hold one integer",
    ),
    (lambda: token_rounding(X, 2, TokenRounding(), step=torch.tensor(1.0)), ValueError, "step must hold one integer"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- fewer tokens than a tile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [m for m in MODES if m != "UP"])
def test_experts_below_a_tile_are_warned_of(mode):
    """200 tokens on 8 experts with tile 128: 50 tokens an expert, of which rounding may leave none."""
    with pytest.warns(
        UserWarning, match=r"E tile / K = 512 tokens in all\); got 200 tokens with 8 experts, K = 2, tile 128"
    ):
        token_rounding(torch.randn(200, 8), 2, TokenRounding(mode=mode, tile=128))


@pytest.mark.parametrize(("tokens", "mode"), [(200, "UP"), (512, "NR-f"), (0, "NR-f")])
def test_experts_of_a_tile_or_that_round_up_are_not(tokens, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_rounding(torch.randn(tokens, 8), 2, TokenRounding(mode=mode, tile=128))
