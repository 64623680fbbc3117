"""Expert parallelism behind the interfaces of torchtitan and Megatron."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import parallel_trainers as trainers
import pytest
from parallel_trainers import MegatronDispatcher, RoutedExperts, TitanDispatcher
from ranks import run_ranks

#: torchtitan 0.3.0, ``RoutedExperts`` of models/common/moe.py and ``BaseEPTokenDispatcher`` of
#: models/common/token_dispatcher.py; behind the star by name only.
TITAN = {
    RoutedExperts.forward: "x_BLD topk_scores_BLK topk_expert_ids_BLK num_local_tokens_per_expert_E",
    TitanDispatcher.wire_meshes: "* ep_mesh",
    TitanDispatcher.dispatch: "x_TD topk_scores_TK topk_expert_ids_TK num_local_tokens_per_expert_E",
    TitanDispatcher.combine: "routed_output_RD metadata x_TD",
}
#: megatron-core 0.16.1, the abstract ``MoETokenDispatcher`` of core/transformer/moe/token_dispatcher.py, whose
#: methods its layer calls by position.
MEGATRON = {
    MegatronDispatcher.dispatch_preprocess: "tokens routing_map probs",
    MegatronDispatcher.token_dispatch: "hidden_states probs",
    MegatronDispatcher.dispatch_postprocess: "hidden_states probs",
    MegatronDispatcher.combine_preprocess: "hidden_states",
    MegatronDispatcher.token_combine: "hidden_states",
    MegatronDispatcher.combine_postprocess: "hidden_states",
}
PUBLISHED = TITAN | MEGATRON


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda function: function.__qualname__)
def test_parameters_are_the_published_ones(function: Callable[..., object]) -> None:
    _, *parameters = inspect.signature(function).parameters.values()
    positional, _, by_name = PUBLISHED[function].partition("* ")
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    found = [[p.name for p in parameters if p.kind is kind] for kind in kinds]
    assert found == [positional.split(), by_name.split()]
    assert all(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def test_every_method_of_a_stand_in_is_published() -> None:
    for stand_in in (TitanDispatcher, MegatronDispatcher):
        own = {function for name, function in vars(stand_in).items() if not name.startswith("_") and callable(function)}
        assert own <= PUBLISHED.keys(), own - PUBLISHED.keys()


@pytest.mark.parametrize("form", trainers.FORMS)
def test_a_trainers_layer_is_that_of_one_process(form: str) -> None:
    for found in run_ranks(2, trainers.against_one_process, form, (21, 40)):
        assert set(found) == {"out", "dx", "dscores", "dw1", "dw2"}
        assert max(found.values()) < 1e-12, found
