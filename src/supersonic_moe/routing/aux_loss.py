"""Auxiliary losses of the router; scalars in fp32 (fp64 for fp64 logits), differentiable with respect to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.autograd import apply
from supersonic_moe.kernels.reference.aux_loss import switch_loss_backward as differentiable_backward
from supersonic_moe.routing.topk import router_kernels


def switch_load_balancing_loss(router_logits_TE: Tensor, expert_counts_E: Tensor, *, backend: str = "auto") -> Tensor:
    """The Switch Transformer's load-balancing loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6, without its alpha).

        loss = E * sum_e f_e P_e      f_e = counts_e / sum(counts)       P_e = (1/T) sum_t softmax(logits_t)_e

    f_e is the share of the routed (token, expert) pairs that expert e received (a constant: counting has no
    derivative), P_e the share of probability that the router gave it. Uniform routing gives 1, everything on one expert
    gives E. With K choices a token f still sums to 1, as in SonicMoE; implementations that divide the counts by T give
    K times this value. T = 0, or no routed pair, gives 0.

    Args:
        router_logits_TE: (T, E).
        expert_counts_E: (E,) tokens routed to each expert, integer or float.
        backend: see ``kernels/registry.py``.
    """
    _check_logits(router_logits_TE)
    checks.tensor("expert_counts", expert_counts_E, 1, "(E,)")
    num_experts = router_logits_TE.shape[1]
    checks.size("expert_counts", "length", expert_counts_E.shape[0], num_experts, "the number of experts")
    checks.same_device("router_logits", router_logits_TE, "expert_counts", expert_counts_E)
    loss: Tensor = apply(_SwitchLoss, router_logits_TE, expert_counts_E, backend)
    return loss


def router_z_loss(router_logits_TE: Tensor) -> Tensor:
    """ST-MoE's router z-loss (Zoph et al. 2022, arXiv 2202.08906, eq. 5): mean over tokens of logsumexp(logits_t)^2.

    Keeps logits small, so that the softmax stays accurate in low precision. T = 0 gives 0.
    """
    _check_logits(router_logits_TE)
    acc = torch.promote_types(router_logits_TE.dtype, torch.float32)
    return router_logits_TE.to(acc).logsumexp(1).square().sum() / max(router_logits_TE.shape[0], 1)


def _check_logits(logits: Tensor) -> None:
    checks.tensor("router_logits", logits, 2, "(T, E)")
    checks.floating("router_logits", logits)


# ---- the ops: switch_loss_forward, switch_loss_backward --------------------------------------------------------------

torch.library.define("supersonic_moe::switch_loss_forward", "(Tensor logits, Tensor counts, str backend) -> Tensor")
torch.library.define(
    "supersonic_moe::switch_loss_backward", "(Tensor dloss, Tensor logits, Tensor counts, str backend) -> Tensor"
)


@torch.library.impl("supersonic_moe::switch_loss_forward", ("cpu", "cuda"))
def _forward(logits: Tensor, counts: Tensor, backend: str) -> Tensor:
    return router_kernels(logits, backend).switch_loss_forward(logits.contiguous(), counts.contiguous())


@torch.library.impl("supersonic_moe::switch_loss_backward", ("cpu", "cuda"))
def _backward(dloss: Tensor, logits: Tensor, counts: Tensor, backend: str) -> Tensor:
    return router_kernels(logits, backend).switch_loss_backward(dloss, logits.contiguous(), counts.contiguous())


@torch.library.register_fake("supersonic_moe::switch_loss_forward")  # type: ignore[untyped-decorator]
def _forward_fake(logits: Tensor, counts: Tensor, backend: str) -> Tensor:
    return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.register_fake("supersonic_moe::switch_loss_backward")  # type: ignore[untyped-decorator]
def _backward_fake(dloss: Tensor, logits: Tensor, counts: Tensor, backend: str) -> Tensor:
    return logits.new_empty(logits.shape)


class _SwitchLoss(torch.autograd.Function):
    """Saves the logits, alive anyway as the router's output, and the counts."""

    @staticmethod
    def forward(logits: Tensor, counts: Tensor, backend: str) -> Tensor:
        loss: Tensor = torch.ops.supersonic_moe.switch_loss_forward.default(logits, counts, backend)
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        logits, counts, ctx.backend = inputs
        ctx.save_for_backward(logits, counts)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph: the op has no derivative, plain torch has
            return differentiable_backward(dloss, *ctx.saved_tensors), None, None
        return torch.ops.supersonic_moe.switch_loss_backward.default(dloss, *ctx.saved_tensors, ctx.backend), None, None
