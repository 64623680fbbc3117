"""The kernels suite: every kernel of one MoE layer alone, beside the least time it could take on this chip.

A kernel runs on what it gets in a layer: random tokens and weights, logits of unit variance, the plan that they lead
to, activations and gradients from the reference's arithmetic. ``GROUPS`` names all, ``kernel_calls`` lists the calls.

Ceilings. Two contenders more take part in the same rounds: a large ``copy_`` (bytes read + written) and a square
``matmul`` in the dtype of the layer. With what they reach,

    floor = max(FLOPs / matmul rate, compulsory bytes / copy bandwidth)

with the FLOPs and bytes of ``perf_model.kernel_steps``. A gathered operand counts its distinct rows, so the floor is
one, though such a kernel reads K times as much from L2. Operands that fit into L2 stay there from call to call, as they
do in a layer (the router's logits were just written): a kernel that moves a few MB may beat its floor.

Time. All kernels interleaved, sustained, medians (``bench/timing.py``). A call shorter than ``timing.GRAPH_US`` is
captured some times over into a CUDA graph, and the replay is timed: the host needs longer to launch the smallest
kernels than the GPU to run them. What remains between one launch and the next, about a microsecond, counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table

from supersonic_moe import KernelBackendMoE
from supersonic_moe.bench.layer import LayerConfig
from supersonic_moe.bench.report import METRICS, CaseResult, Metrics, device_name, short
from supersonic_moe.bench.timing import (
    Call,
    Missing,
    NoResultError,
    Timing,
    attempt,
    clock_for,
    in_graphs,
    measure,
    of_a_call,
    required,
)
from supersonic_moe.config.activation import GateUpLayout, as_activation
from supersonic_moe.config.router import TokenRounding, as_router
from supersonic_moe.kernels import reference, registry
from supersonic_moe.kernels.interface import DownBackward, Gate, Into, Rows, Slots, TokenRows, UpProjection
from supersonic_moe.kernels.reference import quantize as reference_quantize
from supersonic_moe.perf_model import LayerShape, Machine, Step, kernel_steps
from supersonic_moe.quantization import block_format
from supersonic_moe.routing.plan import plan_from_topk
from supersonic_moe.routing.topk import route

#: Kernels in the order of a layer. route_and_plan is all of the routing in one call, ops of torch.library included.
GROUPS = {
    "routing": ("route_forward", "build_plan", "route_and_plan", "route_backward"),
    "forward": ("up_projection", "up_projection_inference", "grouped_mm_y", "gather_sum_out"),
    "backward": (
        "down_backward",
        "wgrad_dw2",
        "wgrad_dw2_accumulate",
        "wgrad_dw1",
        "wgrad_dw1_accumulate",
        "grouped_mm_dx",
        "gather_sum_dx",
    ),
    "FP8 quantizers": (
        "quantize_rows_x",
        "quantize_blocks_w1",
        "quantize_blocks_w2",
        "quantize_columns_x",
        "quantize_both_orders_dz",
    ),
}
CEILINGS = ("copy", "matmul")
COPY_BYTES = {"cuda": 2**31, "cpu": 2**25}  # read + written: far more than any cache
MATMUL_SIDE = {"cuda": 8192, "cpu": 512}


class KernelsResult(CaseResult):
    """Metrics of each kernel and ceiling at one shape; ``missing`` says why a kernel has none."""

    @property
    def failed(self) -> list[str]:
        return list(self.missing)

    def cases(self) -> list[CaseResult]:
        return self.each_alone("/")


def results_of(rows: Iterable[Mapping[str, Any]]) -> list[KernelsResult]:
    """The results behind the rows of a file."""
    found: dict[str, KernelsResult] = {}
    for row in rows:
        case, _, name = row["case"].partition("/")
        metrics = found.setdefault(case, KernelsResult(case)).metrics.setdefault(name, {})
        metrics[row["metric"]] = row["value"]
    return list(found.values())


def backend_of(shape: LayerShape, config: LayerConfig) -> str:
    """Raises ValueError for a shape or a backend that cannot be measured."""
    config.check()
    if shape.tokens == 0:
        raise ValueError(f"a kernel needs something to do: T must be at least 1; got {shape}.")
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate}
    backend = KernelBackendMoE[config.backend].value
    return registry.choose(config.device, config.dtype, backend=backend, **sizes).name


def run_case(shape: LayerShape, config: LayerConfig, progress: Callable[[str], None] = lambda _: None) -> KernelsResult:
    """Time every kernel that runs, and both ceilings. Raises NoResultError without operands or without ceilings."""
    result, clock = KernelsResult(config.case_name(shape)), clock_for(config.device)
    progress("random operands")
    calls = required(result.case, partial(_all_calls, shape, config))
    graphs = config.device.type == "cuda" and backend_of(shape, config) != "reference"  # it asks the host for offsets
    ready: dict[str, tuple[Call, int]] = {}
    for name, call in calls.items():
        progress(f"first call of {name}")
        prepared = attempt(partial(in_graphs, call, clock, graphs and name not in CEILINGS))
        if isinstance(prepared, Missing):
            result.missing[name] = prepared.reason
        else:
            ready[name] = prepared

    progress(f"timing {len(ready)} kernels")
    contenders = {name: call for name, (call, _) in ready.items()}
    run = partial(measure, contenders, clock, warm_ms=config.warm_ms, min_ms=config.min_ms)
    timings: dict[str, Timing] = {}
    for name, timing in required(f"{result.case}, timing", run).items():
        if isinstance(timing, Missing):
            result.missing[name] = timing.reason
        else:
            timings[name] = of_a_call(timing, ready[name][1])
    for name in CEILINGS:
        if name in result.missing:
            raise NoResultError(f"{result.case}: without {name} nothing has a floor: {result.missing[name]}.")

    ceilings = _ceilings(config, timings)
    steps = kernel_steps(shape, gated=as_activation(config.activation).gated, element_bytes=config.dtype.itemsize)
    machine = Machine(
        name=device_name(config.device),
        matrix_flops=ceilings["matmul"]["tflops"] * 1e12,
        datasheet_flops=math.nan,
        bandwidth=ceilings["copy"]["gbps"] * 1e9,
        source="measured in the same run",
    )
    result.metrics = {
        name: _beside_floor(step, timings[name], machine) for name, step in steps.items() if name in timings
    }
    result.metrics |= ceilings
    return result


# ---- metrics ---------------------------------------------------------------------------------------------------------


def _rates(flops: int, bytes_moved: int, timing: Timing) -> Metrics:
    """TFLOP/s and pJ/FLOP only where there are FLOPs worth counting, GB/s of compulsory bytes."""
    metrics = {"us": timing.us, "spread": timing.spread, "flops": flops, "bytes": bytes_moved}
    metrics["gbps"] = bytes_moved / timing.us / 1e3
    metrics |= timing.energy(flops)
    if flops:
        metrics["tflops"] = flops / timing.us / 1e6
    else:
        metrics.pop("pj_per_flop", None)
    return metrics


def _beside_floor(step: Step, timing: Timing, machine: Machine) -> Metrics:
    floor_us = step.roofline_us(machine)
    return _rates(step.flops, step.bytes, timing) | {"floor_us": floor_us, "of_floor": floor_us / timing.us}


def _ceilings(config: LayerConfig, timings: Mapping[str, Timing]) -> dict[str, Metrics]:
    side, size = MATMUL_SIDE[config.device.type], config.dtype.itemsize
    copy = _rates(0, COPY_BYTES[config.device.type], timings["copy"])
    return {"copy": copy, "matmul": _rates(2 * side**3, 3 * side**2 * size, timings["matmul"])}


# ---- calls -----------------------------------------------------------------------------------------------------------


def _all_calls(shape: LayerShape, config: LayerConfig) -> dict[str, Call]:
    if config.device.type == "cuda":
        torch.cuda.empty_cache()  # one shape's fragments must not starve the next
    return kernel_calls(shape, config) | _ceiling_calls(config)


def kernel_calls(shape: LayerShape, config: LayerConfig) -> dict[str, Call]:
    """A call for each kernel, as ``training/bf16.py`` and ``routing/`` make them."""
    T, H, I, E, K = shape.tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k  # noqa: E741
    backend = backend_of(shape, config)
    kernels = registry.kernels(backend)
    k, routing, quantizers = kernels.experts, kernels.routing, kernels.quantizers
    activation, router = as_activation(config.activation), as_router(config.router)
    router = router.base if isinstance(router, TokenRounding) else router
    gate = Gate(activation, GateUpLayout.INTERLEAVED)
    normal = partial(torch.randn, device=config.device, dtype=config.dtype)

    x_TH, dout_TH = normal(T, H), normal(T, H)
    w1_ENH, w2_EHI = normal(E, activation.fan * I, H).mul_(0.02), normal(E, H, I).mul_(0.02)
    logits_TE = x_TH @ normal(H, E).mul_(H**-0.5)
    dscores_TK = torch.randn(T, K, device=config.device)
    scores_TK, ids_TK = route(logits_TE, K, config.router, backend=backend)
    ids_S = ids_TK.reshape(-1)
    plan = plan_from_topk(ids_TK, E)
    offsets, row_expert = plan.expert_offsets, plan.row_expert
    x_rows, dout_rows = Rows(x_TH, plan.gather_index), Rows(dout_TH, plan.gather_index)
    s_P = scores_TK.reshape(-1)[plan.scatter_index]  # plain top-k: every row has a slot
    z_PN, da_PI = normal(plan.capacity, activation.fan * I), normal(plan.capacity, I)
    a_PI = reference.activation_forward(z_PN, None, row_expert, gate)
    dz_PN, as_PI, _ = reference.activation_backward(z_PN, None, da_PI, s_P, row_expert, gate)
    del da_PI
    y_PH = normal(plan.capacity, H)  # and dx before its sum
    positions = block_format.padded_capacity(plan.capacity, E)
    segments = reference_quantize.pad_segments(offsets, plan.gather_index, positions)
    of_tokens = (row_expert, TokenRows(plan.token_rows, None, K, T))
    grad_w1, grad_w2 = (torch.zeros(w.shape, device=config.device) for w in (w1_ENH, w2_EHI))  # fp32, as main_grad is
    add_w1, add_w2 = Into(grad_w1, transposed=True, accumulate=True), Into(grad_w2, accumulate=True)
    up = UpProjection(x_rows, w1_ENH, None, offsets, row_expert, gate, save=True)
    down = DownBackward(dout_rows, w2_EHI, z_PN, None, s_P, offsets, row_expert, gate)
    slots = Slots(ids_S, None, K, T, E, tile=1, capacity=plan.capacity)

    return {
        "route_forward": lambda: routing.route_forward(logits_TE, K, router),
        "build_plan": lambda: routing.build_plan(slots),
        "route_and_plan": lambda: plan_from_topk(route(logits_TE, K, config.router, backend=backend)[1], E),
        "route_backward": lambda: routing.route_backward(dscores_TK, logits_TE, scores_TK, ids_TK, router),
        "up_projection": lambda: k.up_projection(up),
        "up_projection_inference": lambda: k.up_projection(up._replace(save=False)),
        "grouped_mm_y": lambda: k.grouped_mm(Rows(a_PI), w2_EHI.transpose(1, 2), offsets),
        "gather_sum_out": lambda: k.gather_sum(y_PH, s_P, None, *of_tokens),
        "down_backward": lambda: k.down_backward(down),
        "wgrad_dw2": lambda: k.grouped_mm_wgrad(dout_rows, as_PI, offsets),
        "wgrad_dw2_accumulate": lambda: k.grouped_mm_wgrad(dout_rows, as_PI, offsets, add_w2),
        "wgrad_dw1": lambda: k.grouped_mm_wgrad(x_rows, dz_PN, offsets, Into(transposed=True)),
        "wgrad_dw1_accumulate": lambda: k.grouped_mm_wgrad(x_rows, dz_PN, offsets, add_w1),
        "grouped_mm_dx": lambda: k.grouped_mm(Rows(dz_PN), w1_ENH, offsets),
        "gather_sum_dx": lambda: k.gather_sum(y_PH, None, None, *of_tokens),
        "quantize_rows_x": lambda: quantizers.quantize_rows(x_TH),
        "quantize_blocks_w1": lambda: quantizers.quantize_weights([w1_ENH])[0],
        "quantize_blocks_w2": lambda: quantizers.quantize_weights([w2_EHI])[0],
        "quantize_columns_x": lambda: quantizers.quantize_columns(x_TH, segments.token_index, segments=segments),
        "quantize_both_orders_dz": lambda: quantizers.quantize_both_orders(dz_PN, segments.row_index),
    }


def _ceiling_calls(config: LayerConfig) -> dict[str, Call]:
    normal = partial(torch.randn, device=config.device, dtype=config.dtype)
    source = normal(COPY_BYTES[config.device.type] // (2 * config.dtype.itemsize))
    side = MATMUL_SIDE[config.device.type]
    a_NN, b_NN = normal(side, side), normal(side, side)
    copy, product_NN = torch.empty_like(source), torch.empty_like(a_NN)
    return {"copy": lambda: copy.copy_(source), "matmul": lambda: torch.mm(a_NN, b_NN, out=product_NN)}


# ---- terminal --------------------------------------------------------------------------------------------------------

COLUMNS = ("us", "tflops", "gbps", "floor_us", "of_floor", "sm_mhz", "watts", "pj_per_flop")
_METRICS = {metric.name: metric for metric in METRICS}


def kernel_table(result: KernelsResult) -> Table:
    """A row for each kernel, group by group; then the two ceilings that the floors are made of."""
    table = Table(title=result.case, title_justify="left", title_style="bold", box=None, pad_edge=False)
    columns = [name for name in COLUMNS if any(name in metrics for metrics in result.metrics.values())]
    table.add_column("", no_wrap=True)
    for name in columns:
        heading = _METRICS[name].label.replace(",", "").replace(" / ", " ÷ ").replace(" ", "\n")
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for title, names in {**GROUPS, "ceilings": CEILINGS}.items():
        table.add_row(title, style="dim")
        for name in names:
            if name in result.metrics:
                table.add_row(f"  {name}", *_cells(result.metrics[name], columns))
            elif name in result.missing:
                table.add_row(f"  {name}", "[red]failed[/red]")
    return table


def _cells(metrics: Metrics, columns: Sequence[str]) -> list[str]:
    cells = {name: short(metrics[name] / _METRICS[name].shown_in) for name in columns if name in metrics}
    cells["us"] += f" [dim]±{metrics['spread'] / 2:.1%}[/dim]"
    return [cells.get(name, "[dim]-[/dim]") for name in columns]
