"""The layer in fp16: on a GPU by Triton's products, without the reference's wait for the host. On a CPU interpreted."""

from __future__ import annotations

import copy

import pytest
import torch
from host_waits import no_host_waits

pytest.importorskip("triton")

import oracle

import supersonic_moe as sm
from supersonic_moe.kernels import registry

T, H, I, E, K = 70, 64, 24, 5, 2  # noqa: E741


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu_sq"])
def test_training_step_against_fp64(activation: str, main_grad: bool, device: torch.device) -> None:
    torch.manual_seed(1)
    moe = sm.MoE(E, K, H, I, activation, True, 0.3, router_dtype=torch.float32, accumulate_into_main_grad=main_grad)
    moe = moe.to(device, torch.float16)
    exact = copy.deepcopy(moe).double()
    exact.accumulate_into_main_grad = False
    if main_grad:
        for weight in (moe.c_fc.weight, moe.c_proj.weight):
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    x = torch.randn(T, H, device=device, dtype=torch.float16)
    results = []
    for layer, given, backend in (
        (moe, x, sm.KernelBackendMoE.triton),
        (exact, x.double(), sm.KernelBackendMoE.torch),
    ):
        given = given.clone().requires_grad_()
        out, aux_loss = layer(given, kernel_backend_moe=backend)
        (out.to(torch.float64).square().sum() + aux_loss).backward()
        grads = {name: getattr(p, "main_grad", p.grad) for name, p in layer.named_parameters()}
        results.append({"out": out.detach(), "dx": given.grad, **grads})
    got, want = results
    assert got["out"].dtype is torch.float16
    for name in want:
        assert oracle.rel_fro(got[name], want[name]) < 2e-3, name


def test_the_choice_of_the_backend() -> None:
    """On a GPU, whatever its capability, fp16 is Triton's."""
    cuda = torch.device("cuda")
    choice = registry.choose(cuda, torch.float16, hidden=64, intermediate=24)
    assert choice.name == "triton" and "the sm_90 kernels need bfloat16, the inputs are float16" in choice.reason
    with pytest.raises(ValueError, match="backend 'sm90' cannot run this call: the sm_90 kernels need bfloat16"):
        registry.choose(cuda, torch.float16, hidden=64, intermediate=24, backend="sm90")


@pytest.mark.gpu
def test_nothing_waits_for_the_host() -> None:
    moe = sm.MoE(E, K, H, I, "swiglu", True, 0.3).to("cuda", torch.float16)
    x = torch.randn(T, H, device="cuda", dtype=torch.float16, requires_grad=True)

    def step() -> None:
        out, aux_loss = moe(x)
        (out.float().sum() + aux_loss).backward()

    step()  # compiles
    with no_host_waits():
        step()
    assert all(p.grad.isfinite().all() for p in moe.parameters())
