"""The Switch loss and its derivative, from the logits alone; definition: ``routing/aux_loss.py``.

With p the softmax of a token's logits, f the share of the routed pairs that each expert has, T tokens, E experts:

    loss = E/T * sum over t of <f, p_t>          dlogits_te = dloss * E/T * p_te (f_e - <f, p_t>)
"""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels.reference.activation import acc_dtype


def switch_loss_forward(logits_TE: Tensor, counts_E: Tensor) -> Tensor:
    """() in the accumulation dtype."""
    p_TE = _probabilities(logits_TE)
    num_tokens, num_experts = p_TE.shape
    return num_experts / max(num_tokens, 1) * torch.dot(p_TE.sum(0), _shares(counts_E, p_TE.dtype))


def switch_loss_backward(dloss: Tensor, logits_TE: Tensor, counts_E: Tensor) -> Tensor:
    """dlogits (T, E) in the dtype of the logits. Differentiable."""
    p_TE = _probabilities(logits_TE)
    num_tokens, num_experts = p_TE.shape
    f_E = _shares(counts_E, p_TE.dtype)
    scale = dloss.to(p_TE.dtype) * (num_experts / max(num_tokens, 1))
    return (scale * p_TE * (f_E - (p_TE @ f_E)[:, None])).to(logits_TE.dtype)


def _probabilities(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(1, dtype=acc_dtype(logits_TE.dtype))


def _shares(counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts over their sum; zeros where nothing was counted."""
    counts_E = counts_E.to(dtype)
    total = counts_E.sum()
    return counts_E / torch.where(total == 0, 1, total)
