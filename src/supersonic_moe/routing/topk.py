"""Token choice: router logits (T, E) -> the K experts of each token and the weights of their outputs.

The rules: ``config/router.py``.

Choice. The softmax rules take the K largest logits (softmax is monotone, so ranking logits is ranking probabilities,
without the ties that rounding them would add). The sigmoid rule (DeepSeek-V3, arXiv 2412.19437, eq. 13-16) takes the K
largest ``sigmoid(x) + bias``, where the bias is moved by the training loop to balance the load and never enters the
weights. With groups, the experts form ``num_groups`` runs of equal length, a group is worth the sum of its two best
entries, and only the best ``topk_groups`` groups take part.

Order and odd values. Choices come best first; equal values come in order of expert index; NaN ranks above every number.
So the ids of a token are always distinct and in [0, E), whatever its logits, and a NaN logit gives NaN weights in its
own token and nowhere else.

Precision. Weights are fp32 for bf16, fp16 and fp32 logits, fp64 for fp64 logits; all arithmetic is in that type.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.autograd import apply
from supersonic_moe.config.router import (
    SigmoidGroupedTopK,
    SoftmaxAfterTopK,
    SoftmaxBeforeTopK,
    TopKRouter,
    as_router,
    check_groups,
)
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Routing
from supersonic_moe.kernels.reference.router import route_backward as differentiable_backward
from supersonic_moe.ops import caller


def route(
    logits_TE: Tensor,
    k: int,
    router: TopKRouter | str = "softmax_after_topk",
    *,
    correction_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose K experts a token; see the module docstring for the rules. Differentiable with respect to the logits.

    Args:
        logits_TE: (T, E) bfloat16, float16, float32 or float64.
        k: experts a token.
        router: one of the three configs above, or its name.
        correction_bias: (E,), ``SigmoidGroupedTopK`` only: added to the affinities for the choice; gets no gradient.
        backend: see ``kernels/registry.py``.

    Returns:
        scores (T, K) float32 (float64 for float64 logits) and expert ids (T, K) int32.
    """
    config = as_router(router)
    if not isinstance(config, TopKRouter):
        raise TypeError(
            f"route chooses exactly K experts a token, so it cannot run {config!r}. "
            "Call token_rounding(...) in training, route(...) with its base router in evaluation."
        )
    checks.tensor("logits", logits_TE, 2, "(T, E)")
    checks.floating("logits", logits_TE)
    check_choice(logits_TE, logits_TE.shape[1], k, config, correction_bias)
    scores_TK, ids_TK = apply(_Route, logits_TE, correction_bias, k, (*encode(config, k), backend))
    return scores_TK, ids_TK


def check_choice(tokens: Tensor, experts: int, k: int, router: TopKRouter, bias: Tensor | None) -> None:
    """Whether ``router`` can choose ``k`` of so many experts for each row of ``tokens``."""
    checks.positive("k", k)
    checks.index_count("logits (T * E)", tokens.shape[0] * experts)
    if k > experts:
        raise ValueError(
            f"k must not exceed the number of experts; got k = {k} with {experts} columns of logits. Lower k."
        )
    check_groups(router, experts, k)
    if bias is not None:
        if not isinstance(router, SigmoidGroupedTopK):
            raise ValueError(
                f"correction_bias belongs to SigmoidGroupedTopK; got it with {router!r}. "
                "Leave it None or change the router."
            )
        checks.tensor("correction_bias", bias, 1, "(E,)")
        checks.floating("correction_bias", bias)
        checks.size("correction_bias", "length", bias.shape[0], experts, "the number of experts")
        checks.same_device("logits", tokens, "correction_bias", bias)


# ---- configs as op arguments -----------------------------------------------------------------------------------------

Encoded: TypeAlias = tuple[str, bool, int, int, float]
_ENCODED = "str kind, bool renormalize, int num_groups, int topk_groups, float scaling_factor, str backend"


def encode(router: TopKRouter, k: int) -> Encoded:
    """Arguments of the ops, but for the backend."""
    if isinstance(router, SigmoidGroupedTopK):
        renormalize = router.renormalize and k > 1  # a / a would be 1 whatever the logits
        return router.kind, renormalize, router.num_groups, router.topk_groups, float(router.scaling_factor)
    return router.kind, isinstance(router, SoftmaxBeforeTopK) and router.renormalize, 1, 1, 1.0


@functools.cache
def _decode(kind: str, renormalize: bool, num_groups: int, topk_groups: int, scaling_factor: float) -> TopKRouter:
    if kind == SoftmaxAfterTopK.kind:
        return SoftmaxAfterTopK()
    if kind == SoftmaxBeforeTopK.kind:
        return SoftmaxBeforeTopK(renormalize=renormalize)
    return SigmoidGroupedTopK(
        num_groups=num_groups, topk_groups=topk_groups, scaling_factor=scaling_factor, renormalize=renormalize
    )


def router_kernels(logits: Tensor, backend: str) -> Routing:
    """The backend that routes these logits."""
    exact = logits.dtype is torch.float64  # the Triton kernels for routing compute in fp32
    return registry.kernels(registry.choose(logits.device, backend="reference" if exact else backend).name).routing


# ---- the ops: route_forward, route_backward --------------------------------------------------------------------------

torch.library.define(
    "supersonic_moe::route_forward",
    f"(Tensor logits, Tensor? correction_bias, SymInt k, {_ENCODED}) -> (Tensor, Tensor)",
)
torch.library.define(
    "supersonic_moe::route_backward",
    f"(Tensor dscores, Tensor logits, Tensor scores, Tensor ids, {_ENCODED}) -> Tensor",
)


def _route_forward(logits: Tensor, bias: Tensor | None, k: int, *config: Any) -> tuple[Tensor, Tensor]:
    *router, backend = config
    bias = None if bias is None else bias.contiguous()
    return router_kernels(logits, backend).route_forward(logits.contiguous(), k, _decode(*router), bias)


def _route_backward(dscores: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, *config: Any) -> Tensor:
    *router, backend = config
    kernels = router_kernels(logits, backend)
    dscores, logits, scores, ids = (t.contiguous() for t in (dscores, logits, scores, ids))
    return kernels.route_backward(dscores, logits, scores, ids, _decode(*router))


torch.library.impl("supersonic_moe::route_forward", ("cpu", "cuda"))(_route_forward)
torch.library.impl("supersonic_moe::route_backward", ("cpu", "cuda"))(_route_backward)
route_forward = caller(torch.ops.supersonic_moe.route_forward.default, _route_forward)
route_backward = caller(torch.ops.supersonic_moe.route_backward.default, _route_backward)


@torch.library.register_fake("supersonic_moe::route_forward")  # type: ignore[untyped-decorator]
def _route_forward_fake(logits: Tensor, bias: Tensor | None, k: int, *config: object) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("supersonic_moe::route_backward")  # type: ignore[untyped-decorator]
def _route_backward_fake(dscores: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, *config: object) -> Tensor:
    return logits.new_empty(logits.shape)


class _Route(torch.autograd.Function):
    """Saves the logits (alive anyway as the router's output), the scores and the ids."""

    @staticmethod
    def forward(logits: Tensor, bias: Tensor | None, k: int, config: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = route_forward(logits, bias, k, *config)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, _, _, ctx.config = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, *output)

    @staticmethod
    def backward(ctx: Any, dscores: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the op has no derivative, plain torch has
            logits, scores, ids = ctx.saved_tensors
            dlogits = differentiable_backward(dscores, logits, scores, ids, _decode(*ctx.config[:-1]))
        else:
            dlogits = route_backward(dscores, *ctx.saved_tensors, *ctx.config)
        return dlogits, None, None, None
