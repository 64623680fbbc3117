"""What people run without a fused library: two MoE layers in plain PyTorch, differentiated by autograd.

``torch_loop`` is the eager block of a Hugging Face model: one pair of matrix products per expert on the tokens that
chose it. Finding those tokens synchronises with the host once per expert.

``grouped_mm`` sorts the (token, choice) slots by expert, gathers the rows, and runs
``torch.nn.functional.grouped_mm`` twice around the activation; nothing synchronises. The gathered rows, the
pre-activation, the activation and the unsummed outputs are all saved for backward. :func:`sorted_layer` is the same
around anybody's grouped product.

Both take weights as Hugging Face stores them: w1 (E, 2I, H) as [gate; up] or (E, I, H), w2 (E, H, I); router
softmax(top-k) or top-k(softmax), with or without renormalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.config.activation import ActivationType

ACTIVATIONS: dict[ActivationType, Callable[[Tensor], Tensor]] = {
    ActivationType.SWIGLU: lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    ActivationType.GEGLU: lambda h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    ActivationType.GEGLU_TANH: lambda h: F.gelu(h.chunk(2, -1)[0], approximate="tanh") * h.chunk(2, -1)[1],
    ActivationType.REGLU: lambda h: F.relu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    ActivationType.RELU_SQ: lambda h: F.relu(h).square(),
    ActivationType.RELU: F.relu,
    ActivationType.GELU: F.gelu,
    ActivationType.GELU_TANH: lambda h: F.gelu(h, approximate="tanh"),
    ActivationType.SILU: F.silu,
}


def route(logits_TE: Tensor, top_k: int, router: str) -> tuple[Tensor, Tensor]:
    """(scores, ids), both (T, K), by the router of that name."""
    if router == "softmax_after_topk":
        values_TK, ids_TK = logits_TE.topk(top_k, -1)
        return values_TK.softmax(-1, dtype=torch.float32).to(logits_TE.dtype), ids_TK
    if router in ("softmax_before_topk", "softmax_before_topk_renormalized"):
        scores_TK, ids_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(top_k, -1)
        if router.endswith("renormalized"):
            scores_TK = scores_TK / scores_TK.sum(-1, keepdim=True)
        return scores_TK.to(logits_TE.dtype), ids_TK
    raise NotImplementedError(f"the PyTorch peers route by softmax only, not by {router}")


def torch_loop(
    x_TH: Tensor, router_EH: Tensor, w1_ENH: Tensor, w2_EHI: Tensor, top_k: int, router: str, activation: ActivationType
) -> Tensor:
    scores_TK, ids_TK = route(F.linear(x_TH, router_EH), top_k, router)
    out_TH = torch.zeros_like(x_TH)
    for e in range(w1_ENH.shape[0]):
        tokens, choices = torch.where(ids_TK == e)
        if tokens.numel():
            a = ACTIVATIONS[activation](F.linear(x_TH[tokens], w1_ENH[e]))
            out_TH.index_add_(0, tokens, F.linear(a, w2_EHI[e]) * scores_TK[tokens, choices, None])
    return out_TH


def sorted_layer(
    product: Callable[..., Tensor],
    x_TH: Tensor,
    router_EH: Tensor,
    w1_ENH: Tensor,
    w2_EHI: Tensor,
    top_k: int,
    router: str,
    activation: ActivationType,
) -> Tensor:
    """``product(rows, weights, offs=)`` multiplies the rows of each expert, which end at ``offs``, by its (K, N)."""
    scores_TK, ids_TK = route(F.linear(x_TH, router_EH), top_k, router)
    experts_S, order_S = ids_TK.flatten().sort()
    slot_of = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.shape[0], device=order_S.device))
    ends_E = torch.searchsorted(
        experts_S, torch.arange(w1_ENH.shape[0], device=x_TH.device), right=True, out_int32=True
    )
    x_SH = x_TH.index_select(0, order_S // top_k)
    a_SI = ACTIVATIONS[activation](product(x_SH, w1_ENH.transpose(1, 2), offs=ends_E))
    y_SH = product(a_SI, w2_EHI.transpose(1, 2), offs=ends_E) * scores_TK.flatten()[order_S, None]
    return y_SH.index_select(0, slot_of).view(x_TH.shape[0], top_k, -1).sum(1)


grouped_mm = partial(sorted_layer, F.grouped_mm)
