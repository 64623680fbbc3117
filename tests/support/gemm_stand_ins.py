"""Stand-ins for our grouped GEMMs on a CPU, for suites that time them: plain torch behind the kernels' signatures."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import NEW, Into, Rows


def our_product(a: Rows[Tensor], b_EKN: Tensor, offsets: Tensor) -> Tensor:
    assert b_EKN.stride(1) == 1 and offsets.dtype is torch.int32
    return reference.grouped_mm(a, b_EKN, offsets)


def our_gradient(a: Rows[Tensor], b_PN: Tensor, offsets: Tensor, into: Into = NEW) -> Tensor:
    if into.out is None:
        return reference.grouped_mm_wgrad(a, b_PN, offsets)
    assert into.accumulate and into.out.dtype is torch.float32
    return into.out.add_(reference.grouped_mm_wgrad(a._replace(x=a.x.float()), b_PN.float(), offsets))
