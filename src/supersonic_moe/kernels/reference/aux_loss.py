"""The load-balancing loss and its derivative, from the logits alone; definition: ``routing/aux_loss.py``.

With p the shares of a token's probability (the softmax of its logits x, or a_e / sum of a with a = sigmoid(x)), f the
share of the routed pairs that each expert has, T tokens, E experts:

    loss = E/T * sum over t of <f, p_t>          dlogits_te = dloss * E/T * p_te (f_e - <f, p_t>)
                                                              and for a sigmoid times 1 - a_te
"""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.config.router import SUM_EPS
from supersonic_moe.kernels.reference.activation import acc_dtype


def switch_loss_forward(logits_TE: Tensor, counts_E: Tensor, sigmoid: bool = False) -> Tensor:
    """() in the accumulation dtype."""
    p_TE = probabilities(logits_TE, sigmoid)
    num_tokens, num_experts = p_TE.shape
    return num_experts / max(num_tokens, 1) * torch.dot(p_TE.sum(0), shares(counts_E, p_TE.dtype))


def switch_loss_backward(dloss: Tensor, logits_TE: Tensor, counts_E: Tensor, sigmoid: bool = False) -> Tensor:
    """dlogits (T, E) in the dtype of the logits. Differentiable."""
    p_TE = probabilities(logits_TE, sigmoid)
    num_tokens, num_experts = p_TE.shape
    f_E = shares(counts_E, p_TE.dtype)
    scale = dloss.to(p_TE.dtype) * (num_experts / max(num_tokens, 1))
    dlogits_TE = scale * p_TE * (f_E - (p_TE @ f_E)[:, None])
    if sigmoid:
        dlogits_TE = dlogits_TE * (-logits_TE.to(p_TE.dtype)).sigmoid()  # 1 - a, exact where a rounds to 1
    return dlogits_TE.to(logits_TE.dtype)


def probabilities(logits: Tensor, sigmoid: bool) -> Tensor:
    """(..., E) in the accumulation dtype: what share of its probability a token gives to each expert."""
    acc = acc_dtype(logits.dtype)
    if not sigmoid:
        return logits.softmax(-1, dtype=acc)
    a = logits.to(acc).sigmoid()
    return a / (a.sum(-1, keepdim=True) + SUM_EPS)


def shares(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., E) counts over their sum; zeros where nothing was counted."""
    counts = counts.to(dtype)
    total = counts.sum(-1, keepdim=True)
    return counts / torch.where(total == 0, 1, total)
