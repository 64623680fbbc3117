"""``supersonic-moe warmup``: compile now what would otherwise be compiled at the first call."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from supersonic_moe.bench import options
from supersonic_moe.cli.output import console as output
from supersonic_moe.cli.output import kernel_progress

if TYPE_CHECKING:
    import torch

    from supersonic_moe.config.recipe import Recipe
    from supersonic_moe.jit import BuildResult
    from supersonic_moe.perf_model import LayerShape


def warmup(
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile for sm_90a, run nothing: needs no GPU.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Compile this many kernels at a time.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T,H,I,E,K",
            help="Also run this layer once, which compiles its Triton kernels. Repeatable.",
        ),
    ] = None,
    recipe: options.RecipeName = "bf16",
    save_preactivation: options.Saved = None,
    wgrad: options.Wgrad = None,
    scale: options.Scale = None,
) -> None:
    """Compile every CUDA kernel, BF16 and FP8, into the cache; with --shape the Triton kernels of that layer too."""
    from supersonic_moe.cli.health import compiling_obstacle
    from supersonic_moe.jit import compile_all, default_cache

    layers = options.shapes(shape or [])
    numerics = options.recipe(recipe, save_preactivation, wgrad, scale)
    device = options.device(None)
    if layers and (compile_only or device.type != "cuda"):
        reason = "--compile-only runs nothing" if compile_only else "torch sees no CUDA GPU here"
        raise typer.BadParameter(f"Triton kernels are compiled by running them, and {reason}.", param_hint="--shape")

    if obstacle := compiling_obstacle():
        typer.echo(obstacle, err=True)
        raise typer.Exit(1)
    from supersonic_moe.kernels.sm90 import registered_specs  # needs Triton

    console = output()
    specs = registered_specs()
    with kernel_progress(console) as progress:
        task = progress.add_task("CUDA kernels", total=len(specs), now="")

        def show(done: int, _total: int, result: BuildResult) -> None:
            progress.update(task, completed=done, now=result.spec.name)

        results = compile_all(specs, progress=show, workers=workers)
        if layers:
            triton = progress.add_task("Triton kernels", total=len(layers), now="")
            for layer in layers:
                progress.update(triton, now=str(layer))
                _run_once(layer, device, numerics)
                progress.advance(triton)

    failed = _print_what_is_wrong(results, console)
    origins = Counter(result.cubin.origin for result in results if result.cubin)
    where = default_cache().directory or "the memory of this process only"
    how = "".join(f", {count} {origin}" for origin, count in origins.items())
    console.print(f"{len(results) - failed} of {len(results)} kernels ready in {where}{how}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _print_what_is_wrong(results: list[BuildResult], console: Console) -> int:
    """A line for each kernel that spills or did not compile; `cache info` lists the others. Returns the failures."""
    for result in results:
        if result.cubin is None:
            console.print(f"[red]{escape(str(result.spec))}[/red] {escape(str(result.error))}", highlight=False)
            continue
        kernels = result.cubin.report.kernels
        registers = max((k.registers for k in kernels), default=0)
        if spills := sum(k.spill_store_bytes + k.spill_load_bytes for k in kernels):
            what = f"spills {spills} bytes, with {registers} registers: a slow kernel"
            console.print(f"[red]{escape(str(result.spec))}[/red] {what}", highlight=False)
    return sum(result.cubin is None for result in results)


def _run_once(shape: LayerShape, device: torch.device, recipe: Recipe) -> None:
    """One training and one inference call of a SwiGLU layer with bf16 weights."""
    import torch

    from supersonic_moe import MoE

    with torch.device(device):
        sizes = (shape.experts, shape.top_k, shape.hidden, shape.intermediate)
        layer = MoE(*sizes, "swiglu", False, 0.02, recipe=recipe).bfloat16()
        x_TH = torch.randn(shape.tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
    out_TH, aux_loss = layer(x_TH)
    (out_TH.float().sum() + aux_loss).backward()
    layer(x_TH, is_inference_mode=True)
    torch.cuda.synchronize(device)
