"""Router forward and backward; the rules are in ``routing/topk.py``, the derivatives here.

With g = dL/dscores of a token, s its scores, I its K chosen experts (a constant: the choice has no derivative) and
<g, s> the sum over I:

* softmax over the chosen logits, which the renormalised softmax equals:   dx_i = s_i (g_i - <g, s>) in I, else 0
* softmax p over all logits:                                               dx_j = p_j ([j in I] g_j - <g, s>), all j
* sigmoid, a_i = sigmoid(x_i), D = sum_I a + 1e-20, s = c a / D:           da_i = (c g_i - <g, s>) / D
* sigmoid without renormalisation, s = c a:                                da_i = c g_i
  both with                                                                dx_i = da_i a_i (1 - a_i) in I, else 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.config.router import SUM_EPS, SigmoidGroupedTopK, SoftmaxBeforeTopK, TopKRouter
from supersonic_moe.kernels.reference.activation import acc_dtype


def route_forward(
    logits_TE: Tensor, k: int, router: TopKRouter, correction_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scores (T, K) in the accumulation dtype, ids (T, K) int32), best first."""
    x_TE = logits_TE.to(acc_dtype(logits_TE.dtype))
    if isinstance(router, SigmoidGroupedTopK):
        affinity_TE = x_TE.sigmoid()
        biased_TE = affinity_TE if correction_bias_E is None else affinity_TE + correction_bias_E.to(x_TE.dtype)
        ids_TK = _top(_within_best_groups(biased_TE, router), k)
        scores_TK = affinity_TE.gather(1, ids_TK)
        if router.renormalize:
            scores_TK = scores_TK / (scores_TK.sum(1, keepdim=True) + SUM_EPS)
        scores_TK = scores_TK * router.scaling_factor
    else:
        ids_TK = _top(x_TE, k)
        if isinstance(router, SoftmaxBeforeTopK) and not router.renormalize:
            scores_TK = x_TE.softmax(1).gather(1, ids_TK)
        else:
            scores_TK = x_TE.gather(1, ids_TK).softmax(1)
    return scores_TK, ids_TK.to(torch.int32)


def route_backward(
    dscores_TK: Tensor, logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, router: TopKRouter
) -> Tensor:
    """dlogits (T, E) in the dtype of the logits."""
    ids_TK = ids_TK.long()
    x_TE = logits_TE.to(scores_TK.dtype)
    g_TK = dscores_TK.to(scores_TK.dtype)
    g_dot_s_T1 = (g_TK * scores_TK).sum(1, keepdim=True)
    if isinstance(router, SigmoidGroupedTopK):
        chosen_TK = x_TE.gather(1, ids_TK)
        a_TK = chosen_TK.sigmoid()
        da_TK = g_TK * router.scaling_factor
        if router.renormalize:
            da_TK = (da_TK - g_dot_s_T1) / (a_TK.sum(1, keepdim=True) + SUM_EPS)
        dchosen_TK = da_TK * a_TK * (-chosen_TK).sigmoid()  # 1 - sigmoid(x), exact where sigmoid(x) rounds to 1
    elif isinstance(router, SoftmaxBeforeTopK) and not router.renormalize:
        g_TE = torch.zeros_like(x_TE).scatter(1, ids_TK, g_TK)
        return (x_TE.softmax(1) * (g_TE - g_dot_s_T1)).to(logits_TE.dtype)
    else:
        dchosen_TK = scores_TK * (g_TK - g_dot_s_T1)
    return torch.zeros_like(x_TE).scatter(1, ids_TK, dchosen_TK).to(logits_TE.dtype)


def _top(values_TE: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, int64; among equals the lower index first, NaN above every number."""
    return torch.sort(values_TE, dim=1, descending=True, stable=True).indices[:, :k]


def _within_best_groups(biased_TE: Tensor, router: SigmoidGroupedTopK) -> Tensor:
    """-inf outside the ``topk_groups`` groups whose two best entries have the largest sums."""
    if router.topk_groups == router.num_groups:
        return biased_TE
    num_groups = router.num_groups
    biased_TGM = biased_TE.reshape(-1, num_groups, biased_TE.shape[1] // num_groups)  # M experts a group
    best_TG2 = biased_TGM.sort(dim=2, descending=True).values[:, :, :2]
    groups = _top(best_TG2.sum(2), router.topk_groups)
    allowed_TG = torch.zeros_like(best_TG2[:, :, 0], dtype=torch.bool).scatter_(1, groups, True)
    return biased_TGM.masked_fill(~allowed_TG[:, :, None], float("-inf")).flatten(1)
