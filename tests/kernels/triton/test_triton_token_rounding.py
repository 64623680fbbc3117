"""Token rounding in Triton against its definition, the reference backend: every choice to the bit, weights and
gradients within fp32 rounding.

The two compute probabilities with different exponentials and sums, so their ranking keys differ in the last bits. Keys
are therefore compared with fp64, and everything that follows from keys is compared on the same keys. Inputs whose
probabilities only tie or differ by far are compared as a whole.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.router import MODES, SigmoidGroupedTopK, SoftmaxAfterTopK, TokenRounding, TopKRouter
from supersonic_moe.kernels.interface import Rounding
from supersonic_moe.kernels.reference import token_rounding as reference
from supersonic_moe.kernels.triton import select_tokens
from supersonic_moe.kernels.triton import token_rounding as kernels
from supersonic_moe.routing.token_rounding import token_rounding, token_rounding_capacity
from supersonic_moe.routing.topk import route

SIGMOID = SigmoidGroupedTopK(scaling_factor=2.5)
BASES = [SoftmaxAfterTopK(), SIGMOID]
NAMES = ("tokens", "experts", "scores", "counts", "token_offsets")


def check(logits: Tensor, k: int, config: TokenRounding, step: Tensor | int = 0) -> tuple[Tensor, ...]:
    """Compare with the definition on the same keys; returns the result."""
    scale = config.base.scaling_factor if isinstance(config.base, SigmoidGroupedTopK) else None
    scores, ids = route(logits, k, config.base, backend="triton")
    capacity = token_rounding_capacity(len(logits), k, logits.shape[1], config)
    args = (logits, scores, ids, Rounding(scale, config.mode, config.tile, config.seed, step), capacity)
    got = kernels.token_rounding_forward(*args)
    with pytest.MonkeyPatch.context() as patch:
        keys_TE = kernels.ranking_keys(logits, scores, ids, scale)[:, : len(logits)].T.contiguous()
        patch.setattr(reference, "ranking_keys", lambda *_: keys_TE)
        want = reference.token_rounding_forward(*args)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == b.dtype
        if name == "scores":
            torch.testing.assert_close(a, b, rtol=4e-6, atol=1e-30, equal_nan=True)
        else:
            assert torch.equal(a, b), name
    return got


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, TokenRounding]:
    experts, tokens = draw(st.integers(1, 3), "E"), draw(st.integers(1, 150), "T")
    config = TokenRounding(
        base=draw(st.sampled_from(BASES)),
        mode=draw(st.sampled_from(MODES)),
        tile=draw(st.sampled_from([1, 2, 3, 7, 8, 16, 64, 128, 200, 2**31 - 1])),
        seed=draw(st.sampled_from([0, 1, 2**31, 2**32 - 1])),
    )
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits = draw(st.sampled_from([1.0, 40.0])) * torch.randn(tokens, experts, generator=rng)
    logits += draw(st.sampled_from([0.0, 2.0])) * torch.arange(experts)  # popular experts
    if draw(st.booleans(), "ties"):
        logits = logits[torch.randint(3, (tokens,), generator=rng).clamp(max=tokens - 1)]
    for odd in draw(st.sets(st.sampled_from([math.nan, math.inf, -math.inf])), "odd values"):
        logits[torch.rand(logits.shape, generator=rng) < 0.1] = odd
    return logits.to(dtype), draw(st.integers(1, experts), "K"), config


@settings(max_examples=15)
@given(problem=problems(), step=st.sampled_from([0, 5, 2**31 + 1, 2**40 + 3]), on_device=st.booleans())
def test_matches_the_definition(problem, step: int, on_device: bool, device: torch.device) -> None:
    logits, k, config = problem
    check(logits.to(device), k, config, torch.tensor([step], device=device) if on_device else step)


@pytest.mark.parametrize("mode", ["UP", "DOWN", "NR-s"])
@pytest.mark.parametrize("tied", [False, True])
def test_long_rows(mode: str, tied: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lanes and scratch words make 400 tokens several blocks; with ties more candidates than words."""
    for name, value in (("LANES", 128), ("ROWS", 2), ("SCRATCH", 128)):
        monkeypatch.setattr(select_tokens, name, value)
    logits = torch.randint(2, (400, 2)).float() if tied else torch.randn(400, 2)
    check(logits.to(device), 1, TokenRounding(mode=mode, tile=150 if tied else 32, seed=1))


def test_a_long_row_as_it_is(device: torch.device) -> None:
    logits = torch.randn(2500, 2, device=device)
    logits[500:2200] = logits[torch.arange(500, 2200) % 7]
    check(logits, 1, TokenRounding(base=SIGMOID))


@pytest.mark.parametrize("mode", MODES)
def test_ties_and_nothing_else(mode: str, device: torch.device) -> None:
    """Probabilities 1/n and 0, all ties broken by token order: no two keys hang on the last bit of an exp."""
    logits = torch.where(torch.rand(90, 4) < 0.5, 0.0, -math.inf).to(device)
    logits[5] = math.nan
    config = TokenRounding(mode=mode, tile=8, seed=2)
    got, want = (token_rounding(logits, 2, config, step=1, backend=name) for name in ("triton", "reference"))
    for name, a, b in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True, msg=name)


def test_chunks_of_several_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a large T a program counts several blocks; fewer chunks do so at a small one."""
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 4)
    assert check(torch.randn(700, 3, device=device), 2, TokenRounding(tile=16))[4][-1] > 1300


def test_tokens_with_many_experts(device: torch.device) -> None:
    """More kept experts than a program takes at once, and tokens that no expert keeps."""
    logits = torch.randn(20, 18, device=device)
    up = check(logits, 12, TokenRounding(mode="UP", tile=16))
    assert up[4].diff().max() > kernels.SLOTS
    assert not check(logits, 12, TokenRounding(mode="DOWN", tile=21))[3].any()


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize("experts", [1, 5, 64, 300])
def test_ranking_keys(experts: int, base: TopKRouter, device: torch.device) -> None:
    logits, k = 5 * torch.randn(70, experts), min(experts, 3)
    logits[3, experts // 2] = math.nan
    scores, ids = route(logits.to(device), k, base, backend="triton")
    keys_TE = kernels.ranking_keys(logits.to(device), scores, ids, getattr(base, "scaling_factor", None)).cpu()
    assert (keys_TE[:, 70:128] == -(2**31)).all()
    keys_TE = keys_TE[:, :70].T
    chosen_TE = torch.zeros(70, experts, dtype=torch.bool).scatter_(1, ids.long().cpu(), True)
    assert torch.equal(keys_TE >= 0, chosen_TE)
    x_TE = logits.double()
    want_TE = x_TE.sigmoid() if base is SIGMOID else x_TE.softmax(1)
    want_TE = torch.where(chosen_TE, want_TE / (want_TE * chosen_TE).nan_to_num().sum(1, keepdim=True), want_TE)
    nan_T = logits.isnan().any(1)
    want_TE[nan_T] = torch.where(chosen_TE[nan_T] | (base is not SIGMOID), 0.0, want_TE[nan_T].nan_to_num())
    got_TE = (keys_TE & (2**31 - 1)).contiguous().view(torch.float32)
    torch.testing.assert_close(got_TE.double(), want_TE, rtol=8e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("base", "dtype"),
    [(BASES[0], torch.float32), (BASES[0], torch.bfloat16), (SIGMOID, torch.float32), (SIGMOID, torch.float16)],
    ids=str,
)
def test_gradient(base: TopKRouter, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.randn(75, 18).to(dtype).to(device).requires_grad_()
    config = TokenRounding(base=base, mode="UP", tile=64)
    result = token_rounding(logits, 3, config, backend="triton")
    used = int(result.counts.sum())
    assert result.token_offsets.diff().max() > kernels.SLOTS and used < len(result.scores)
    dscores = torch.randn_like(result.scores)
    dscores[used:] = math.nan  # unused slots have no gradient
    (got,) = torch.autograd.grad(result.scores, logits, dscores)

    x = logits.detach().cpu().double().requires_grad_()
    pairs = result.token_indices[:used].long().cpu(), result.expert_indices[:used].long().cpu()
    kept = torch.zeros(x.shape, dtype=torch.bool).index_put_(pairs, torch.tensor(True))
    if base is SIGMOID:
        a = x.sigmoid() * kept
        weight = SIGMOID.scaling_factor * a / a.sum(1, keepdim=True)
    else:
        weight = x.masked_fill(~kept, -math.inf).softmax(1)
    (want,) = torch.autograd.grad(weight[pairs], x, dscores[:used].cpu().double())
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(got.cpu().double(), want, rtol=rounding, atol=3e-6)


def test_no_tokens(device: torch.device) -> None:
    logits = torch.zeros(0, 4, device=device, requires_grad=True)
    result = token_rounding(logits, 2, TokenRounding(), backend="triton")
    assert [tuple(t.shape) for t in result] == [(0,), (0,), (0,), (4,), (1,)]
    assert not result.counts.any() and not result.token_offsets.any()
    assert torch.autograd.grad(result.scores.sum(), logits)[0].shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tokens", "experts", "k"), [(16384, 256, 8), (32767, 96, 6), (3000, 512, 10)])
def test_real_sizes(tokens: int, experts: int, k: int, mode: str, device: torch.device) -> None:
    logits = torch.randn(tokens, experts, device=device, dtype=torch.bfloat16) + torch.randn(experts, device=device)
    config = TokenRounding(mode=mode, tile=128, seed=5)
    first, again = (check(logits.bfloat16(), k, config, step=9) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
