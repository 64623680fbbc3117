"""The options that all entry points share: the same for each, named when unknown, shown by ``help``."""

from __future__ import annotations

import inspect
import pydoc

import pytest
import torch

import supersonic_moe as sm
from supersonic_moe.training.options import ExpertOptions, Options

H, I, E, K, T = 8, 4, 3, 2, 6  # noqa: E741
NAMES = ("moe_layer", "topk_experts", "routed_experts", "dispatched_experts", "experts_from_plan")


def calls(**options):
    x, w1, w2 = torch.randn(T, H), torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    ids, scores, tokens = torch.randint(E, (T, K)), torch.rand(T, K), torch.arange(T).repeat_interleave(K)
    plan = sm.plan_from_topk(ids, E)
    return {
        "moe_layer": lambda: sm.moe_layer(x, torch.randn(E, H), w1, w2, K, **options),
        "topk_experts": lambda: sm.topk_experts(x, ids, scores, w1, w2, **options),
        "routed_experts": lambda: sm.routed_experts(x, tokens, ids.flatten(), scores.flatten(), w1, w2, **options),
        "dispatched_experts": lambda: sm.dispatched_experts(x, torch.tensor([2, 2, T]), w1, w2, **options),
        "experts_from_plan": lambda: sm.experts_from_plan(x, scores.flatten(), plan, w1, w2, **options),
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_named_and_the_options_are_listed(name):
    with pytest.raises(TypeError, match=r"unknown option 'activaton'.*b1, b2, activation, layout.*validate"):
        calls(activaton="gelu", layout="gate_up")[name]()


@pytest.mark.parametrize("name", NAMES)
def test_every_option_reaches_every_entry_point(name):
    """What an option does is tested elsewhere; here, that none is dropped on the way."""
    for wrong, words in (
        ({"b1": torch.zeros(E, 1)}, "b1 must have shape"),
        ({"b2": torch.zeros(E, 1)}, "b2 must have shape"),
        ({"activation": "nope"}, "unknown activation 'nope'"),
        ({"layout": "nope"}, "unknown gate/up layout 'nope'"),
        ({"recipe": sm.Fp8Recipe()}, "Fp8Recipe needs bfloat16"),
        ({"backend": "nope"}, "unknown backend 'nope'"),
        ({"inference": "no"}, r"inference must be True or False; got str \('no'\)"),
        ({"accumulate_into_main_grad": None}, "accumulate_into_main_grad must be True or False; got NoneType"),
        ({"validate": 1}, "validate must be True or False; got int"),
        ({"weight_cache": {}}, "weight_cache must be a WeightCache or None; got dict"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            calls(**wrong)[name]()


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_options_with_their_defaults(name):
    function = getattr(sm, name)
    parameters = inspect.signature(function).parameters
    assert "options" not in parameters
    for option, default in Options._field_defaults.items():
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY and parameters[option].default == default
    assert "accumulate_into_main_grad" in pydoc.render_doc(function) and "ExpertOptions" in function.__doc__


def test_both_lists_of_options_agree():
    """One is what callers may give, the other what becomes of it; the documentation has a line for each."""
    assert tuple(ExpertOptions.__annotations__) == Options._fields
    assert all(f"\n    {name}: " in ExpertOptions.__doc__ for name in Options._fields)


def test_options_are_read_once_into_an_object_that_nobody_changes():
    options = Options.read({"activation": "geglu", "layout": "up_gate"})
    assert options.activation == sm.Activation(sm.ActivationType.GEGLU) and options.layout is sm.GateUpLayout.UP_GATE
    assert options.recipe == sm.Bf16Recipe() and Options.read({"recipe": None}) == Options()
    with pytest.raises(AttributeError):
        options.backend = "sm90"
