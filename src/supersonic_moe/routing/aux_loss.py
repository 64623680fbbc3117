"""Auxiliary losses of the router; scalars in fp32 (fp64 for fp64 logits), differentiable with respect to the logits.

A load-balancing loss compares two shares of each expert: f_e of the routed (token, expert) pairs, a constant because
counting has no derivative, and P_e of the probability that the router gave. P comes from the scores that the router
weighs by: the softmax of the logits, or for a sigmoid router their sigmoids over the sum of all E of them, as in
DeepSeek-V3 (arXiv 2412.19437, eq. 17-20) and Megatron. Over how many tokens the shares are taken makes three losses:

==============  ====================================================  ==================================================
over            call                                                  source
==============  ====================================================  ==================================================
micro-batch     ``switch_load_balancing_loss`` with its own counts    Switch Transformer (arXiv 2101.03961, eq. 4-6)
global batch    the same with counts summed over ranks and            Qiu et al. 2025 (arXiv 2501.11873); Megatron's
                micro-batches; its mean over them is the loss of      ``global_aux_loss``
                the whole batch
each sequence   ``sequence_load_balancing_loss``                      DeepSeek-V3; Megatron's ``seq_aux_loss``
==============  ====================================================  ==================================================

All take a ``token_mask``, False for padding: those tokens are in no mean and get no gradient. Counts must leave them
out too, as those of a layer with this mask do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.autograd import apply
from supersonic_moe.config.router import SigmoidGroupedTopK, TokenRounding, TopKRouter, as_router
from supersonic_moe.kernels.reference.aux_loss import probabilities, shares
from supersonic_moe.kernels.reference.aux_loss import switch_loss_backward as differentiable_backward
from supersonic_moe.ops import caller
from supersonic_moe.routing.topk import router_kernels


def switch_load_balancing_loss(
    router_logits_TE: Tensor,
    expert_counts_E: Tensor,
    *,
    router: TopKRouter | TokenRounding | str = "softmax_after_topk",
    token_mask_T: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The Switch Transformer's load-balancing loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6, without its alpha).

        loss = E * sum_e f_e P_e      f_e = counts_e / sum(counts)       P_e = (1/T) sum_t p_te

    p_t is the softmax of the token's logits, or with a sigmoid router sigmoid(logits_t) / sum_e sigmoid(logits_te).
    Uniform routing gives 1, everything on one expert gives E (with a softmax). With K choices a token f still sums to
    1, as in SonicMoE; implementations that divide the counts by T give K times this value. T = 0, or no routed pair,
    gives 0.

    Args:
        router_logits_TE: (T, E).
        expert_counts_E: (E,) tokens routed to each expert, integer or float. Counts of the global batch give the
            global-batch loss: add up those of all ranks (``all_reduce``) and micro-batches first.
        router: the router's config or name: whether probabilities come from sigmoids.
        token_mask_T: (T,) bool, False where a token is padding.
        backend: see ``kernels/registry.py``; with a mask always plain torch.
    """
    _check_logits(router_logits_TE)
    checks.tensor("expert_counts", expert_counts_E, 1, "(E,)")
    num_experts = router_logits_TE.shape[1]
    checks.size("expert_counts", "length", expert_counts_E.shape[0], num_experts, "the number of experts")
    checks.same_device("router_logits", router_logits_TE, "expert_counts", expert_counts_E)
    if token_mask_T is not None:
        checks.token_mask("token_mask", token_mask_T, router_logits_TE)
        padding_T1 = ~token_mask_T[:, None]
        p_TE = probabilities(router_logits_TE.masked_fill(padding_T1, 0), _sigmoid(router)).masked_fill(padding_T1, 0)
        p_E = _mean(p_TE.sum(0), token_mask_T)
        return num_experts * torch.dot(p_E, shares(expert_counts_E, p_E.dtype))
    loss: Tensor = apply(_SwitchLoss, router_logits_TE, expert_counts_E, backend, _sigmoid(router))
    return loss


def sequence_load_balancing_loss(
    router_logits_BSE: Tensor,
    expert_counts_BE: Tensor,
    *,
    router: TopKRouter | TokenRounding | str = "softmax_after_topk",
    token_mask_BS: Tensor | None = None,
) -> Tensor:
    """The mean over B sequences of each one's ``switch_load_balancing_loss`` (DeepSeek-V3, arXiv 2412.19437, eq. 17-20,
    without its alpha): keeps single sequences balanced where the batch is.

    Args:
        router_logits_BSE: (B, S, E), S tokens a sequence.
        expert_counts_BE: (B, E) tokens of each sequence that were routed to each expert, integer or float;
            ``sequence_expert_counts`` counts them.
        router: as in ``switch_load_balancing_loss``.
        token_mask_BS: (B, S) bool, False where a token is padding. A sequence of padding alone counts as 0.
    """
    checks.tensor("router_logits", router_logits_BSE, 3, "(B, S, E)")
    checks.floating("router_logits", router_logits_BSE)
    checks.tensor("expert_counts", expert_counts_BE, 2, "(B, E)")
    sequences, length, num_experts = router_logits_BSE.shape
    want = (sequences, num_experts)
    checks.size("expert_counts", "shape", tuple(expert_counts_BE.shape), want, "sequences and experts of the logits")
    checks.same_device("router_logits", router_logits_BSE, "expert_counts", expert_counts_BE)
    if token_mask_BS is None:
        p_BSE = probabilities(router_logits_BSE, _sigmoid(router))
        p_BE = p_BSE.sum(1) / max(length, 1)
    else:
        checks.token_mask("token_mask", token_mask_BS, router_logits_BSE)
        padding_BS1 = ~token_mask_BS[..., None]
        p_BSE = probabilities(router_logits_BSE.masked_fill(padding_BS1, 0), _sigmoid(router))
        p_BE = _mean(p_BSE.masked_fill(padding_BS1, 0).sum(1), token_mask_BS)
    return num_experts / max(sequences, 1) * (p_BE * shares(expert_counts_BE, p_BE.dtype)).sum()


def sequence_expert_counts(topk_ids_TK: Tensor, num_sequences: int, num_experts: int) -> Tensor:
    """(B, E) int32: how many of the choices of each of B sequences of T / B consecutive tokens went to each expert. Ids
    outside [0, E) are skipped. Nothing waits for the device.

    Args:
        topk_ids_TK: (T, K) int32 or int64, from ``route``.
        num_sequences: B, a divisor of T.
        num_experts: E.
    """
    checks.ids("topk_ids", topk_ids_TK, 2)
    checks.positive("num_sequences", num_sequences)
    checks.positive("num_experts", num_experts)
    num_tokens, k = topk_ids_TK.shape
    if num_tokens % num_sequences:
        raise ValueError(
            f"num_sequences must divide the tokens of topk_ids; got {num_sequences} sequences and {num_tokens} tokens. "
            "Give the number of sequences of this batch."
        )
    ids_BN = topk_ids_TK.reshape(num_sequences, num_tokens // num_sequences * k).long()
    slot_BN = torch.where((ids_BN >= 0) & (ids_BN < num_experts), ids_BN, num_experts)  # E: a column that is cut off
    counts_BE = ids_BN.new_zeros(num_sequences, num_experts + 1, dtype=torch.int32)
    return counts_BE.scatter_add_(1, slot_BN, torch.ones_like(slot_BN, dtype=torch.int32))[:, :-1]


def router_z_loss(router_logits_TE: Tensor, *, token_mask_T: Tensor | None = None) -> Tensor:
    """ST-MoE's router z-loss (Zoph et al. 2022, arXiv 2202.08906, eq. 5): mean over tokens of logsumexp(logits_t)^2,
    or over those where ``token_mask_T`` (T,) is True.

    Keeps logits small, so that the softmax stays accurate in low precision. No tokens give 0.
    """
    _check_logits(router_logits_TE)
    acc = torch.promote_types(router_logits_TE.dtype, torch.float32)
    if token_mask_T is None:
        return router_logits_TE.to(acc).logsumexp(1).square().sum() / max(router_logits_TE.shape[0], 1)
    checks.token_mask("token_mask", token_mask_T, router_logits_TE)
    z_T = router_logits_TE.to(acc).masked_fill(~token_mask_T[:, None], 0).logsumexp(1)
    return _mean(z_T.square().masked_fill(~token_mask_T, 0).sum(), token_mask_T)


def _mean(sums: Tensor, token_mask: Tensor) -> Tensor:
    """``sums`` over tokens that are no padding, divided by their number: one for a mask (T,), (B, 1) for (B, S)."""
    tokens = token_mask.sum(-1, keepdim=token_mask.dim() > 1)
    return sums / tokens.clamp(min=1)


def _sigmoid(router: TopKRouter | TokenRounding | str) -> bool:
    """Whether a router weighs by sigmoids."""
    config = as_router(router)
    return isinstance(config.base if isinstance(config, TokenRounding) else config, SigmoidGroupedTopK)


def _check_logits(logits: Tensor) -> None:
    checks.tensor("router_logits", logits, 2, "(T, E)")
    checks.floating("router_logits", logits)


# ---- the ops: switch_loss_forward, switch_loss_backward --------------------------------------------------------------

torch.library.define(
    "supersonic_moe::switch_loss_forward", "(Tensor logits, Tensor counts, str backend, bool sigmoid=False) -> Tensor"
)
torch.library.define(
    "supersonic_moe::switch_loss_backward",
    "(Tensor dloss, Tensor logits, Tensor counts, str backend, bool sigmoid=False) -> Tensor",
)


def _forward(logits: Tensor, counts: Tensor, backend: str, sigmoid: bool = False) -> Tensor:
    return router_kernels(logits, backend).switch_loss_forward(logits.contiguous(), counts.contiguous(), sigmoid)


def _backward(dloss: Tensor, logits: Tensor, counts: Tensor, backend: str, sigmoid: bool = False) -> Tensor:
    kernels = router_kernels(logits, backend)
    return kernels.switch_loss_backward(dloss, logits.contiguous(), counts.contiguous(), sigmoid)


torch.library.impl("supersonic_moe::switch_loss_forward", ("cpu", "cuda"))(_forward)
torch.library.impl("supersonic_moe::switch_loss_backward", ("cpu", "cuda"))(_backward)
switch_loss_forward = caller(torch.ops.supersonic_moe.switch_loss_forward.default, _forward)
switch_loss_backward = caller(torch.ops.supersonic_moe.switch_loss_backward.default, _backward)


@torch.library.register_fake("supersonic_moe::switch_loss_forward")  # type: ignore[untyped-decorator]
def _forward_fake(logits: Tensor, counts: Tensor, backend: str, sigmoid: bool = False) -> Tensor:
    return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.register_fake("supersonic_moe::switch_loss_backward")  # type: ignore[untyped-decorator]
def _backward_fake(dloss: Tensor, logits: Tensor, counts: Tensor, backend: str, sigmoid: bool = False) -> Tensor:
    return logits.new_empty(logits.shape)


class _SwitchLoss(torch.autograd.Function):
    """Saves the logits, alive anyway as the router's output, and the counts."""

    @staticmethod
    def forward(logits: Tensor, counts: Tensor, backend: str, sigmoid: bool) -> Tensor:
        loss: Tensor = switch_loss_forward(logits, counts, backend, sigmoid)
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str, bool], output: Tensor) -> None:
        logits, counts, ctx.backend, ctx.sigmoid = inputs
        ctx.save_for_backward(logits, counts)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, counts = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the op has no derivative, plain torch has
            dlogits = differentiable_backward(dloss, logits, counts, ctx.sigmoid)
        else:
            dlogits = switch_loss_backward(dloss, logits, counts, ctx.backend, ctx.sigmoid)
        return dlogits, None, None, None
