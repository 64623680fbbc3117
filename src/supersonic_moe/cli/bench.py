"""``supersonic-moe bench``: measure against peers in the same run; table, JSON, PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

from supersonic_moe.cli import options

if TYPE_CHECKING:
    import torch

    from supersonic_moe.bench.kernels import KernelsResult
    from supersonic_moe.bench.precision import PrecisionResult
    from supersonic_moe.bench.report import CaseResult
    from supersonic_moe.perf_model import LayerShape

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory against peers, side by side in one run.")

Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="T,H,I,E,K", help="Tokens, hidden, intermediate, experts, top-k. Repeatable."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")]
Json = Annotated[Path | None, typer.Option(help="Write every number here.")]
Png = Annotated[Path | None, typer.Option(help="Write a chart here.")]
MinMs = Annotated[float, typer.Option(min=0, help="Timed work of each contender, milliseconds.")]
WarmMs = Annotated[float, typer.Option(min=0, help="Load before anything is timed, milliseconds.")]
Commit = Annotated[
    str | None, typer.Option(help="Commit to record where the tree is a copy without .git. Default: ask git.")
]

Case = TypeVar("Case")
Result = TypeVar("Result")


@app.command()
def layer(
    shape: Shapes = None,
    set_name: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="default: five layers of real models; fine-grained: small experts; fp8: default and short batches.",
        ),
    ] = None,
    recipe: options.RecipeName = "bf16",
    save_preactivation: options.Saved = None,
    wgrad: options.Wgrad = None,
    scale: options.Scale = None,
    activation: Annotated[str, typer.Option(help="swiglu, geglu, reglu, relu_sq, relu, gelu or silu.")] = "swiglu",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32.")
    ] = None,
    router: Annotated[
        str,
        typer.Option(
            help="softmax_after_topk, softmax_before_topk, sigmoid_grouped_topk, ...; "
            "token_rounding (NR-f, tile 128) also times plain top-k."
        ),
    ] = "softmax_after_topk",
    skew: Annotated[
        float, typer.Option(min=0, help="Spread of the experts' popularity; 0 is uniform, 1 is strong.")
    ] = 0,
    backend: Annotated[str, typer.Option(help="Kernels of our layer: auto, or one by name.")] = "auto",
    peers: Annotated[str, typer.Option(help="Comma-separated; empty for none.")] = "torch_loop,grouped_mm",
    device: Device = None,
    json: Json = None,
    png: Png = None,
    min_ms: MinMs = 400,
    warm_ms: WarmMs = 300,
    cold_l2: Annotated[bool, typer.Option("--cold-l2", help="Flush the L2 cache before every timed call.")] = False,
    commit: Commit = None,
) -> None:
    """One MoE layer, router included: forward, forward + backward, GPU-busy time, memory, TFLOP/s, MFU, watts."""
    from supersonic_moe.bench import report
    from supersonic_moe.bench.layer import LayerConfig, machine_of, run_case

    where = options.device(device)
    numerics = options.recipe(recipe, save_preactivation, wgrad, scale)
    cases = _layer_shapes(shape, set_name, where, default="fp8" if recipe == "fp8" else "default")
    config = LayerConfig(
        device=where,
        dtype=options.dtype(dtype, where, numerics),
        recipe=numerics,
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
    _make_current(where)

    console = Console()
    heading = f"MoE layer on {report.device_name(where)}, {config.dtype_name}, {config.activation}, {config.router}"
    cold = ", cold L2" if cold_l2 else ""
    console.print(
        f"{heading}\n[dim]{_method(min_ms, warm_ms)}{cold}. In parentheses: how many times less ours takes.[/dim]\n"
    )

    def show(result: CaseResult) -> None:
        console.print(report.case_table(result))
        _print_missing(result, console)

    results = _each(cases, lambda case, progress: run_case(case, config, progress), show, console)
    for table in report.summary_tables(results, "fwd_bwd_us", "fwd_bwd_tflops"):
        console.print(table)
    _write_json(json, "layer", results, where, commit, console)
    if results and png:
        panels = [
            report.Panel("forward", "fwd_tflops", results),
            report.Panel("forward + backward", "fwd_bwd_tflops", results),
        ]
        machine = machine_of(where, config.dtype)
        ceiling = None if machine is None else machine.fp8_flops if config.fp8 else machine.matrix_flops
        report.write_png(png, panels, heading, ceiling and ceiling / 1e12)
        console.print(f"Wrote {png}")
    if len(results) < len(cases):
        raise typer.Exit(1)


@app.command()
def gemm(
    case: Annotated[
        list[str] | None,
        typer.Option(help="A case by name, else gemm:E,rows,N,K or wgrad:E,rows,M,N. Repeatable. Default: all named."),
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16, or fp8: e4m3 with block scales.")] = "bf16",
    device: Device = None,
    json: Json = None,
    png: Png = None,
    min_ms: MinMs = 400,
    warm_ms: WarmMs = 300,
    commit: Commit = None,
) -> None:
    """Grouped GEMM and weight gradient alone, plain, gathered, accumulating: TFLOP/s, watts, pJ/FLOP, error."""
    from supersonic_moe.bench import gemm as suite
    from supersonic_moe.bench import gemm_bf16, gemm_fp8, report
    from supersonic_moe.bench.shapes import GEMM_CASES, GemmCase
    from supersonic_moe.bench.timing import clock_for
    from supersonic_moe.perf_model import H200

    where = options.device(device)
    if precision not in ("bf16", "fp8"):
        raise typer.BadParameter(f"a precision is bf16 or fp8; got {precision!r}.", param_hint="--precision")
    fp8 = precision == "fp8"
    with options.usage_errors("--case"):
        cases = [GemmCase.parse(text) for text in case or []] or list(GEMM_CASES)
    with options.usage_errors("--device"):
        suite.check_device(where)
    _make_current(where)

    console, clock = Console(), clock_for(where)
    heading = f"Grouped GEMMs on {report.device_name(where)}, {'FP8, block scales' if fp8 else 'bfloat16'}"
    console.print(f"{heading}\n[dim]{_method(min_ms, warm_ms)}.[/dim]\n")

    def show(result: CaseResult) -> None:
        if result.metrics:
            console.print(report.contender_table(result))
        _print_missing(result, console)

    results = _each(
        cases,
        lambda case, progress: suite.run_case(
            case,
            gemm_fp8.contenders if fp8 else gemm_bf16.contenders,
            where,
            clock,
            warm_ms=warm_ms,
            min_ms=min_ms,
            compared=gemm_fp8.COMPARED if fp8 else suite.COMPARED,
            progress=progress,
        ),
        show,
        console,
    )
    comparisons = [comparison for result in results for comparison in result.comparisons()]
    for table in report.summary_tables(comparisons, "us", "tflops"):
        console.print(table)
    _write_json(json, "gemm", comparisons, where, commit, console)
    if comparisons and png:
        kinds = {"grouped GEMM": "gemm", "weight gradient": "wgrad"}
        panels = [
            report.Panel(title, "tflops", measured)
            for title, kind in kinds.items()
            if (measured := [result for result in results if result.kind == kind and result.metrics])
        ]
        report.write_png(png, panels, heading, (H200.fp8_flops if fp8 else H200.matrix_flops) / 1e12)
        console.print(f"Wrote {png}")
    if len(results) < len(cases) or any(result.failed for result in results):
        raise typer.Exit(1)


@app.command()
def kernels(
    shape: Shapes = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Kernels to measure: auto, or a backend by name.")] = "auto",
    device: Device = None,
    json: Json = None,
    png: Png = None,
    min_ms: MinMs = 400,
    warm_ms: WarmMs = 300,
    commit: Commit = None,
) -> None:
    """Every kernel of a layer alone, beside its floor: time, TFLOP/s, GB/s, watts, pJ/FLOP; roofline figure."""
    from supersonic_moe.bench import report
    from supersonic_moe.bench.kernel_figure import write_figures
    from supersonic_moe.bench.kernels import backend_of, kernel_table, run_case
    from supersonic_moe.bench.layer import LayerConfig
    from supersonic_moe.bench.shapes import CPU_LAYER_SHAPES, LAYER_SHAPES

    where = options.device(device)
    config = LayerConfig(where, options.dtype(dtype, where), backend=backend, peers=(), warm_ms=warm_ms, min_ms=min_ms)
    cases = options.shapes(shape or []) or (LAYER_SHAPES[:2] if where.type == "cuda" else CPU_LAYER_SHAPES)
    with options.usage_errors():
        backends = dict.fromkeys(backend_of(case, config) for case in cases)
    _make_current(where)

    console = Console()
    heading = f"Kernels of one MoE layer, each alone, on {report.device_name(where)}, {config.dtype_name}"
    console.print(f"{heading}, {', '.join(backends)}\n[dim]{_method(min_ms, warm_ms)}.[/dim]\n")

    def show(result: KernelsResult) -> None:
        console.print(kernel_table(result))
        for name, reason in result.missing.items():
            console.print(f"[red]failed[/red] {name}: {escape(reason)}", highlight=False)

    results = _each(cases, lambda case, progress: run_case(case, config, progress), show, console)
    measured = [case for result in results for case in result.cases()]
    _write_json(json, "kernels", measured, where, commit, console)
    if measured and png:
        for path in write_figures(png, report.document("kernels", measured, where, commit)):
            console.print(f"Wrote {path}")
    if len(results) < len(cases) or any(result.missing for result in results):
        raise typer.Exit(1)


@app.command()
def breakdown(
    shape: Shapes = None,
    recipe: options.RecipeName = "bf16",
    save_preactivation: options.Saved = None,
    wgrad: options.Wgrad = None,
    scale: options.Scale = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32.")
    ] = None,
    device: Device = None,
    json: Json = None,
    min_ms: MinMs = 400,
    warm_ms: WarmMs = 300,
    commit: Commit = None,
) -> None:
    """What one forward + backward spends its time on: every function of the backend in order, beside its floor."""
    from supersonic_moe.bench import report
    from supersonic_moe.bench.breakdown import breakdown_table, run_case
    from supersonic_moe.bench.layer import LayerConfig

    where = options.device(device)
    shapes = _layer_shapes(shape, None, where)
    cases = shapes if shape else shapes[:1]  # on a GPU the reference layer
    numerics = options.recipe(recipe, save_preactivation, wgrad, scale)
    config = LayerConfig(
        device=where,
        dtype=options.dtype(dtype, where, numerics),
        recipe=numerics,
        peers=(),
        warm_ms=warm_ms,
        min_ms=min_ms,
    )
    _make_current(where)

    console = Console()
    console.print(
        f"One forward + backward on {report.device_name(where)}, {config.dtype_name}\n[dim]Medians of at least "
        f"{min_ms:g} ms of calls after {warm_ms:g} ms of load; every function between two events.[/dim]\n"
    )
    results = _each(
        cases,
        lambda case, progress: run_case(case, config, progress),
        lambda result: console.print(breakdown_table(result)),
        console,
    )
    _write_json(json, "breakdown", [line for r in results for line in r.cases()], where, commit, console)
    if len(results) < len(cases):
        raise typer.Exit(1)


@app.command()
def cold_start(
    shape: Shapes = None,
    repeats: Annotated[int, typer.Option(min=1, help="New processes for each state of the caches.")] = 3,
    device: Device = None,
    json: Json = None,
    commit: Commit = None,
) -> None:
    """Time to the first finished forward + backward in a new process, with cold and with warm kernel caches."""
    from supersonic_moe.bench import report
    from supersonic_moe.bench.cold_start import by_state, run_case

    where = options.device(device)
    shapes = _layer_shapes(shape, None, where)
    cases = shapes if shape else shapes[:1]  # on a GPU the reference layer

    console = Console()
    console.print(
        f"Cold start of a bfloat16 layer on {report.device_name(where)}\n[dim]Medians of {repeats} new processes each: "
        "with empty kernel caches, then with the caches that such a process left behind.[/dim]\n"
    )
    results = _each(
        cases,
        lambda case, progress: run_case(case, where, repeats, progress),
        lambda result: console.print(report.facts_table(result)),
        console,
    )
    _write_json(json, "cold-start", [state for r in results for state in by_state(r)], where, commit, console)
    if len(results) < len(cases):
        raise typer.Exit(1)


@app.command()
def precision(
    shape: Shapes = None,
    device: Device = None,
    json: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the ablation table here.")] = None,
    min_ms: MinMs = 400,
    warm_ms: WarmMs = 300,
    commit: Commit = None,
) -> None:
    """Every choice of the FP8 recipe: step time, saved bytes, and errors against fp32 on easy and hard inputs."""
    import torch

    from supersonic_moe.bench import report
    from supersonic_moe.bench.layer import LayerConfig
    from supersonic_moe.bench.precision import ablation_table, run_case, write_markdown

    where = options.device(device)
    shapes = _layer_shapes(shape, None, where)
    cases = shapes if shape else shapes[:1]  # on a GPU the reference layer
    config = LayerConfig(where, torch.bfloat16, peers=(), warm_ms=warm_ms, min_ms=min_ms)
    _make_current(where)

    console = Console()
    heading = f"FP8 recipes on {report.device_name(where)}, experts alone, forward + backward"
    console.print(f"{heading}\n[dim]{_method(min_ms, warm_ms)}. Errors against the reference in fp32.[/dim]\n")

    def show(result: PrecisionResult) -> None:
        console.print(ablation_table(result))
        _print_missing(result, console)

    results = _each(cases, lambda case, progress: run_case(case, config, progress), show, console)
    _write_json(json, "precision", [case for r in results for case in r.cases()], where, commit, console)
    if results and markdown:
        write_markdown(markdown, results, report.document("precision", [], where, commit))
        console.print(f"Wrote {markdown}")
    if len(results) < len(cases) or any(result.missing for result in results):
        raise typer.Exit(1)


@app.command()
def train(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 600,
    save_preactivation: options.Saved = None,
    wgrad: options.Wgrad = None,
    scale: options.Scale = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs; each has weights and batches of its own.")] = 3,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a step; default: the demo's.")] = None,
    device: Device = None,
    json: Json = None,
    png: Png = None,
    commit: Commit = None,
) -> None:
    """The demo's model trained in FP8 and in BF16 from the same weights on the same batches: held-out bits per byte.

    Chance alone moves the end of one run by 1 to 2 per cent, so what counts is the mean over several pairs of runs.
    """
    from supersonic_moe.bench import report
    from supersonic_moe.bench import train as suite
    from supersonic_moe.config.recipe import Bf16Recipe
    from supersonic_moe.demo.train import corpus_for

    where = options.device(device)
    fp8 = options.recipe("fp8", save_preactivation, wgrad, scale)
    _make_current(where)
    console, config = Console(), suite.config_for(where, batch)
    corpus, pairs, heading = corpus_for(config), [], f"{steps} steps on {report.device_name(where)}"
    for seed in range(seeds):
        runs = []
        for recipe in (fp8, Bf16Recipe()):
            console.print(f"[bold]{recipe}[/bold], pair {seed + 1} of {seeds}, {heading}", highlight=False)
            runs.append(suite.train(recipe, config, corpus, steps, seed, where, console))
        pairs.append((runs[0], runs[1]))
        console.print(f"FP8 ends {100 * suite.gap(*pairs[-1]):+.2f} % from BF16")

    cases = suite.cases(pairs, config)
    console.print(report.case_table(cases[-1]))
    _write_json(json, "train", cases, where, commit, console)
    if png:
        title = f"{steps} steps of {config.batch} x {config.model.context} bytes on {report.device_name(where)}"
        suite.write_curve(png, pairs, f"The demo's model, {title}")
        console.print(f"Wrote {png}")


def _layer_shapes(
    shapes: list[str] | None, set_name: str | None, where: torch.device, default: str = "default"
) -> Sequence[LayerShape]:
    """Those asked for, else a set by name, else the default set or, on a CPU, what a CPU can do in seconds."""
    from supersonic_moe.bench.shapes import CPU_LAYER_SHAPES, LAYER_SETS

    if set_name is None:
        return options.shapes(shapes or []) or (LAYER_SETS[default] if where.type == "cuda" else CPU_LAYER_SHAPES)
    if shapes:
        raise typer.BadParameter("choose shapes by --shape or by --set, not both.", param_hint="--set")
    if set_name not in LAYER_SETS:
        raise typer.BadParameter(f"a set is one of {', '.join(LAYER_SETS)}; got {set_name!r}.", param_hint="--set")
    return LAYER_SETS[set_name]


def _make_current(where: torch.device) -> None:
    import torch

    if where.type == "cuda":
        torch.cuda.set_device(where)  # events are recorded on the current device


def _each(
    cases: Sequence[Case],
    run: Callable[[Case, Callable[[str], None]], Result],
    show: Callable[[Result], None],
    console: Console,
) -> list[Result]:
    """Every case, each shown as soon as it is measured; one that fails is explained and left out."""
    from supersonic_moe.bench.timing import NoResultError

    results = []
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            try:
                results.append(run(case, lambda doing: bar.update(task, description=f"{case}: {doing}")))  # noqa: B023
                show(results[-1])
            except NoResultError as error:
                console.print(f"[red]No result:[/red] {escape(str(error))}", highlight=False)
            console.print()
            bar.advance(task)
    return results


def _print_missing(result: CaseResult, console: Console) -> None:
    for contender, reason in result.missing.items():
        console.print(f"[yellow]missing[/yellow] {contender}: {escape(reason)}", highlight=False)


def _write_json(
    path: Path | None,
    suite: str,
    results: Sequence[CaseResult],
    where: torch.device,
    commit: str | None,
    console: Console,
) -> None:
    from supersonic_moe.bench import report

    if results and path:
        report.write_json(path, report.document(suite, results, where, commit))
        console.print(f"Wrote {path}")


def _method(min_ms: float, warm_ms: float) -> str:
    return (
        f"Medians ± half the spread of the middle 80 %, of at least {min_ms:g} ms each, interleaved, "
        f"after {warm_ms:g} ms of load"
    )
