"""The router's projection, ``logits = x W^T``, with the two gradients of x summed inside its GEMM.

x goes to the router and to the experts. Autograd would write the router's share of dx and add the experts' in a pass of
its own: 8·T·H bytes in BF16, 0.4 % of a training step. Here x passes through the function, so its backward receives the
experts' dx and accumulates ``dlogits W`` into it: half of that traffic, one rounding less. An x that needs no gradient
does not pass through: the experts would compute one for nobody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe.autocast import without_autocast
from supersonic_moe.autograd import apply


def router_linear(x_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
    """(logits (T, E), x). The x that comes back is for the experts, and for nobody else: the buffer of its gradient
    becomes the gradient of ``x_TH``. Both in the dtype of ``x_TH``, which is the weight's.
    """
    if torch.compiler.is_compiling():  # the compiler places the sum itself
        return F.linear(x_TH, weight_EH), x_TH
    logits_TE, same_TH = apply(RouterLinear, x_TH, weight_EH)
    return logits_TE, same_TH if x_TH.requires_grad else x_TH


class RouterLinear(torch.autograd.Function):
    @staticmethod
    def forward(x_TH: Tensor, weight_EH: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x_TH, weight_EH), x_TH.view_as(x_TH)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dlogits_TE: Tensor | None, dx_TH: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x_TH, weight_EH = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        if dlogits_TE is None:
            return dx_TH, None
        if needs_x:
            if dx_TH is None:
                dx_TH = dlogits_TE @ weight_EH
            elif torch.is_grad_enabled():  # create_graph: what came may be read again
                dx_TH = dx_TH.addmm(dlogits_TE, weight_EH)
            else:
                dx_TH = torch.addmm(dx_TH, dlogits_TE, weight_EH, out=dx_TH)
        return dx_TH if needs_x else None, dlogits_TE.t() @ x_TH if needs_weight else None


def linear_in(x_TH: Tensor, weight_EH: Tensor, dtype: torch.dtype) -> Tensor:
    """``x W^T`` (T, E), computed and returned in ``dtype`` whatever the dtypes of both, under autocast too. The
    gradients have the dtypes of x and W.
    """
    with without_autocast(x_TH):
        if torch.compiler.is_compiling():  # which does not keep the converted tensors
            return F.linear(x_TH.to(dtype), weight_EH.to(dtype))
        logits_TE: Tensor = apply(LinearIn, x_TH, weight_EH, dtype)
        return logits_TE


class LinearIn(torch.autograd.Function):
    """Keeps x and W as they are: a converted x would be two or four times as large."""

    @staticmethod
    def forward(x_TH: Tensor, weight_EH: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(x_TH.to(dtype), weight_EH.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
        x_TH, weight_EH, ctx.dtype = inputs
        ctx.save_for_backward(x_TH, weight_EH)

    @staticmethod
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TH, weight_EH = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        with without_autocast(x_TH):
            dx_TH = (dlogits_TE @ weight_EH.to(ctx.dtype)).to(x_TH.dtype) if needs_x else None
            dw_EH = (dlogits_TE.t() @ x_TH.to(ctx.dtype)).to(weight_EH.dtype) if needs_weight else None
        return dx_TH, dw_EH, None
