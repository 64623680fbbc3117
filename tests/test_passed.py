"""Checks that an equal call has passed are left out, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import supersonic_moe as sm
from supersonic_moe import functional, passed
from supersonic_moe.training import layer

T, H, I, E, K = 5, 16, 8, 4, 2  # noqa: E741


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layer, "suits", lambda x, backend: True)
    passed._passed.clear()
    yield
    passed._passed.clear()


@pytest.fixture(name="checked")
def counted_checks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The x of each call that is checked."""
    seen: list[Tensor] = []
    original = functional.checked_experts
    monkeypatch.setattr(functional, "checked_experts", lambda x, *rest: seen.append(x) or original(x, *rest))
    return seen


def operands() -> dict[str, Any]:
    return {
        "x_TH": torch.randn(T, H), "router_weight_EH": torch.randn(E, H), "w1": torch.randn(E, 2 * I, H),
        "w2": torch.randn(E, H, I), "num_experts_per_tok": K, "b1": torch.randn(E, 2 * I),
    }  # fmt: skip


def test_an_equal_call_is_not_checked_again(checked: list[Tensor]) -> None:
    for _ in range(3):
        sm.moe_layer(**operands())
    assert len(checked) == 1
    ids, scores = torch.randint(E, (T, K)), torch.rand(T, K)
    for _ in range(3):
        given = operands()
        sm.topk_experts(given["x_TH"], ids, scores, given["w1"], given["w2"])
    assert len(checked) == 2


WRONG: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "dtype": ({"w2": torch.randn(E, H, I).double()}, TypeError),
    "size": ({"w2": torch.randn(E, H, I + 1)}, ValueError),
    "router": ({"router_weight_EH": torch.randn(E + 1, H)}, ValueError),
    "bias": ({"b1": torch.randn(E, 2 * I + 2)}, ValueError),
    "choices": ({"num_experts_per_tok": E + 1}, ValueError),
    "layout in memory": ({"w1": torch.randn(E, 1, H).expand(E, 2 * I, H)}, ValueError),
    "no strides": ({"x_TH": torch.randn(T, H).to_sparse()}, TypeError),
    "meaning": ({"activation": "relu_sq"}, ValueError),
    "no number": ({"num_experts_per_tok": [K]}, TypeError),
    "no name": ({"backend": ["auto"]}, (TypeError, ValueError)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", WRONG)
def test_a_call_that_differs_is_checked(what: str) -> None:
    for _ in range(2):
        sm.moe_layer(**operands())
    wrong, error = WRONG[what]
    for _ in range(2):
        with pytest.raises(error):
            sm.moe_layer(**operands() | wrong)


def test_rows_that_are_copied_are_copied_each_time() -> None:
    given = operands()
    wide = torch.randn(T, 2 * H)
    want = sm.moe_layer(**given | {"x_TH": wide[:, ::2].contiguous()}).output
    for _ in range(3):
        torch.testing.assert_close(sm.moe_layer(**given | {"x_TH": wide[:, ::2]}).output, want)


def test_known_calls_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passed, "KEPT", 3)
    for tokens in range(1, 9):
        sm.moe_layer(**operands() | {"x_TH": torch.randn(tokens, H)})
        assert len(passed._passed) <= 3
