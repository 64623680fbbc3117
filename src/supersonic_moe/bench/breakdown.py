"""What one forward + backward of a layer spends its time on: every function of the backend, in the order it is called
(``bench/spans.py``). "rest" is what no such function does: the router's products, autograd's own work, and gaps.

Beside a line stands the floor of its step where ``perf_model`` knows one: the k-th call of a function runs the k-th
step that names this function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.table import Table

from supersonic_moe.bench.layer import LayerConfig, prepare
from supersonic_moe.bench.report import OURS, CaseResult, Metrics, short
from supersonic_moe.bench.spans import Spans, marks_for, measure_spans
from supersonic_moe.bench.timing import required
from supersonic_moe.config.activation import as_activation
from supersonic_moe.config.recipe import Fp8Recipe, Recipe
from supersonic_moe.perf_model import H200, STEP_KERNELS, LayerShape, Step, fp8_step_kernels, fp8_steps, layer_steps


class BreakdownResult(CaseResult):
    """``metrics`` by line: a function with its place among the calls, "rest", "total"."""

    def cases(self) -> list[CaseResult]:
        return self.each_alone("/")


def run_case(
    shape: LayerShape, config: LayerConfig, progress: Callable[[str], None] = lambda _: None
) -> BreakdownResult:
    """The breakdown of our layer. Raises NoResultError where it cannot run."""
    case = config.case_name(shape)
    progress("building the layer")
    _, contenders = required(case, partial(prepare, shape, config))
    progress("timing every function of a step")
    call = contenders[OURS].fwd_bwd
    clock = marks_for(config.device)
    spans = required(case, partial(measure_spans, call, clock, warm_ms=config.warm_ms, min_ms=config.min_ms))
    gated = as_activation(config.activation).gated
    on_hopper = config.device.type == "cuda" and torch.cuda.get_device_capability(config.device) == (9, 0)
    return BreakdownResult(case, _lines(spans, floor_steps(shape, config.recipe, gated=gated), on_hopper))


def floor_steps(shape: LayerShape, recipe: Recipe, *, gated: bool) -> list[tuple[str, Step]]:
    """(function, step) in the order of a call."""
    if isinstance(recipe, Fp8Recipe):
        kernels, steps = fp8_step_kernels(recipe), fp8_steps(shape, recipe, gated=gated)
    else:
        kernels, steps = STEP_KERNELS, layer_steps(shape, gated=gated)
    return [(kernels[step.key], step) for step in steps if step.key in kernels]


def _lines(spans: Spans, steps: Sequence[tuple[str, Step]], floors: bool) -> dict[str, Metrics]:
    lines: dict[str, Metrics] = {}
    waiting: dict[str, list[Step]] = {}
    for function, of_function in steps:
        waiting.setdefault(function, []).append(of_function)
    for place, (function, us) in enumerate(spans.parts, 1):
        step = waiting[function].pop(0) if waiting.get(function) else None
        line = f"{place:02d} {function}" + (f" ({step.key})" if step else "")
        lines[line] = {"us": us, "share": us / spans.us}
        if step is not None:
            lines[line] |= {"flops": step.flops, "bytes": step.bytes}
            if step.flops:
                lines[line]["tflops"] = step.flops / us / 1e6
            if floors:
                floor_us = step.roofline_us(H200)
                lines[line] |= {"floor_us": floor_us, "of_floor": floor_us / us}
    rest = spans.us - sum(span.us for span in spans.parts)
    lines["rest"] = {"us": rest, "share": rest / spans.us}
    lines["total"] = {"us": spans.us, "share": 1.0, "quantize_share": spans.quantize_share}
    return lines


def breakdown_table(result: BreakdownResult) -> Table:
    """A line for each function, its share of the step, and its floor."""
    total = result.metrics["total"]
    title = f"{result.case}   only quantizing or transposing: {total['quantize_share']:.1%}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("µs", "% of step", "TFLOP/s", "floor µs", "floor ÷ time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line, metrics in result.metrics.items():
        floor = (short(metrics["floor_us"]), f"{metrics['of_floor']:.0%}") if "floor_us" in metrics else ("-", "-")
        rate = short(metrics["tflops"]) if "tflops" in metrics else "-"
        table.add_row(line, short(metrics["us"]), f"{100 * metrics['share']:.1f}", rate, *floor)
    return table
