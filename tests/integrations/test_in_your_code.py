"""Ways of use of docs/in-your-code.md that need nothing but a CPU: each must give the gradients of the plain layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import supersonic_moe as sm

PAGE = Path(__file__).parents[2] / "docs" / "in-your-code.md"

Call = Callable[[Tensor], tuple[Tensor, Tensor]]


def moe() -> sm.MoE:
    torch.manual_seed(0)
    return sm.MoE(4, 2, 32, 16, "swiglu", True, 0.1)


def loss(out: Tensor, aux_loss: Tensor) -> Tensor:
    return out.square().sum() + aux_loss


def gradients(layer: nn.Module, call: Call) -> list[Tensor]:
    """Of the input and of every parameter."""
    x = torch.linspace(-1, 1, 24 * 32).sin().view(24, 32).requires_grad_()
    loss(*call(x)).backward()
    found = [x.grad, *(p.grad for p in layer.parameters())]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def within(context: Callable[[], object]) -> Callable[[nn.Module], Call]:
    def wrap(layer: nn.Module) -> Call:
        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            with context():
                return layer(x)

        return call

    return wrap


def hooked(layer: nn.Module) -> Call:
    layer.register_forward_pre_hook(lambda module, args: None)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    for parameter in layer.parameters():
        parameter.register_hook(lambda grad: grad.clone())
    return layer


WAYS: dict[str, Callable[[nn.Module], Call]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": lambda layer: fully_shard(layer, mesh=init_device_mesh("cpu", (1,))),
    "checkpoint": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=False),
    "reentrant checkpoint": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=True),
    "save_on_cpu": within(save_on_cpu),
    "saved_tensors_hooks": within(lambda: saved_tensors_hooks(torch.clone, torch.clone)),
    "hooks": hooked,
    "functional_call": lambda layer: lambda x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_use_give_the_same_gradients(way: str) -> None:
    plain = moe()
    used = copy.deepcopy(plain)
    for got, want in zip(gradients(used, WAYS[way](used)), gradients(plain, plain), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


def test_functional_gradient() -> None:
    layer, x = moe(), torch.randn(24, 32)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(*layer(x)))(x), torch.autograd.grad(loss(*layer(leaf)), leaf)[0]
    )


def test_the_page_names_tests_that_exist() -> None:
    named = re.findall(r"\[`(\w+)`\]\((\.\./tests/[\w/]+\.py)\)", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    for test, file in named:
        assert f"def {test}(" in (PAGE.parent / file).read_text(encoding="utf-8"), f"{file} has no {test}"
