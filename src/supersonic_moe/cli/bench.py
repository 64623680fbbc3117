"""``supersonic-moe bench``: measure against peers in the same run; table, JSON, PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from supersonic_moe.cli import options

if TYPE_CHECKING:
    from supersonic_moe.bench.layer import CaseResult, LayerConfig
    from supersonic_moe.perf_model import LayerShape

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory against peers, side by side in one run.")


@app.callback()
def suites() -> None:
    """Keeps ``bench layer`` a subcommand although it is the only suite."""


@app.command()
def layer(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T,H,I,E,K",
            help="Tokens, hidden, intermediate, experts, top-k. Repeatable. Default: five layers of real models.",
        ),
    ] = None,
    activation: Annotated[str, typer.Option(help="swiglu, geglu, reglu, relu_sq, relu, gelu or silu.")] = "swiglu",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32.")
    ] = None,
    router: Annotated[
        str, typer.Option(help="softmax_after_topk, softmax_before_topk, sigmoid_grouped_topk, ...")
    ] = "softmax_after_topk",
    skew: Annotated[
        float, typer.Option(min=0, help="Spread of the experts' popularity; 0 is uniform, 1 is strong.")
    ] = 0,
    backend: Annotated[str, typer.Option(help="Kernels of our layer: auto, or one by name.")] = "auto",
    peers: Annotated[str, typer.Option(help="Comma-separated; empty for none.")] = "torch_loop,grouped_mm",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every number here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a chart here.")] = None,
    min_ms: Annotated[float, typer.Option(min=0, help="Timed work of each contender, milliseconds.")] = 400,
    warm_ms: Annotated[float, typer.Option(min=0, help="Load before anything is timed, milliseconds.")] = 300,
    cold_l2: Annotated[bool, typer.Option("--cold-l2", help="Flush the L2 cache before every timed call.")] = False,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record where the tree is a copy without .git. Default: ask git.")
    ] = None,
) -> None:
    """One MoE layer, router included: forward, forward + backward, GPU-busy time, memory, TFLOP/s, MFU, watts."""
    import torch

    from supersonic_moe.bench import report
    from supersonic_moe.bench.layer import LayerConfig, machine_of
    from supersonic_moe.bench.shapes import CPU_LAYER_SHAPES, LAYER_SHAPES

    where = options.device(device)
    cases = options.shapes(shape or []) or (LAYER_SHAPES if where.type == "cuda" else CPU_LAYER_SHAPES)
    config = LayerConfig(
        device=where,
        dtype=options.dtype(dtype, where),
        activation=activation,
        router=router,
        skew=skew,
        backend=backend,
        peers=[name for name in peers.split(",") if name],
        warm_ms=warm_ms,
        min_ms=min_ms,
        cold_l2=cold_l2,
    )
    with options.usage_errors():
        config.check()
    if where.type == "cuda":
        torch.cuda.set_device(where)  # events are recorded on the current device

    console = Console()
    heading = f"MoE layer on {report.device_name(where)}, {config.dtype_name}, {config.activation}, {config.router}"
    console.print(f"{heading}\n[dim]{_method(config)}[/dim]\n")
    results = _run(cases, config, console)
    if len(results) > 1:
        console.print(report.summary_table(results))
    if results and json:
        report.write_json(json, report.document("layer", results, where, commit))
        console.print(f"Wrote {json}")
    if results and png:
        machine = machine_of(where, config.dtype)
        report.write_png(png, results, heading, machine.matrix_flops / 1e12 if machine else None)
        console.print(f"Wrote {png}")
    if len(results) < len(cases):
        raise typer.Exit(1)


def _run(cases: tuple[LayerShape, ...] | list[LayerShape], config: LayerConfig, console: Console) -> list[CaseResult]:
    """Every case, each printed as soon as it is measured; one that fails is explained and left out."""
    from supersonic_moe.bench import report
    from supersonic_moe.bench.layer import LayerFailedError, run_case

    results = []
    for i, case in enumerate(cases, 1):
        with console.status("", refresh_per_second=4) as status:
            try:
                result = run_case(case, config, lambda doing: status.update(f"{case} ({i} of {len(cases)}): {doing}"))  # noqa: B023
            except LayerFailedError as error:
                console.print(f"[red]No result:[/red] {escape(str(error))}\n", highlight=False)
                continue
        console.print(report.case_table(result))
        for peer, reason in result.missing.items():
            console.print(f"[yellow]missing[/yellow] {peer}: {escape(reason)}", highlight=False)
        console.print()
        results.append(result)
    return results


def _method(config: LayerConfig) -> str:
    cold = ", cold L2" if config.cold_l2 else ""
    return (
        f"Medians ± half the spread of the middle 80 %, of at least {config.min_ms:g} ms each, interleaved, "
        f"after {config.warm_ms:g} ms of load{cold}. In parentheses: how many times less ours takes."
    )
