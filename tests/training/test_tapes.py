"""What is launched from a tape is what would be launched without: kernels, grids, numbers, and one address wherever the
run has one address; what a tape is done with may have made room for what comes later. No GPU: launches are written
down, for tensors of a CPU that pose as those of a device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorded_launches import forget_kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("triton")

from pretended_gpu import Launch, Machine, pretend_hopper

import supersonic_moe as sm
from supersonic_moe import ops
from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.inference import decode
from supersonic_moe.jit import tape
from supersonic_moe.kernels.interface import Gate
from supersonic_moe.training import layer as layer_in_one
from supersonic_moe.training import ops as training_ops

T, H, I, E, K = 40, 128, 640, 4, 2  # noqa: E741
OP, OUTSIDE = ("an op begins",), ("an op ends",)


@pytest.fixture(name="machine")
def a_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    within: list[Any] = []

    def played(function: Any, *args: Any) -> Any:
        if not within:  # a run of a layer runs ops
            machine.launches.append(OP)
        within.append(function)
        try:
            return tape.play(function, args)
        finally:
            within.pop()
            if not within:
                machine.launches.append(OUTSIDE)

    pretend_hopper(monkeypatch, machine)
    for owner in (ops, training_ops):
        monkeypatch.setattr(owner, "at_once", played)
    forget_kernels()
    yield machine
    forget_kernels()


class Layer:
    def __init__(self, entry: str, options: dict[str, Any]) -> None:
        def weight(*shape: int) -> Tensor:
            return torch.randn(shape).mul(0.1).bfloat16().requires_grad_()

        fan = 1 if options.get("activation") == "relu_sq" else 2
        self.entry, self.options = entry, dict(options)
        self.router, self.w1, self.w2 = weight(E, H), weight(E, fan * I, H), weight(E, H, I)
        if self.options.pop("turned", False):
            self.w1, self.w2 = (w.detach().mT.contiguous().mT.requires_grad_() for w in (self.w1, self.w2))
        if self.options.pop("biases", False):
            self.options |= {"b1": weight(E, fan * I), "b2": weight(E, H)}
        for w in (self.w1, self.w2):
            w.main_grad = torch.zeros(w.shape)  # type: ignore[attr-defined]
        self.scores, self.ids = torch.rand(T, K, requires_grad=True), torch.randint(E, (T, K))

    def step(self, x: Tensor, dout: Tensor) -> None:
        if self.entry == "moe_layer":
            out = sm.moe_layer(x, self.router, self.w1, self.w2, K, **self.options).output
        elif self.entry == "topk_experts":
            out = sm.topk_experts(x, self.ids, self.scores, self.w1, self.w2, **self.options)
        else:
            ends = torch.tensor([10, 20, 30, 40])
            out = sm.dispatched_experts(x, ends, self.w1, self.w2, **self.options)
        out.backward(dout)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(T, H).bfloat16().requires_grad_(), torch.randn(T, H).bfloat16()


def compare(run: list[Launch], played: list[Launch]) -> None:
    """Only tensors of an op are kept alive until here. Outside, two launches may have one address for two tensors."""
    assert len(run) == len(played)
    there: dict[int, int] = {}
    owner: dict[int, int] = {}
    gone: set[int] = set()
    inside = False
    for ours, its in zip(run, played, strict=True):
        if ours in (OP, OUTSIDE):
            inside = ours is OP
        if ours is OP or not inside:
            there, owner, gone = {0: 0}, {0: 0}, set()
        assert ours[:2] == its[:2] and len(ours) == len(its)
        together: dict[int, int] = {}
        for a, b in zip(ours[2:], its[2:], strict=True):
            if isinstance(a, tuple):
                assert a[2:] == b[2:], ours[0]
                assert there.setdefault(a[1], b[1]) == b[1] and together.setdefault(b[1], a[1]) == a[1], ours[0]
                before = owner.setdefault(b[1], a[1])
                if before != a[1]:
                    gone.add(before)
                    owner[b[1]] = a[1]
                assert a[1] not in gone, ours[0]
            else:
                assert a == b, ours[0]


RECIPES = {
    "bf16": None,
    "fp8": sm.Fp8Recipe(),
    "Z again": sm.Fp8Recipe(save_preactivation="recompute"),
    "Z and wgrad in bf16": sm.Fp8Recipe(save_preactivation="bf16", wgrad="bf16"),
    "copies not kept": sm.Fp8Recipe(scale="pow2", keep_transposed=False),
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("moe_layer", {}),
    "biases": ("moe_layer", {"biases": True}),
    "turned": ("moe_layer", {"turned": True}),
    "main_grad": ("moe_layer", {"accumulate_into_main_grad": True}),
    "halves": ("moe_layer", {"layout": "gate_up", "activation": "geglu"}),
    "ungated": ("moe_layer", {"activation": "relu_sq"}),
    "token rounding": ("moe_layer", {"router": sm.TokenRounding(tile=16)}),
    "ids": ("topk_experts", {}),
    "dispatched": ("dispatched_experts", {}),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("form", "one"), [*((form, False) for form in FORMS), *((form, True) for form in ("plain", "biases", "ids"))]
)
def test_a_tape_launches_what_a_run_launches(
    form: str, one: bool, recipe: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_in_one, "suits", lambda x, backend: one)
    entry, options = FORMS[form]
    layer = Layer(entry, options | {"recipe": RECIPES[recipe]})
    play = tape.play
    for _ in range(3):
        layer.step(*batch())
    assert not any(kept is tape._NEVER for kept in tape.state.tapes.values())
    for _ in range(3):
        x, dout = batch()
        machine.launches.clear()
        layer.step(x, dout)
        played = machine.launches.copy()
        machine.launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tape, "play", machine.run)
            layer.step(x, dout)
        assert tape.play is play and len(played) > 12
        compare(machine.launches, played)
        machine.alive.append(x)


class Held(TorchDispatchMode):
    """The most bytes of new tensors that were there at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in tape._ALLOCATIONS:
            size = result.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(result, self.gone, size)
        return result

    def gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("sizes", [(4096, 1536, 768, 8, 8), (8192, 1024, 384, 64, 4), (2048, 2048, 2048, 8, 2)])
@pytest.mark.parametrize("recipe", ["bf16", "fp8", "Z and wgrad in bf16"])
def test_a_tape_holds_about_as_much_as_a_run(
    recipe: str, sizes: tuple[int, ...], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, hidden, width, experts, k = sizes
    runs: dict[Any, int] = {}

    def run(function: Any, *args: Any) -> Any:
        with Held() as held:
            result = function(*args)
        runs[function] = held.most
        return result

    def step() -> None:
        x, router, w1, w2 = (
            torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
            for shape in ((tokens, hidden), (experts, hidden), (experts, 2 * width, hidden), (experts, hidden, width))
        )
        sm.moe_layer(x, router, w1, w2, k, recipe=RECIPES[recipe]).output.backward(torch.empty(x.shape).bfloat16())

    with monkeypatch.context() as patch:
        for owner in (ops, training_ops):
            patch.setattr(owner, "at_once", run)
        step()
    for _ in range(2):
        step()
    assert len(runs) >= 2 and len(tape.state.tapes) == len(runs)
    for (function, _), kept in tape.state.tapes.items():
        assert kept is not None and kept is not tape._NEVER
        results = sum(math.prod(form.shape) * form.dtype.itemsize for form in kept._made)
        assert kept._workspace + results < 1.15 * runs[function] + 10**6, function


def test_decode_is_played(machine: Machine) -> None:
    """Weights as gpt-oss stores them, seen anew in each call."""
    w1, w2 = torch.randn(E, H, 2 * I).bfloat16(), torch.randn(E, I, H).bfloat16()
    b1, b2, ids = torch.randn(E, 2 * I).bfloat16(), torch.randn(E, H).bfloat16(), torch.randint(E, (3, K))
    gate = Gate(Activation.gpt_oss(), GateUpLayout.INTERLEAVED)

    def step(x: Tensor, scores: Tensor) -> None:
        with torch.no_grad():
            decode.run(decode.Operands(x, ids, scores, w1.mT, b1, w2.mT, b2), gate)

    for _ in range(3):
        given = torch.randn(3, H).bfloat16(), torch.rand(3, K)
        step(*given)
    assert not any(kept is tape._NEVER for kept in tape.state.tapes.values())
    machine.launches.clear()
    step(*given)
    played = machine.launches.copy()
    machine.launches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape, "play", machine.run)
        step(*given)
    assert len(played) == 1 + 3 + 1
    compare(machine.launches, played)
