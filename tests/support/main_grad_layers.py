"""A layer that accumulates into ``main_grad`` beside its plain twin, a step of either, and Megatron's hooks."""

from __future__ import annotations

import torch

import supersonic_moe as sm

T, H, I, E, K = 13, 16, 8, 5, 2  # noqa: E741
SIZES = (13, 0, 1, 40)  # tokens of the micro-batches


def weights_of(moe):
    return moe.c_fc.weight, moe.c_proj.weight


def give_main_grads(moe, *, zero=False):
    for w in weights_of(moe):
        make = torch.zeros if zero else torch.randn
        w.main_grad = make(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
    return [w.main_grad.clone() for w in weights_of(moe)]


def twins(dtype=torch.float64, device="cpu", **kwargs):
    """The same layer without and with the option."""
    plain, fused = (
        sm.MoE(E, K, H, I, "swiglu", True, 0.5, accumulate_into_main_grad=on, **kwargs).to(device, dtype)
        for on in (False, True)
    )
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def step(moe, x, backend=sm.KernelBackendMoE.auto, wrap=None):
    x = x.clone().requires_grad_()
    out, aux = moe(x, backend) if wrap is None else wrap(moe, x)
    (out.double().square().sum() + aux).backward()
    return x.grad


def others(moe):
    return {name: p for name, p in moe.named_parameters() if not any(p is w for w in weights_of(moe))}


class MegatronHooks:
    """What Megatron's DistributedDataParallel does with overlapped reduction: a hook on the node that accumulates
    ``.grad`` moves the gradient to main_grad, unless the layer has done so, and counts the parameter as ready.
    """

    def __init__(self, moe, zero_out_wgrad):
        self.ready, self.nodes = [], []
        for name, p in moe.named_parameters():
            p.main_grad, p.grad_added_to_main_grad = torch.zeros_like(p, dtype=torch.float32), False
            p.zero_out_wgrad = zero_out_wgrad
            node = p.expand_as(p).grad_fn.next_functions[0][0]
            node.register_hook(lambda *_, name=name, p=p: self.hook(name, p))
            self.nodes.append(node)

    def hook(self, name, p):
        assert p.grad is not None, "a parameter without gradient would stall the overlapped reduction"
        if not p.grad_added_to_main_grad or p.zero_out_wgrad:
            p.main_grad.add_(p.grad)
        p.grad = None
        self.ready.append(name)
