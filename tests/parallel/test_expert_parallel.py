"""Expert parallelism over gloo against one process, to the bit."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import overflow_cases
import parallel_cases as cases
import parallel_module
import pytest
import torch
import torch.distributed as dist
from dispatched_ops import Ops
from ranks import run_ranks

from supersonic_moe import Fp8Recipe, MoE, jit
from supersonic_moe.kernels.sm90 import registered_specs

SIZES = (0, 1, 7, 333)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROUTINGS = ("random", "skewed", "one rank", "masked", "nobody")


def spread(ranks: int, count: int) -> list[tuple]:
    """Token counts, dtypes and routings in many combinations; for two ranks all pairs of counts."""
    draw = random.Random(ranks)
    counts = list(itertools.product(SIZES, repeat=2)) if ranks == 2 else []
    counts += [tuple(draw.choice(SIZES) for _ in range(ranks)) for _ in range(count)]
    counts += [(0,) * ranks]
    return [(t, DTYPES[i % 3], ROUTINGS[i % 5], i % 2 == 1) for i, t in enumerate(counts)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", [{}, {"capacity": 512}, {"transport": "gather"}], ids=["exact", "capacity", "gather"])
def test_ranks_together_have_the_bits_of_one_process(ranks: int, way: dict) -> None:
    found = run_ranks(ranks, cases.same_as_one_process, spread(ranks, 14), way)
    assert found == [[]] * ranks


@pytest.mark.parametrize("recipe", [Fp8Recipe(), Fp8Recipe(scale="pow2", save_preactivation="recompute", wgrad="bf16")])
def test_fp8_experts_have_the_bits_of_one_process(recipe: Fp8Recipe) -> None:
    assert run_ranks(2, cases.same_with, {"recipe": recipe}, (37, 150)) == [[], []]


@pytest.mark.parametrize(
    ("tokens", "recipe", "positive", "hidden", "way"),
    [
        ((700, 531), Fp8Recipe(scale="pow2"), False, 256, {}),
        (
            (700, 531), Fp8Recipe(scale="pow2", save_preactivation="recompute", keep_transposed=False), True, 136,
            {"capacity": 700},
        ),
        ((700, 531), Fp8Recipe(wgrad="bf16", save_preactivation="bf16"), True, 256, {"transport": "gather"}),
        ((0, 0), Fp8Recipe(scale="pow2"), False, 256, {}),
    ],
    ids=["plain", "recomputed", "bf16 weight gradients", "nothing arrives"],
)  # fmt: skip
def test_an_fp8_wire_carries_what_the_experts_would_make(
    tokens: tuple[int, int], recipe: Fp8Recipe, positive: bool, hidden: int, way: dict
) -> None:
    assert run_ranks(2, cases.over_an_fp8_wire, tokens, recipe, positive, hidden, way) == [[], []]


@pytest.mark.parametrize("tokens", [(9, 4), (5, 0), (0, 0)])
def test_experts_of_ones_own_between_dispatch_and_combine(tokens: tuple[int, int]) -> None:
    assert run_ranks(2, cases.with_experts_of_ones_own, tokens) == [True, True]


@pytest.mark.parametrize(
    ("router", "recompute", "masked"),
    [
        ("softmax_after_topk", False, False),
        ("sigmoid_grouped_topk", True, False),
        ("softmax_before_topk", False, True),
    ],
    ids=["plain", "recomputed", "padding"],
)
def test_the_module_is_that_of_one_process(router: str, recompute: bool, masked: bool) -> None:
    for found in run_ranks(4, parallel_module.module_as_one_process, (5, 0, 33, 1), router, recompute, masked):
        assert all(difference < 1e-10 for difference in found.values()), found


@pytest.mark.parametrize("way", [{}, {"transport": "gather"}], ids=["all_to_all", "gather"])
def test_random_calls_with_random_delays_repeat_to_the_bit(way: dict) -> None:
    assert run_ranks(4, cases.repeats_to_the_bit, 30, way) == [True] * 4


def test_tokens_that_found_no_place_are_nan_too() -> None:
    """On a GPU, where nobody waits to raise. A token of several ranks may have found a place on one of them."""
    cases_ = [(3, "one rank"), (3, "random"), (1, "masked"), (20, "skewed")]
    assert run_ranks(2, overflow_cases.as_on_a_gpu, cases_) == [[True] * 4] * 2


def test_torch_compile_leaves_what_travels_alone() -> None:
    assert run_ranks(2, parallel_module.compiled, (12, 5)) == [[], []]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_is_the_plain_layer_and_copies_nothing(one_rank: None) -> None:
    ep = cases.make()
    layers = []
    for expert_parallel in (None, ep):
        torch.manual_seed(1)
        layers.append(MoE(cases.E, cases.K, cases.H, cases.I, "swiglu", True, 0.3, expert_parallel=expert_parallel))
    plain, spread = layers
    x = torch.randn(21, cases.H)
    results, ran = [], []
    for layer in (plain, spread):
        mine = x.clone().requires_grad_()
        with Ops() as ops:
            out, aux = layer(mine)
            (out.square().sum() + aux).backward()
        ran.append(ops.names)
        results.append([out, aux, mine.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert ran[0] == ran[1]
    ids, scores = torch.tensor([[0, 9, -5]]), torch.rand(1, 3)
    got = ep.dispatch(x[:1], ids, scores)
    assert got.x.data_ptr() == x.data_ptr() and got.ids.tolist() == [[0, -1, -1]] and got.scores is scores
    assert ep.combine(got.x, got.handle) is got.x
    weights = torch.randn(cases.E - 1, 2 * cases.I, cases.H), torch.randn(cases.E - 1, cases.H, cases.I)
    with pytest.raises(ValueError, match=rf"w1 must have expert count {cases.E} .*; got {cases.E - 1}"):
        ep.experts(x[:1], ids, scores, *weights)
    with pytest.raises(TypeError, match="capacity must be \"exact\" or a number of tokens; got 'auto'"):
        cases.make(capacity="auto")
    with pytest.raises(ValueError, match=r'transport="push" has a place for each of max_tokens .*; got 4\.'):
        cases.make(transport="push", capacity=4)
    with pytest.raises(ValueError, match=r"transport must be one of .*'push'; got 'pull'"):
        cases.make(transport="pull")
    with pytest.raises(TypeError, match=r"cannot be pickled\. Save its state_dict\(\)"):
        torch.save(spread, io.BytesIO())


def test_warm_up_waits_for_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, cases.warmed_up, str(tmp_path / "came"), 1.0) == [True, True]


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_warm_up_compiles_what_this_gpu_runs(
    capability: tuple[int, int], one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(jit, "compile_all", done.append)
    monkeypatch.setattr(dist, "barrier", lambda group: done.append("all ranks"))
    cases.make().warm_up()
    assert done == [registered_specs(), "all ranks"][capability != (9, 0) :]
