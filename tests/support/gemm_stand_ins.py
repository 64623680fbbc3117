"""Stand-ins for our grouped GEMMs on a CPU, for suites that time them: plain torch behind the kernels' signatures."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels import reference


def our_product(a_PK: Tensor, b_EKN: Tensor, offsets: Tensor, *, gather_index: Tensor | None = None) -> Tensor:
    assert b_EKN.stride(1) == 1 and offsets.dtype is torch.int32
    return reference.grouped_mm(a_PK if gather_index is None else a_PK[gather_index], b_EKN, offsets)


def our_gradient(
    a_PM: Tensor,
    b_PN: Tensor,
    offsets: Tensor,
    out_EMN: Tensor | None = None,
    *,
    accumulate: bool = False,
    gather_index: Tensor | None = None,
) -> Tensor:
    a_PM = a_PM if gather_index is None else a_PM[gather_index]
    if out_EMN is None:
        return reference.grouped_mm_wgrad(a_PM, b_PN, offsets)
    assert accumulate and out_EMN.dtype is torch.float32
    return out_EMN.add_(reference.grouped_mm_wgrad(a_PM.float(), b_PN.float(), offsets))
