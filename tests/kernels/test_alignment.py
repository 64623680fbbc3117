"""Operands anywhere: what reaches a kernel starts, and steps from row to row, at multiples of 16 bytes, whatever the
caller passed; and results are those of operands that lay there from the start.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")

from recorded_launches import Launch, Mapped, Slots, recorded_launches  # noqa: F401
from views import PLAIN, Place, in_one_buffer, lay

import supersonic_moe as sm
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.alignment import aligned_tensor

T, E, K = 5, 3, 2
ODD = [(offset, behind, False) for offset in (1, 2, 4) for behind in (0, 1, 4)]
OPERANDS = ("x", "w1", "b1", "w2", "b2", "scores", "ids", "dout")
EVERYWHERE_ODD = dict.fromkeys((*OPERANDS, "main1", "main2"), (1, 0, False))
FP8_WITH_BF16_WGRAD = sm.Fp8Recipe(wgrad="bf16", save_preactivation="bf16")
RECIPES = [None, sm.Fp8Recipe(), FP8_WITH_BF16_WGRAD, sm.Fp8Recipe(save_preactivation="recompute")]


def operands(hidden: int, intermediate: int, tokens: int = T, device: str = "cpu") -> dict[str, Tensor]:
    wide = 2 * intermediate
    shapes = {
        "x": (tokens, hidden), "w1": (E, wide, hidden), "b1": (E, wide), "w2": (E, hidden, intermediate),
        "b2": (E, hidden), "dout": (tokens, hidden),
    }  # fmt: skip
    made = {name: (0.3 * torch.randn(shape, device=device)).bfloat16() for name, shape in shapes.items()}
    ids = torch.rand(tokens, E, device=device).topk(K, dim=1).indices
    return made | {"ids": ids, "scores": torch.rand(tokens, K, device=device)}


def step(
    made: dict[str, Tensor], places: dict[str, Place], backend: str, recipe: sm.Fp8Recipe | None = None
) -> dict[str, Tensor]:
    """Output and gradients of the experts; places of "main1" and "main2" ask for gradients of weights there."""
    laid = {name: lay(t, places.get(name, PLAIN)) for name, t in made.items()}
    leaves = {name: t.requires_grad_() for name, t in laid.items() if name not in ("ids", "dout")}
    main = {
        name: lay(torch.full_like(laid[f"w{name[-1]}"], 3, dtype=torch.float32), places[name])
        for name in places
        if "main" in name
    }
    for name, buffer in main.items():
        leaves[f"w{name[-1]}"].main_grad = buffer
    out = sm.topk_experts(
        laid["x"], laid["ids"], laid["scores"], laid["w1"], laid["w2"], b1=laid.get("b1"), b2=laid.get("b2"),
        backend=backend, recipe=recipe, accumulate_into_main_grad=bool(main),
    )  # fmt: skip
    out.backward(laid["dout"])
    return {"out": out.detach(), **{name: t.grad for name, t in leaves.items() if t.grad is not None}, **main}


@pytest.fixture
def seen(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of each launch on a stand-in for the sm_90 kernels: name, arguments, and for tensor maps what lies there. Weight
    gradients come out as ones.
    """
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(registry, "_sm90_obstacle", lambda *_: None)

    def look(self: Slots, grid: Any, stream: None) -> None:
        mapped = {name: value.tensor() for name, value in self.arguments.items() if isinstance(value, Mapped)}
        if "wgrad" in self.kernel.spec.name:
            mapped["map_d"].fill_(1)
        contents = {name: tensor.clone() for name, tensor in mapped.items()}
        found.append(self.arguments | contents)

    monkeypatch.setattr(Slots, "enqueue", look)
    return found


def same_values(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.float().flatten().sort().values, b.float().flatten().sort().values)


@st.composite
def places(draw: Any) -> dict[str, Place]:
    anywhere = st.tuples(st.sampled_from([0, 1, 2, 4, 8]), st.sampled_from([0, 1, 4, 8]), st.booleans())
    found = {name: draw(anywhere) for name in OPERANDS}
    found = {name: (*place[:2], place[2] and name in ("w1", "w2")) for name, place in found.items()}
    if draw(st.booleans()):
        found |= {name: (draw(anywhere)[0], 0, False) for name in ("main1", "main2")}
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on tensors of a CPU where there is no GPU")
@pytest.mark.filterwarnings("ignore:.*encountered in")  # nobody writes what the stand-in should
@given(places(), st.sampled_from(RECIPES), st.booleans(), st.booleans())
@example(EVERYWHERE_ODD, None, True, True)
@example(EVERYWHERE_ODD, FP8_WITH_BF16_WGRAD, True, True)
@example(EVERYWHERE_ODD, sm.Fp8Recipe(), False, True)
@settings(max_examples=12)
def test_kernels_load_the_operands_from_where_they_can(
    seen: list[dict[str, Any]], places: dict[str, Place], recipe: sm.Fp8Recipe | None, biases: bool, hooks: bool
) -> None:
    seen.clear()
    made = operands(16, 8)
    if not biases:
        del made["b1"], made["b2"]
    with in_one_buffer() if hooks else nullcontext():
        results = step(made, places, "sm90", recipe)
    loaded = [value for launch in seen for value in launch.values() if isinstance(value, Tensor)]
    by_tma = {None: ("x", "w1", "w2", "dout"), FP8_WITH_BF16_WGRAD: ("x", "dout")}.get(recipe, ())
    for name in by_tma:
        assert any(same_values(made[name], value) for value in loaded), name
    assert all(launch.get("b1", 0) % 4 == 0 for launch in seen)  # loaded in pairs
    for name in ("main1", "main2"):
        if name in places:  # the stand-in writes where it should add; apart, its product is added
            assert (results[name] == (1 if places[name][0] % 4 == 0 else 4)).all(), name


def test_a_copy_is_logged_and_what_fits_is_not_copied(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(3, 16, 8).bfloat16()
    with caplog.at_level(logging.DEBUG, "supersonic_moe"):
        for place in ((0, 0, False), (8, 8, False), (8, 8, True)):
            fits = lay(weight, place)
            assert aligned_tensor("w1", fits) is fits
        assert not caplog.records
        copy = aligned_tensor("w1", lay(weight, (1, 0, True)))
    assert torch.equal(copy, weight) and copy.mT.is_contiguous(), "a transposed view stays one"
    assert "copying w1 (3, 16, 8)" in caplog.text and "multiples of 16 bytes" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, sm.Fp8Recipe(), FP8_WITH_BF16_WGRAD], ids=["bf16", "fp8", "fp8-wgrad-bf16"])
@pytest.mark.parametrize("backend", ["sm90", "triton"])
def test_same_results_wherever_operands_lie(backend: str, recipe: sm.Fp8Recipe | None) -> None:
    if recipe and backend == "triton":
        pytest.skip("no FP8 products")
    made = operands(256, 128, 333, "cuda")
    for turned in (False, True):
        weights = {name: (0, 0, turned) for name in ("w1", "w2")}
        for main in ((), ("main1", "main2")):
            want = step(made, weights | dict.fromkeys(main, PLAIN), backend, recipe)
            for front, behind, _ in ODD:
                odd = {name: (front, behind, turned and name in weights) for name in OPERANDS}
                got = step(made, odd | dict.fromkeys(main, (front, 0, False)), backend, recipe)
                for name, value in want.items():
                    assert torch.equal(got[name], value), (name, front, behind, turned)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "recipe"), [("triton", None), *(("sm90", recipe) for recipe in RECIPES)], ids=str)
def test_saved_tensors_may_come_back_anywhere(backend: str, recipe: sm.Fp8Recipe | None) -> None:
    made = operands(256, 128, 333, "cuda")
    want = step(made, {}, backend, recipe)
    with in_one_buffer():
        got = step(made, {}, backend, recipe)
    assert all(torch.equal(got[name], value) for name, value in want.items())
