"""Private names of torch and Triton: where they may be used, and that each substitute gives the right result."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from supersonic_moe import MoE, autograd, constant_weights, private_api
from supersonic_moe.config.recipe import Fp8Recipe

SOURCE = Path(private_api.__file__).parent
ALLOWED = {
    ("private_api.py", "torch"),
    ("cli/health.py", "torch.distributed._symmetric_memory"),  # imported to see whether it is there
    ("moe.py", "super()._apply"),  # what .to() and .cuda() call on every module: test_moe.py sees the bias stay fp32
}


def private_names(path: Path) -> dict[str, int]:
    """Private attributes of anything but the file's own objects, and private modules: name -> line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=attr) if _private(attr):
                base = ast.unparse(value)
                if base not in ("self", "cls") and (attr not in own or base == "super()") and attr != "_replace":
                    found[f"{base}.{attr}"] = node.lineno
            case ast.ImportFrom(module=str(module)):
                for name in (module, *(f"{module}.{alias.name}" for alias in node.names)):
                    if module.split(".")[0] != "supersonic_moe" and any(map(_private, name.split("."))):
                        found[name] = node.lineno
            case ast.Import(names=names):
                found |= {alias.name: node.lineno for alias in names if any(map(_private, alias.name.split(".")))}
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(attr)), *_]) if _private(attr):
                found[f"getattr {attr}"] = node.lineno
    return found


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_are_in_one_place() -> None:
    assert {"torch._C._cuda_getDevice", "getattr _version"} <= set(private_names(SOURCE / "private_api.py"))
    stray = [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in SOURCE.rglob("*.py")
        for name, line in private_names(path).items()
        if path.name != "private_api.py" and (str(path.relative_to(SOURCE)), name) not in ALLOWED
    ]
    assert not stray, f"use or extend supersonic_moe/private_api.py, which has a substitute for each name: {stray}"


# ---- without the private names, the public way gives the same --------------------------------------------------------


class Missing:
    """``torch._C`` without some of its names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getattr__(self, name: str) -> Any:
        if name in self.names:
            raise AttributeError(name)
        return getattr(torch._C, name)


@pytest.fixture
def without_c_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_are_functorch_transforms_active")
    stand_in = SimpleNamespace(_C=Missing(*names), cuda=torch.cuda, autograd=torch.autograd)
    monkeypatch.setattr(private_api, "torch", stand_in)


def test_device_and_stream_are_asked_of_torch_cuda(without_c_names: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device))
    assert (private_api.current_device(), private_api.raw_stream(2)) == (3, 102)


class Square(torch.autograd.Function):
    bindings = 0

    @staticmethod
    def forward(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return factor * x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return 2 * ctx.factor * ctx.saved_tensors[0] * grad, None

    @classmethod
    def apply(cls, *args: Any) -> Any:
        cls.bindings += 1
        return super().apply(*args)


def squared() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Result, gradient, and how often torch bound the arguments."""
    x = torch.arange(4.0, requires_grad=True)
    before = Square.bindings
    y = autograd.apply(Square, x, 3.0)
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, Square.bindings - before


def test_autograd_functions_are_applied_by_torch_itself(without_c_names: None) -> None:
    assert not private_api.base_applies()
    y, dx, bindings = squared()
    assert bindings == 1 and y.tolist() == [0, 3, 12, 27] and dx.tolist() == [0, 6, 12, 18]


def test_the_same_where_the_base_class_has_no_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    direct = squared()
    assert direct[2] == 0
    monkeypatch.setattr(private_api, "_BASE_APPLIES", False)
    substitute = squared()
    assert substitute[2] == 1
    assert torch.equal(direct[0], substitute[0]) and torch.equal(direct[1], substitute[1])


def test_transforms_of_torch_func_go_through_torch() -> None:
    before = Square.bindings
    dx = torch.func.grad(lambda x: autograd.apply(Square, x, 3.0).sum())(torch.arange(4.0))
    assert dx.tolist() == [0, 6, 12, 18] and Square.bindings > before


class Unversioned:
    """A tensor without the private attributes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        if name in ("_base", "_version"):
            raise AttributeError(name)
        return getattr(self.tensor, name)


def test_a_tensor_without_a_version_never_counts_as_unchanged() -> None:
    tensor = torch.zeros(4)
    view = tensor[1:]
    assert private_api.base_of(view) is tensor and private_api.base_of(tensor) is tensor
    assert private_api.version_of(tensor) == private_api.version_of(tensor) == 0
    bare: Any = Unversioned(view)
    assert private_api.base_of(bare) is bare
    assert len({private_api.version_of(bare), private_api.version_of(bare), private_api.version_of(tensor)}) == 3


def test_weights_without_versions_are_quantized_in_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoE(2, 1, 128, 128, "swiglu", add_bias=False, std=0.02, recipe=Fp8Recipe()).to(torch.bfloat16)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    monkeypatch.setattr("supersonic_moe.quantization.weight_cache.version_of", lambda _: next(numbers))
    numbers = itertools.count()
    with constant_weights(moe), torch.no_grad():
        before = moe(x)[0]
        for weight in (moe.c_fc.weight, moe.c_proj.weight):
            weight.data.mul_(2)  # shows no sign: with a version the old copies would serve
        assert not torch.equal(moe(x)[0], before)


def test_pairs_of_tensors_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[float]:
        targets = [torch.zeros(2), torch.ones(3)]
        private_api.add_each(targets, [torch.ones(2), torch.full((3,), 2.0)])
        private_api.copy_each(targets[:1], [targets[0] * 5])
        return [x for target in targets for x in target.tolist()]

    expected = run()
    monkeypatch.setattr(private_api, "torch", SimpleNamespace())
    assert run() == expected == [5, 5, 3, 3, 3]


def test_a_torch_without_sleep_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_api, "torch", SimpleNamespace(cuda=SimpleNamespace(), __version__="9.9"))
    with pytest.raises(RuntimeError, match=r"needs torch\.cuda\._sleep, which torch 9\.9 does not have"):
        private_api.gpu_sleep(1)


def test_the_correction_bias_stays_fp32_through_the_private_hook_of_modules() -> None:
    moe = MoE(4, 2, 16, 8, "swiglu", add_bias=False, std=0.02, router="sigmoid_grouped_topk")
    nn.Sequential(moe).to(torch.bfloat16)
    assert moe.correction_bias is not None and moe.correction_bias.dtype is torch.float32
