"""Configurations: what they refuse, in which words, and what a router says about the layer that it is for."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable

import pytest
import torch

import supersonic_moe as sm
from supersonic_moe import checks
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation, as_layout
from supersonic_moe.config.grouped_routing import Scoring, as_scoring
from supersonic_moe.config.recipe import Fp8Recipe, as_recipe
from supersonic_moe.config.router import (
    SigmoidGroupedTopK,
    as_router,
    check_router,
)

BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Activation("nonsense"), ValueError, "unknown activation 'nonsense'; choose one of swiglu"),
    (lambda: Activation("gelu", alpha=2), ValueError, "belong to swiglu; got them with gelu"),
    (lambda: Activation(3), ValueError, "unknown activation 3"),
    (lambda: Activation("swiglu", alpha="2"), TypeError, "alpha must be a number; got str"),
    (lambda: Activation("swiglu", alpha=float("nan")), ValueError, "alpha must be finite; got nan"),
    (lambda: Activation("swiglu", up_offset=None), TypeError, "up_offset must be a number; got NoneType"),
    (lambda: Activation("swiglu", limit="7"), TypeError, "limit must be a number; got str"),
    (lambda: Activation("swiglu", limit=0), ValueError, "limit must be a positive finite number or None"),
    (lambda: as_activation(["swiglu"]), ValueError, "unknown activation"),
    (lambda: as_layout(None), ValueError, "unknown gate/up layout None"),
    (lambda: sm.SigmoidGroupedTopK(scaling_factor="2.5"), TypeError, "scaling_factor must be a number; got str"),
    (lambda: sm.SigmoidGroupedTopK(scaling_factor=True), TypeError, "scaling_factor must be a number; got bool"),
    (lambda: sm.SigmoidGroupedTopK(scaling_factor=0), ValueError, "scaling_factor must be a positive finite number"),
    (lambda: sm.SigmoidGroupedTopK(num_groups=2.0), TypeError, "num_groups must be a positive integer"),
    (lambda: sm.SigmoidGroupedTopK(renormalize="no"), TypeError, "renormalize must be True or False; got str"),
    (lambda: sm.SoftmaxBeforeTopK(renormalize=1), TypeError, "renormalize must be True or False; got int"),
    (lambda: sm.TokenRounding(mode=None), ValueError, "unknown token rounding mode None"),
    (lambda: sm.TokenRounding(base="softmax_after_topk"), TypeError, "base must be a top-K router config"),
    (lambda: sm.TokenRounding(tile=128.0), TypeError, "tile must be a positive integer"),
    (lambda: checks.number("z_loss_weight", "0.1", lowest=0), TypeError, "z_loss_weight must be a number; got str"),
    (lambda: checks.number("z_loss_weight", -1, lowest=0), ValueError, "must be finite and at least 0; got -1"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=[words for _, _, words in BAD])
def test_wrong_types_and_values_are_refused_in_a_sentence(
    call: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("reader", [as_activation, as_layout, as_recipe, as_router, lambda v: sm.TokenRounding(base=v)])
def test_a_message_does_not_print_whole_lists(reader: Callable[[object], object]) -> None:
    for value in (list(range(100_000)), "x" * 100_000, {i: i for i in range(100_000)}):
        with pytest.raises((TypeError, ValueError)) as caught:
            reader(value)
        assert len(str(caught.value)) < 500


def test_describe_is_short_and_says_the_type() -> None:
    assert checks.describe([0] * 1000) == "list ([0, 0, 0, 0, 0, 0, ...])"
    assert checks.describe(2.5) == "float (2.5)"
    assert len(checks.describe("x" * 1000)) < 150
    assert checks.describe(torch.zeros(2, 3)) == "float32 of shape (2, 3) on cpu"


def test_an_activation_takes_its_type_by_name() -> None:
    assert Activation("swiglu", limit=7) == Activation(ActivationType.SWIGLU, limit=7.0)
    assert Activation("gelu").type is ActivationType.GELU
    assert as_activation("relu") == Activation(ActivationType.RELU)


@pytest.mark.parametrize(
    ("reader", "kind"), [(as_activation, ActivationType), (as_layout, GateUpLayout), (as_scoring, Scoring)]
)
def test_members_of_enums_are_not_looked_up(
    reader: Callable[[object], object], kind: type[enum.StrEnum], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that readers do with a member: torch.compile of torch 2.11 cannot trace ``kind(member)``."""
    members = list(kind)

    def refuse(cls: object, value: object) -> None:
        raise AssertionError(f"{cls}({value})")

    with monkeypatch.context() as patch:
        patch.setattr(enum.EnumMeta, "__call__", refuse)
        read = [reader(member) for member in members]
    assert read == [reader(member.value) for member in members]


BUILT: list[Callable[[], object]] = [
    lambda: Activation("swiglu", limit=7.0),
    lambda: Activation(ActivationType.GEGLU),
    Activation.gpt_oss,
    lambda: as_activation("gelu"),
    lambda: Fp8Recipe(scale="pow2"),
    lambda: as_recipe(None),
    lambda: SigmoidGroupedTopK(num_groups=2),
    lambda: as_router("token_rounding"),
]


@pytest.mark.parametrize("number", range(len(BUILT)))
def test_configurations_are_built_under_the_compiler(number: int) -> None:
    torch.compiler.reset()
    build, found = BUILT[number], []

    def call(x: torch.Tensor) -> torch.Tensor:
        found.append(build())
        return x + 1

    torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1))
    assert found == [build()]


# ---- a router and the sizes of its layer -----------------------------------------------------------------------------

CONSTANT = [sm.SoftmaxAfterTopK(), sm.SoftmaxBeforeTopK(renormalize=True), sm.TokenRounding()]
LEARNS = [sm.SoftmaxBeforeTopK(), sm.SigmoidGroupedTopK(scaling_factor=2.5), sm.SigmoidGroupedTopK(renormalize=False)]


@pytest.mark.parametrize("router", CONSTANT, ids=str)
def test_a_router_that_cannot_learn_is_warned_of(router: sm.TopKRouter | sm.TokenRounding) -> None:
    with pytest.warns(UserWarning, match="the router learns from auxiliary losses alone"):
        check_router(router, num_experts=8, k=1)


@pytest.mark.parametrize(("router", "k"), [*((r, 1) for r in LEARNS), *((r, 2) for r in CONSTANT)], ids=str)
def test_a_router_that_learns_is_not(router: sm.TopKRouter | sm.TokenRounding, k: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_router(router, num_experts=8, k=k)


UNFIT: list[tuple[sm.TopKRouter | sm.TokenRounding, int, str]] = [
    (sm.SigmoidGroupedTopK(num_groups=3), 2, "8 experts in 3 groups"),
    (sm.SigmoidGroupedTopK(num_groups=4, topk_groups=1), 3, "k = 3 with 1 of 4 groups, which hold 2 experts"),
    (sm.TokenRounding(base=sm.SigmoidGroupedTopK(num_groups=3)), 2, "8 experts in 3 groups"),
    (sm.TokenRounding(base=sm.SigmoidGroupedTopK()), 1, "a sigmoid router with one expert a token does not"),
    (sm.SoftmaxAfterTopK(), 9, "must not exceed the number of experts"),
]


@pytest.mark.parametrize(("router", "k", "words"), UNFIT, ids=[words for _, _, words in UNFIT])
def test_a_router_that_does_not_fit_its_layer_is_refused(
    router: sm.TopKRouter | sm.TokenRounding, k: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_router(router, num_experts=8, k=k)
