"""FP8 tensors whose strides mean something, after hooks on saved tensors that keep values alone: offloading to a file,
to another process, or ``save_on_cpu``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fp8_moe import moe, tokens
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from supersonic_moe import Fp8Recipe
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Quantized, Rows
from supersonic_moe.quantization.block_format import E4M3, aligned_rows, empty_e4m3, empty_scales, transposed_scales

RECIPES = [Fp8Recipe(), Fp8Recipe(save_preactivation="recompute", wgrad="bf16"), Fp8Recipe(save_preactivation="bf16")]
HOOKS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: saved_tensors_hooks(Tensor.contiguous, lambda t: t),
    "save_on_cpu": save_on_cpu,
}


class Checked:
    """FP8 kernels that look at the layout of what a product loads by TMA."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.seen = kernels, 0

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)
        if not (name.startswith("down_backward") or name == "grouped_mm_fp8"):
            return kernel

        def checked(*args: Any, **kwargs: Any) -> Any:
            for q, scale in self._loaded(args):
                self.seen += 1
                assert q.stride(-1) == 1 and all(stride % 16 == 0 for stride in q.stride()[:-1]), q.stride()
                assert scale is None or (scale.stride(0) == 1 and scale.stride(1) % 4 == 0), scale.stride()
            return kernel(*args, **kwargs)

        return checked

    def _loaded(self, args: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """e4m3 operands, each with its scales where those have a layout too: of rows that no index reads."""
        for arg in args:
            operand, index = arg if isinstance(arg, Rows) else (arg, None)
            if not isinstance(operand, Quantized):
                yield from self._loaded(operand if isinstance(operand, tuple) else ())
            elif operand.q.dtype is E4M3:
                yield operand.q, operand.scale if operand.q.dim() == 2 and index is None else None


def gradients(recipe: Fp8Recipe, hooks: Callable[[], Any] | None, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    layer, x = moe(recipe).to(device), tokens().to(device).requires_grad_()
    with contextlib.nullcontext() if hooks is None else hooks():
        out, _ = layer(x)
    out.float().square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.save_preactivation)
def test_kernels_get_layouts_whatever_a_hook_brought_back(recipe, hooks, monkeypatch) -> None:
    want = gradients(recipe, None)
    checked = Checked(registry.fp8_kernels("reference"))
    monkeypatch.setattr(registry, "fp8_kernels", lambda name: checked)
    assert all(torch.equal(a, b) for a, b in zip(gradients(recipe, hooks), want, strict=True))
    assert checked.seen >= 5


def test_a_layout_that_was_kept_is_not_copied() -> None:
    q, scale = empty_e4m3(torch.empty(0), 3, 5, 40), empty_scales(torch.empty(0), 5, 3, tma=True)
    assert aligned_rows(q) is q and transposed_scales(scale) is scale
    assert aligned_rows(q.contiguous().mT.contiguous().mT).stride() == q.stride()
    assert transposed_scales(scale.contiguous()).stride() == scale.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.save_preactivation)
def test_gpu_gradients_are_those_without_hooks(recipe, hooks) -> None:
    want = gradients(recipe, None, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(gradients(recipe, hooks, "cuda"), want, strict=True))
