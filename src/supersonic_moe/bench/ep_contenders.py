"""Who takes part in ``bench ep``: our layer over ranks, our plain layer on each of them, and one written by hand.

``rows-by-hand`` is what people write without a library for it, in BF16: every row travels, a token once for each of its
experts. Choices are sorted by expert, ranks tell each other how many rows come (the host waits), rows cross by the
all-to-all of ``torch.distributed``, are sorted by expert once more, multiplied by ``torch.nn.functional.grouped_mm``
around SwiGLU, and go back the same way, to be weighted and summed at home. Autograd does the same backward. Of K T rows
of H elements (R - 1)/R cross, four times in a step.

``remote`` is the share of a token's choices whose experts other ranks hold. Uniform routing has (R - 1)/R. Another
share is a matter of the router's weights: each token has a one in a feature of its rank, which experts of other ranks
like (or dislike). All ranks do the same, so the rows of an expert are as many as before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from supersonic_moe import MoE
from supersonic_moe.autograd import apply
from supersonic_moe.bench.layer import SAME_FUNCTION, SAME_FUNCTION_FP8, Contender, differences, hugging_face_w1
from supersonic_moe.bench.peers import ACTIVATIONS, route
from supersonic_moe.bench.report import OURS
from supersonic_moe.config.activation import ActivationType
from supersonic_moe.config.recipe import Recipe
from supersonic_moe.parallel import ExpertParallel
from supersonic_moe.perf_model import LayerShape

ONE_GPU = "one-gpu"
BY_HAND = "rows-by-hand"
SAMPLE = 4096  # tokens whose choices say how much experts of other ranks must be liked


@dataclass(frozen=True)
class Numbers:
    """What the layers of one run have in common."""

    device: torch.device
    dtype: torch.dtype
    recipe: Recipe
    remote: float | None
    by_hand: bool


def contenders(shape: LayerShape, numbers: Numbers, ep: ExpertParallel) -> dict[str, Contender]:
    """Ours over the ranks of ``ep`` first. ``shape`` is the load of one rank: its tokens, and the experts here."""
    ours, layer = _ours(shape, numbers, ep)
    found = {OURS: ours, ONE_GPU: _ours(shape, numbers, None)[0]}
    if numbers.by_hand and ep.size > 1:
        weights = layer.router.weight, hugging_face_w1(layer), layer.c_proj.weight
        run = partial(rows_by_hand, ours.x, *weights, shape.top_k, ep.group)
        found[BY_HAND] = replace(ours, forward=lambda _inference: run(), parameters=weights, gate_up=True)
    return found


def _ours(shape: LayerShape, numbers: Numbers, ep: ExpertParallel | None) -> tuple[Contender, MoE]:
    torch.manual_seed(0)
    experts = shape.experts if ep is None else ep.num_experts
    sizes = (experts, shape.top_k, shape.hidden, shape.intermediate)
    with torch.device(numbers.device):
        layer = MoE(*sizes, "swiglu", False, 0.02, recipe=numbers.recipe, expert_parallel=ep).to(numbers.dtype)
        with torch.no_grad():
            layer.router.weight.normal_(0, shape.hidden**-0.5)
        torch.manual_seed(1 + dist.get_rank())
        x_TH = torch.randn(shape.tokens, shape.hidden, dtype=numbers.dtype)
        if ep is not None and ep.size > 1 and numbers.remote is not None:
            like_others(layer.router.weight, x_TH, ep, numbers.remote)
        x_TH.requires_grad_()
        dout_TH = torch.randn_like(x_TH)
    parameters = list(layer.parameters())
    return Contender(lambda inference: layer(x_TH, is_inference_mode=inference)[0], x_TH, parameters, dout_TH), layer


@torch.no_grad()
def like_others(router_EH: Tensor, x_TH: Tensor, ep: ExpertParallel, remote: float) -> None:
    """Features 0 to R - 1 say whose token it is; experts of other ranks answer to them as ``remote`` wants it."""
    ranks, here = ep.size, ep.experts_here
    x_TH[:, :ranks] = 0
    x_TH[:, ep.rank] = 1
    liking = _liking(ep.num_experts, here, ep.top_k, remote)
    router_EH[:, :ranks] = liking
    for rank in range(ranks):
        router_EH[rank * here : (rank + 1) * here, rank] = 0


def _liking(experts: int, here: int, top_k: int, remote: float) -> float:
    """What is added to logits of unit variance of experts elsewhere, so that ``remote`` of the choices are there."""
    logits = torch.randn(SAMPLE, experts, generator=torch.Generator().manual_seed(0), device="cpu")
    low, high = -8.0, 8.0
    for _ in range(20):
        middle = (low + high) / 2
        more = torch.zeros(experts, device="cpu")
        more[here:] = middle
        share = float(((logits + more).topk(top_k).indices >= here).float().mean())
        low, high = (middle, high) if share < remote else (low, middle)
    return (low + high) / 2


def disagreement(found: dict[str, Contender], fp8: bool, host: dist.ProcessGroup | None) -> str | None:
    """How the layer written by hand differs from ours, on the rank where it does most. All ranks run all of it."""
    limit = SAME_FUNCTION_FP8 if fp8 else SAME_FUNCTION
    judge = found[OURS]
    gaps = list(differences(found[BY_HAND], judge, judge.infer(), limit))
    over = torch.tensor([gap / most for _, gap, most in gaps], dtype=torch.float64)
    over = over.nan_to_num(nan=float("inf"))
    if host is not None:
        dist.all_reduce(over, dist.ReduceOp.MAX, group=host)
    wrong = [
        f"{what} {float(times) * most:.3g}" for (what, _, most), times in zip(gaps, over, strict=True) if times > 1
    ]
    return wrong[0] if wrong else None


# ---- by hand ---------------------------------------------------------------------------------------------------------


class _AllToAll(torch.autograd.Function):
    """Rows to all ranks and from them; backward the other way."""

    @staticmethod
    def forward(ctx: Any, rows_SH: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = received, sent, group
        rows_PH = rows_SH.new_empty(sum(received), rows_SH.shape[1])
        dist.all_to_all_single(rows_PH, rows_SH.contiguous(), received, sent, group=group)
        return rows_PH

    @staticmethod
    def backward(ctx: Any, drows_PH: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.forward(ctx, drows_PH, *ctx.way), None, None, None


def rows_by_hand(
    x_TH: Tensor, router_EH: Tensor, w1_ENH: Tensor, w2_EHI: Tensor, top_k: int, group: dist.ProcessGroup
) -> Tensor:
    """(T, H). The router is of all experts; w1 (E/R, 2I, H) as [gate; up] and w2 (E/R, H, I) are of those here."""
    ranks, here, device = dist.get_world_size(group), w1_ENH.shape[0], x_TH.device
    scores_TK, ids_TK = route(F.linear(x_TH, router_EH), top_k, "softmax_after_topk")
    experts_S, order_S = ids_TK.flatten().sort(stable=True)
    slot_of = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.shape[0], device=device))
    rows_RE = torch.bincount(experts_S, minlength=ranks * here).view(ranks, here)
    coming_RE = torch.empty_like(rows_RE)
    dist.all_to_all_single(coming_RE, rows_RE, group=group)
    sent, received = torch.stack([rows_RE.sum(1), coming_RE.sum(1)]).tolist()  # the host waits

    expert_P = torch.arange(here, device=device).repeat(ranks)
    expert_P = expert_P.repeat_interleave(coming_RE.flatten(), output_size=sum(received))
    order_P = expert_P.argsort(stable=True)
    place_of = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(order_P.shape[0], device=device))
    ends_E = coming_RE.sum(0).cumsum(0).to(torch.int32)

    x_PH: Tensor = apply(_AllToAll, x_TH.index_select(0, order_S // top_k), sent, received, group)
    swiglu = ACTIVATIONS[ActivationType.SWIGLU]
    a_PI = swiglu(F.grouped_mm(x_PH.index_select(0, order_P), w1_ENH.transpose(1, 2), offs=ends_E))
    y_PH = F.grouped_mm(a_PI, w2_EHI.transpose(1, 2), offs=ends_E).index_select(0, place_of)
    y_SH: Tensor = apply(_AllToAll, y_PH, received, sent, group)
    return (y_SH * scores_TK.flatten()[order_S, None]).index_select(0, slot_of).view(x_TH.shape[0], top_k, -1).sum(1)
