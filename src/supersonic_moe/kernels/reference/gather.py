"""Row gather, its adjoint: each token sums its rows; and zeros for rows of no expert."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels.interface import Rows, TokenRows
from supersonic_moe.kernels.reference.activation import acc_dtype


def gather_rows(x_TH: Tensor, index_P: Tensor) -> Tensor:
    """(P, H): row p is x[index[p]], or zeros where index[p] < 0."""
    rows_PH = x_TH.new_zeros(index_P.shape[0], x_TH.shape[1])
    real = index_P >= 0
    rows_PH[real] = x_TH[index_P[real].long()]
    return rows_PH


def rows_of(a: Rows[Tensor]) -> Tensor:
    """(P, C): the rows themselves."""
    return a.x if a.gather_index is None else gather_rows(a.x, a.gather_index)


def gather_sum(
    y_PH: Tensor,
    row_scale_P: Tensor | None,
    bias_EH: Tensor | None,
    row_expert_P: Tensor,
    tokens: TokenRows,
    out: Tensor | None = None,
) -> Tensor:
    """(T, H): out[t] = sum over the token's rows r >= 0, in order, of scale[r] * (y[r] + bias[expert of r]). Tokens
    without rows get 0. Into ``out`` if given.
    """
    slots = torch.arange(tokens.rows.shape[0], device=y_PH.device)
    if tokens.offsets is None:
        token_S = slots // max(tokens.each, 1)
    else:
        token_S = torch.searchsorted(tokens.offsets.long(), slots, right=True) - 1
    real = (tokens.rows >= 0) & (token_S >= 0) & (token_S < tokens.num_tokens)
    rows = tokens.rows[real].long()
    values = y_PH[rows].to(acc_dtype(y_PH.dtype))
    if bias_EH is not None:
        values = values + bias_EH.to(values.dtype)[row_expert_P[rows].long()]
    if row_scale_P is not None:
        values = values * row_scale_P.to(values.dtype)[rows, None]
    sums_TH = add_rows(values, token_S[real], tokens.num_tokens).to(y_PH.dtype)
    return sums_TH if out is None else out.copy_(sums_TH)


def zero_dead_rows(y_PN: Tensor, expert_offsets: Tensor) -> None:
    """Zeros in the rows at and past ``expert_offsets[-1]``."""
    dead = torch.arange(y_PN.shape[0], device=y_PN.device) >= expert_offsets[-1]
    y_PN.masked_fill_(dead[:, None], 0)


def add_rows(values_NC: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """(num_rows, C): row r is the sum of the values with index r, in their order, on every device. ``index_add_`` keeps
    the order on a CPU and adds by atomics on CUDA, where an accumulating ``index_put_`` sorts by index first.
    """
    out = values_NC.new_zeros(num_rows, values_NC.shape[1])
    if values_NC.is_cuda:
        return out.index_put_((index_N,), values_NC, accumulate=True)
    return out.index_add_(0, index_N, values_NC)
