"""``supersonic-moe explain``: which kernels a layer runs, why, and what each step costs at least."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from supersonic_moe.bench import options
from supersonic_moe.cli.output import console as output
from supersonic_moe.config.recipe import Fp8Recipe, Recipe
from supersonic_moe.perf_model import (
    H200,
    STEP_KERNELS,
    LayerShape,
    fp8_saved_bytes,
    fp8_step_kernels,
    fp8_steps,
    layer_flops,
    layer_steps,
    saved_activation_bytes,
)

if TYPE_CHECKING:
    from supersonic_moe.kernels.registry import Choice

ROUTING_KERNELS = frozenset({"route_forward", "build_plan", "route_backward"})

#: How a backend tiles its work; sm90: see ``_tiles``.
TILES = {
    "reference": "none: one torch call per expert, or over all rows",
    "triton": "grouped products by torch's own choice; memory-bound kernels by row width (kernels/triton/tiling.py)",
}


def explain(
    shape: Annotated[
        list[str], typer.Option(metavar="T,H,I,E,K", help="Tokens, hidden, intermediate, experts, top-k. Repeatable.")
    ],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    activation: options.Activation = "swiglu",
    device: options.Device = None,
    recipe: options.RecipeName = "bf16",
    save_preactivation: options.Saved = None,
    wgrad: options.Wgrad = None,
    scale: options.Scale = None,
) -> None:
    """Show which backend and kernels run each step of a layer, why, and each step's FLOPs, bytes and roofline time."""
    from supersonic_moe.config.activation import as_activation
    from supersonic_moe.kernels import registry

    cases = options.shapes(shape)
    where = options.device(device)
    numerics = options.recipe(recipe, save_preactivation, wgrad, scale)
    precision = options.dtype(dtype, where, numerics)
    with options.usage_errors("--activation"):
        gated = as_activation(activation).gated
    console = output()
    for case in cases:
        hidden, intermediate = case.hidden, case.intermediate
        with options.usage_errors("--recipe"):
            if isinstance(numerics, Fp8Recipe):
                choice = registry.choose_fp8(where, hidden=hidden, intermediate=intermediate)
            else:
                choice = registry.choose(where, precision, hidden=hidden, intermediate=intermediate)
        routing = registry.choose(where)
        dtype_name = "FP8" if isinstance(numerics, Fp8Recipe) else str(precision).removeprefix("torch.")
        console.print(f"[bold]{case}[/bold]   {activation}, {dtype_name}, on {where}\n")
        for what, picked in (("experts", choice), ("routing", routing)):
            console.print(f"{what}  [bold]{picked.name}[/bold]: {escape(picked.reason)}", highlight=False)
        tiles = TILES[choice.name] if choice.name in TILES else _tiles(case, gated, numerics)
        console.print(f"tiles    {tiles}\n", highlight=False)
        console.print(_steps(case, gated, precision.itemsize, numerics))
        console.print()
        console.print(_kernels(choice, routing, numerics))


def _tiles(shape: LayerShape, gated: bool, recipe: Recipe) -> str:
    """M x N x K of a tile for each product of a layer with gathered rows on sm_90a, and what goes with it."""
    from supersonic_moe.kernels.sm90.gemm_config import BUFFER_BYTES, choose

    hidden, width, n1 = shape.hidden, shape.intermediate, shape.intermediate * (2 if gated else 1)
    rows, fp8 = shape.rows // shape.experts, isinstance(recipe, Fp8Recipe)
    wgrad_fp8 = isinstance(recipe, Fp8Recipe) and recipe.wgrad == "fp8"
    products: dict[str, tuple[int, bool, int | None, int, bool]] = {  # columns, gather, rows, depth, in FP8
        "1": (n1, True, rows, 0, fp8),
        "2": (hidden, False, rows, width, fp8),
        "4": (width, True, rows, 0, fp8),
        "5": (width, not wgrad_fp8, None, rows, wgrad_fp8),
        "6": (hidden, False, rows, n1, fp8),
        "7": (n1, not wgrad_fp8, None, rows, wgrad_fp8),
    }
    steps: dict[str, list[str]] = {}
    for step, (columns, gather, rows_of_d, depth, in_fp8) in products.items():
        staging, broad = BUFFER_BYTES if in_fp8 else 0, step == "1" and not gated
        config = choose(columns, gather, rows=rows_of_d, depth=depth, broad=broad, staging_bytes=staging)
        steps.setdefault(str(config), []).append(step)
    return "; ".join(f"{config}: step {', '.join(keys)}" for config, keys in steps.items())


def _steps(shape: LayerShape, gated: bool, element_bytes: int, recipe: Recipe) -> Group:
    """The table of steps, then its totals. No floor in fp32: the measured rate is that of 16-bit products."""
    timed = element_bytes == 2
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step", no_wrap=True)
    table.add_column("computes")  # gives way first in a narrow terminal
    for heading in ("GFLOP", "MB", *(("floor µs", "bound") if timed else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    if isinstance(recipe, Fp8Recipe):
        steps = fp8_steps(shape, recipe, gated=gated)
        saved, copies = fp8_saved_bytes(shape, recipe, gated=gated)
    else:
        steps = layer_steps(shape, gated=gated, element_bytes=element_bytes)
        saved, copies = saved_activation_bytes(shape, gated=gated, element_bytes=element_bytes), 0
    for step in steps:
        floor = (f"{step.roofline_us(H200):,.1f}", step.bound(H200)) if timed else ()
        gflop = f"{step.flops / 1e9:,.1f}" if step.flops else "-"
        table.add_row(step.key, step.what, gflop, f"{step.bytes / 1e6:,.1f}", *floor)
    forward, both = layer_flops(shape, gated=gated)
    with_copies = f", and {copies / 2**20:,.1f} MiB of FP8 weights" if copies else ""
    lines = [
        f"model FLOPs (router not counted): {forward / 1e12:,.3f} T forward, {both / 1e12:,.3f} T with backward",
        f"saved for backward: {saved / 2**20:,.1f} MiB = X and the pre-activation, plus a few int32 per routed row"
        + with_copies,
    ]
    if timed:
        sums = {phase: sum(s.roofline_us(H200) for s in steps if s.phase == phase) for phase in ("forward", "backward")}
        total = sum(sums.values())
        rate = f" ({both / total / 1e6:,.0f} TFLOP/s)" if total else ""
        lines += [
            f"floor on one {H200.name}: {sums['forward']:,.0f} µs forward, {total:,.0f} µs with backward{rate}",
            f"  {H200.source}",
        ]
    else:
        lines.append("no floor in float32: the rate of the hardware was measured for 16-bit and FP8 products only")
    return Group(table, Text(), *(Text(line, style="dim") for line in lines))


def _kernels(experts: Choice, routing: Choice, recipe: Recipe) -> Table:
    """Every kernel of this layer, the steps it takes part in and where it is written."""
    from supersonic_moe.kernels import registry

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("kernel", "steps", "source"):
        table.add_column(heading)
    kernels = fp8_step_kernels(recipe) if isinstance(recipe, Fp8Recipe) else STEP_KERNELS
    for name in dict.fromkeys(kernels.values()):
        routes = name in ROUTING_KERNELS
        backend = registry.kernels((routing if routes else experts).name)
        function = getattr(backend.routing if routes else backend.fp8 or backend.experts, name)
        module = sys.modules[function.__module__]
        steps = ", ".join(step for step, kernel in kernels.items() if kernel == name)
        table.add_row(name, steps, module.__name__.removeprefix("supersonic_moe.").replace(".", "/") + ".py")
    return table
