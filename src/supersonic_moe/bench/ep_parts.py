"""What it costs to compute the FP8 products of a layer in parts of the same tiles (``parallel/ranges.py``): the first
in one launch that looks whether the rows of a part have come, the second in a launch for each part. One GPU, where
nothing travels. Expected within 1.02 of whole products for two parts, and 1.04 for four.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.timing import Call, Missing, NoResultError, clock_for, measure
from supersonic_moe.config.activation import GateUpLayout, as_activation
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels.interface import (
    RANGE_ROWS,
    Arrivals,
    Fp8Experts,
    Gate,
    Quantized,
    RowBlocks,
    Rows,
    UpProjection,
)
from supersonic_moe.perf_model import LayerShape
from supersonic_moe.routing.plan import plan_from_topk

PARTS = (1, 2, 4)
ONE_LAUNCH = "one-launch"


def run_parts(
    shape: LayerShape, k: Fp8Experts, recipe: Fp8Recipe, device: torch.device, *, warm_ms: float, min_ms: float
) -> list[CaseResult]:
    """A case for each number of parts, after its results were compared with those of one launch, to the bit."""
    products = _products(shape, k, recipe, device)
    calls: dict[str, Call] = {str(n): partial(products, n) for n in PARTS}
    whole = products(1)
    for n in PARTS[1:]:
        if not all(torch.equal(a, b) for a, b in zip(whole, products(n), strict=True)):
            raise NoResultError(f"{shape}: {n} parts have other bits than one launch.")
    timings = measure(calls, clock_for(device), warm_ms=warm_ms, min_ms=min_ms)
    us: dict[str, float] = {}
    for name, timing in timings.items():
        if isinstance(timing, Missing):
            raise NoResultError(f"{shape}, {name} parts: {timing.reason}.")
        us[name] = timing.us
    return [
        CaseResult(f"{shape}_{n}-parts", {OURS: {"products_us": us[str(n)]}, ONE_LAUNCH: {"products_us": us["1"]}})
        for n in PARTS[1:]
    ]


def _products(
    shape: LayerShape, k: Fp8Experts, recipe: Fp8Recipe, device: torch.device
) -> Callable[[int], list[Tensor]]:
    """Up- and down-projection of uniformly routed tokens, for a number of parts of about one size."""
    T, H, E, K = shape.tokens, shape.hidden, shape.experts, shape.top_k
    torch.manual_seed(0)
    plan = plan_from_topk(torch.rand(T, E, device=device).topk(K, dim=1).indices, E)
    x = k.quantize_rows(torch.randn(T, H, device=device, dtype=torch.bfloat16), recipe.pow2)
    shapes = ((E, 2 * shape.intermediate, H), (E, H, shape.intermediate))
    weights = [torch.randn(s, device=device, dtype=torch.bfloat16) * s[2] ** -0.5 for s in shapes]
    (w1, _, w1_scale), (w2, _, w2_scale) = k.quantize_weights(weights, recipe.pow2)
    row_expert = torch.repeat_interleave(torch.arange(E, device=device), plan.expert_counts).int()
    gate, offsets = Gate(as_activation("swiglu"), GateUpLayout.INTERLEAVED), plan.expert_offsets
    rows = Rows(x, plan.gather_index)
    step = UpProjection(rows, Quantized(w1, w1_scale.contiguous()), None, offsets, row_expert, gate, save=True)
    down = Quantized(w2, w2_scale.contiguous())
    blocks_E = (plan.expert_counts + RANGE_ROWS - 1) // RANGE_ROWS
    parts = {n: _cut(blocks_E, n) for n in PARTS if n > 1}

    def run(n: int) -> list[Tensor]:
        arriving = parts.get(n)
        leaving = [RowBlocks(*limits, _nothing) for limits in zip(*arriving[:2], strict=True)] if arriving else []
        z, a = k.up_projection_fp8(step, recipe, arriving)
        return [*(t.view(torch.uint8) for t in (z.q, a.q)), k.grouped_mm_fp8(Rows(a), down, offsets, leaving)]

    return run


def _cut(blocks_E: Tensor, parts: int) -> Arrivals:
    """All there."""
    cuts = [torch.div(blocks_E * i, parts, rounding_mode="floor").to(torch.int32) for i in range(parts + 1)]
    return Arrivals(torch.stack(cuts[:-1]), torch.stack(cuts[1:]), cuts[0].new_ones(parts), lambda: None)


def _nothing(_: Tensor) -> None: ...
