"""What the contenders of the inference suite share: ours, the routing of the others, and their buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from supersonic_moe.bench import infer_glue as glue
from supersonic_moe.bench.infer_cases import Workload
from supersonic_moe.config.grouped_routing import Scoring
from supersonic_moe.config.router import SigmoidGroupedTopK, SoftmaxAfterTopK, TopKRouter
from supersonic_moe.inference import moe_fp8_ds_routed, workspace_bytes
from supersonic_moe.kernels.interface import Slots
from supersonic_moe.kernels.triton import plan, router
from supersonic_moe.kernels.triton.tiling import cdiv
from supersonic_moe.quantization.block_format import BLOCK, E4M3

Call = Callable[[], Tensor]
Routed = Callable[[], tuple[Tensor, Tensor]]  # weights (T, K) fp32, global ids (T, K) int32
Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # of kernels/triton/plan.py


def ours(work: Workload) -> Call:
    case, experts, rule = work.case, work.experts, work.case.shape.rule
    shape = case.shape
    needed = workspace_bytes(case.tokens, rule.top_k, shape.hidden, shape.inter, shape.local)
    workspace = torch.empty(needed, dtype=torch.uint8, device=work.x.device)
    out = new_out(work)

    def run() -> Tensor:
        return moe_fp8_ds_routed(
            work.logits, work.bias, work.x, work.x_scale, experts.w13, experts.w13_scale, experts.w2, experts.w2_scale,
            case.offset, rule.scaling_factor, n_group=rule.n_group, topk_group=rule.topk_group, top_k=rule.top_k,
            scoring=rule.scoring, out=out, workspace=workspace,
        )  # fmt: skip

    return run


def routed(work: Workload) -> Routed:
    """Routing as the peers do it."""
    rule = work.case.shape.rule
    if rule.scoring is Scoring.SQRT_SOFTPLUS:
        given = work.weights.contiguous(), work.ids.contiguous()
        return lambda: given
    chosen: TopKRouter = SoftmaxAfterTopK()
    if rule.scoring is Scoring.SIGMOID:
        chosen = SigmoidGroupedTopK(
            num_groups=rule.n_group, topk_groups=rule.topk_group, scaling_factor=rule.scaling_factor
        )
    bias = work.bias if rule.scoring is Scoring.SIGMOID else None
    return lambda: router.route_forward(work.logits, rule.top_k, chosen, bias)


def sorted_rows(work: Workload, tile: int, capacity: int) -> Callable[[], tuple[Tensor, Plan]]:
    """Routing, then rows sorted by expert: weights and the plan."""
    route, case = routed(work), work.case
    local, top_k = case.shape.local, case.shape.rule.top_k
    local_TK = torch.empty(case.tokens, top_k, dtype=torch.int32, device=work.x.device)

    def sort() -> tuple[Tensor, Plan]:
        weights_TK, ids_TK = route()
        glue.localize(ids_TK, case.offset, local, local_TK)
        return weights_TK, plan.build_plan(Slots(local_TK.view(-1), None, top_k, case.tokens, local, tile, capacity))

    return sort


def new_out(work: Workload) -> Tensor:
    return torch.empty(work.x.shape, dtype=torch.bfloat16, device=work.x.device)


def codes(work: Workload, *size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=work.x.device).view(E4M3)


def by_block(device: torch.device, groups: int, rows: int, columns: int) -> Tensor:
    """Scales (groups, rows, columns) with those of one block of columns next to each other, as DeepGEMM's TMA wants."""
    step = cdiv(rows, 4) * 4
    out = torch.empty_strided((groups, rows, columns), (step * columns, 1, step), device=device)
    return out.zero_()


def whole_blocks(work: Workload) -> None:
    if work.case.shape.inter % BLOCK:
        raise ValueError(f"its block scales want I in multiples of {BLOCK}; got {work.case.shape.inter}")
