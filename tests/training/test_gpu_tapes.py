"""Steps that are played (``jit/tape.py``) have the bits of steps that are run, whatever lies where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import supersonic_moe as sm
from supersonic_moe.jit.tape import without_tapes
from supersonic_moe.training import bf16, fp8

pytestmark = pytest.mark.gpu

T, H, I, E, K = 333, 256, 640, 8, 4  # noqa: E741  three partial sums of a score's gradient
RECIPES = {
    "bf16": None,
    "fp8": sm.Fp8Recipe(),
    "fp8, Z again": sm.Fp8Recipe(save_preactivation="recompute", wgrad="bf16"),
}


class Layer:
    def __init__(self, recipe: Any, main_grad: bool, *, fan: int = 2, biases: bool = False) -> None:
        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).bfloat16().requires_grad_()

        self.router, self.w1, self.w2 = normal(E, H), normal(E, fan * I, H), normal(E, H, I)
        self.biases = {"b1": normal(E, fan * I), "b2": normal(E, H)} if biases else {}
        activation = "swiglu" if fan == 2 else "relu_sq"
        self.options = {
            "recipe": recipe, "accumulate_into_main_grad": main_grad, "activation": activation, **self.biases
        }  # fmt: skip
        self.main_grad = main_grad

    def step(self, x: Tensor, dout: Tensor) -> list[Tensor]:
        if self.main_grad:
            for w in (self.w1, self.w2):
                w.main_grad = torch.ones_like(w, dtype=torch.float32)  # type: ignore[attr-defined]
        x = x.detach().requires_grad_()
        out = sm.moe_layer(x, self.router, self.w1, self.w2, K, **self.options).output
        if not self.main_grad:
            return [out, *torch.autograd.grad(out, [x, self.router, self.w1, self.w2, *self.biases.values()], dout)]
        out.backward(dout)
        router_grad, self.router.grad = self.router.grad, None
        assert x.grad is not None and router_grad is not None
        return [out, x.grad, router_grad, self.w1.main_grad, self.w2.main_grad]  # type: ignore[attr-defined]


def run(layer: Layer, x: Tensor, dout: Tensor) -> list[Tensor]:
    with without_tapes():
        return layer.step(x, dout)


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


def batch(tokens: int = T) -> tuple[Tensor, Tensor]:
    x, dout = (torch.randn(tokens, H, device="cuda").bfloat16() for _ in range(2))
    return x, dout


@pytest.fixture(name="runs")
def counted_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forwards and backwards of experts that were run, not played."""
    seen: list[str] = []
    for module in (bf16, fp8):
        for name in ("forward", "backward"):
            original = getattr(module, name)

            def noted(*args: Any, _original: Any = original, _name: str = name) -> Any:
                seen.append(_name)
                return _original(*args)

            monkeypatch.setattr(module, name, noted)
    return seen


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_of_one_shape_share_a_tape(recipe: str, main_grad: bool, runs: list[str]) -> None:
    layers = [Layer(RECIPES[recipe], main_grad) for _ in range(2)]
    held = []
    for call in range(6):
        for layer in layers:
            x, dout = batch()
            held += [x, torch.empty(1000 * call + 1, device="cuda")]  # so that the next ones lie elsewhere
            runs.clear()
            got = layer.step(x, dout)
            assert (runs == []) == (call > 0), runs
            assert same_bits(got, run(layer, x, dout)), (call, recipe)


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
@pytest.mark.parametrize(("fan", "biases"), [(2, True), (1, False)])
def test_layers_with_biases_and_without_gates_are_played_too(
    fan: int, biases: bool, recipe: str, runs: list[str]
) -> None:
    layer = Layer(RECIPES[recipe], main_grad=False, fan=fan, biases=biases)
    for call in range(5):
        x, dout = batch()
        runs.clear()
        got = layer.step(x, dout)
        assert not runs or call < 2 or (recipe == "fp8" and fan == 1), (runs, call)  # in FP8 that is composed
        assert same_bits(got, run(layer, x, dout)), call


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_capture_plays_and_is_replayed_with_other_data(recipe: str) -> None:
    layer, (x, dout) = Layer(RECIPES[recipe], main_grad=False), batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            layer.step(x, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.step(x, dout)
    for _ in range(3):
        for fixed, new in zip((x, dout), batch(), strict=True):
            fixed.copy_(new)
        graph.replay()
        assert same_bits(captured, run(layer, x, dout))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_play_is_on_the_stream_of_the_moment(recipe: str) -> None:
    layer, (x, dout) = Layer(RECIPES[recipe], main_grad=False), batch()
    for _ in range(4):
        want = layer.step(x, dout)
    late, side = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = layer.step(late, dout)
    side.synchronize()
    assert same_bits(got, want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_odd_addresses_and_other_sizes_come_between(recipe: str) -> None:
    layer = Layer(RECIPES[recipe], main_grad=False)
    for _ in range(4):
        for tokens in (T, 1, 0, 130):
            x, dout = batch(tokens)
            assert same_bits(layer.step(x, dout), run(layer, x, dout)), tokens
        flat = torch.randn(T * H + 1, device="cuda").bfloat16()
        odd = flat[1:].view(T, H)
        assert same_bits(layer.step(odd, dout := batch()[1]), run(layer, odd, dout))
