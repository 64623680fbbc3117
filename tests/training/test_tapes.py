"""What is launched from a tape is what would be launched without: kernels, grids, numbers, and one address wherever the
run has one address. No GPU: launches are written down, for tensors of a CPU that pose as those of a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorded_launches import forget_kernels
from torch import Tensor

pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("triton")

from pretended_gpu import pretend_gpu

import supersonic_moe as sm
from supersonic_moe import ops
from supersonic_moe.jit import launch as launch_module
from supersonic_moe.jit import signature, tape
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.sm90 import gemm_config
from supersonic_moe.private_api import DispatchMode
from supersonic_moe.training import ops as training_ops

T, H, I, E, K = 40, 128, 640, 4, 2  # noqa: E741
OP = ("an op begins",)
Launch = tuple[Any, ...]
"""Kernel, grid, and arguments: ("at", address, what else a tensor map says), or a number."""


class Machine:
    """Launches in order, and the tensors of the step that must not make room for others before it is compared."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.alive: list[Tensor] = []
        self.maps: dict[bytes, Launch] = {}
        self.numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        from cuda.bindings import driver

        return getattr(driver, name)

    def map_of(self, address: int, *tiles: Any) -> bytes:
        made = next(self.numbers).to_bytes(128, "little")
        self.maps[made] = ("at", address, tiles)
        return made

    def launched(self, slots: Any) -> tuple[int]:
        parsed = slots._made_of[2]
        found: list[Any] = []
        values = parsed.slots()[0].unpack_from(slots.buffer, slots.offset)
        for parameter, value in zip(parsed.parameters, values, strict=True):
            if parameter.kind is signature.TENSOR_MAP:
                found.append(self.maps[value])
            else:
                found.append(("at", value) if parameter.kind is signature.POINTER else value)
        self.launches.append((parsed.kernel, slots._grid, *found))
        return (0,)

    def get(self, key: Any) -> Any:
        """A Triton launcher. ``key``: what the kernel is specialized for, argument by argument."""
        kernel, _, _, _, *signs = key

        def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
            arguments = list(rest[3:])
            for i, sign in enumerate(signs):
                if isinstance(sign, tuple) and isinstance(sign[0], torch.dtype):
                    arguments[i] = ("at", arguments[i])
            self.launches.append((kernel, (x, y, z), *arguments))

        return run, None, None

    def allocate(self, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        self.alive.append(torch.empty_strided(shape, stride, dtype=dtype))
        return self.alive[-1]

    def run(self, function: Any, args: Any) -> Any:
        """Without a tape."""
        alive = self.alive

        class Keep(DispatchMode):  # type: ignore[misc, valid-type]
            def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = op(*args, **(kwargs or {}))
                alive.append(result)
                return result

        with Keep():
            return function(*args)


@pytest.fixture(name="machine")
def a_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine, init = Machine(), launch_module._Slots.__init__

    def noting(self: Any, *args: Any) -> None:
        init(self, *args)
        self._launch = lambda *_: machine.launched(self)

    def played(function: Any, *args: Any) -> Any:
        machine.launches.append(OP)
        return tape.play(function, args)

    pretend_gpu(monkeypatch, machine, map_of=machine.map_of, allocate=machine.allocate)
    for owner, name, value in (
        (launch_module, "call", lambda *_: 0),
        (launch_module._Slots, "__init__", noting),
        (gemm_config, "multiprocessors", lambda device: 132),
        (registry, "choose", lambda *_, **__: registry.Choice("sm90", "")),
        (registry, "choose_fp8", lambda *_, **__: registry.Choice("sm90", "")),
        (ops, "at_once", played),
        (training_ops, "at_once", played),
    ):
        monkeypatch.setattr(owner, name, value)
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
    assert len(run) == len(played)
    there: dict[int, int] = {}
    back: dict[int, int] = {}
    for ours, its in zip(run, played, strict=True):
        if ours is OP:  # tensors outside ops are not kept alive
            there, back = {0: 0}, {0: 0}
        assert ours[:2] == its[:2] and len(ours) == len(its)
        for a, b in zip(ours[2:], its[2:], strict=True):
            if isinstance(a, tuple):
                assert a[2:] == b[2:], ours[0]
                assert there.setdefault(a[1], b[1]) == b[1] and back.setdefault(b[1], a[1]) == a[1], ours[0]
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
@pytest.mark.parametrize("form", FORMS)
def test_a_tape_launches_what_a_run_launches(form: str, recipe: str, machine: Machine) -> None:
    entry, options = FORMS[form]
    layer = Layer(entry, options | {"recipe": RECIPES[recipe]})
    play = tape.play
    for _ in range(3):
        layer.step(*batch())
    if form == "ungated" and recipe in ("fp8", "copies not kept"):  # Z is made fp32 again by torch
        assert sum(kept is tape._NEVER for kept in tape.state.tapes.values()) == 1
        return
    assert all(type(kept) is tape.Tape for kept in tape.state.tapes.values())
    for _ in range(3):
        x, dout = batch()
        machine.launches.clear()
        layer.step(x, dout)
        played = machine.launches.copy()
        machine.launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tape, "play", machine.run)
            layer.step(x, dout)
        assert tape.play is play and len(played) > 8
        compare(machine.launches, played)
        machine.alive.append(x)
