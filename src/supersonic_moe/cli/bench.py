"""``supersonic-moe bench``: a command for each suite of ``bench/suites``, ``all``, and ``check`` of two files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from inspect import Parameter, Signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

from supersonic_moe.bench import options
from supersonic_moe.bench.suite import Suite
from supersonic_moe.bench.suites import SUITES
from supersonic_moe.cli.output import console as output

Case = TypeVar("Case")
Result = TypeVar("Result", bound=Any)

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory against peers, side by side in one run.")


def execute(suite: Suite[Case, Result], console: Console) -> bool:
    """Measure, print, write and draw; whether each case and everything of ours in it has a result."""
    from supersonic_moe.bench import report

    with options.usage_errors():
        cases = suite.cases()
    _make_current(suite)
    console.print(f"{suite.heading}\n[dim]{suite.method}[/dim]\n")
    commit = (
        (suite.commit or report.tree_commit()) if suite.json else None
    )  # before the file that is written is a change
    results: list[Result] = []
    with suite.around():
        for result in _measured(suite, cases, console):
            results.append(result)
            if suite.json:  # after each case, so that a run that is stopped leaves what it has measured
                report.write_json(suite.json, report.document(suite.name, suite.metrics(results), suite.where, commit))
    if results:
        for renderable in suite.summary(results):
            console.print(renderable)
        for path in (*([suite.json] if suite.json else []), *suite.figure(results)):
            console.print(f"Wrote {path}")
    return len(results) == len(cases) and not any(result.failed for result in results)


def _make_current(suite: Suite[Any, Any]) -> None:
    import torch

    if suite.where.type == "cuda":
        torch.cuda.set_device(suite.where)  # events are recorded on the current device


def _measured(suite: Suite[Case, Result], cases: Sequence[Case], console: Console) -> Iterator[Result]:
    """Every case, each shown as soon as it is measured; one that fails is explained and left out."""
    from supersonic_moe.bench.timing import LastCaseError, NoResultError

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            stages = Stages()

            def show(doing: str, case: Case = case, stages: Stages = stages) -> None:
                stages.begin(doing)
                bar.update(task, description=f"{case}: {doing}")

            try:
                result = suite.run(case, show)
                stages.end()
                console.print(suite.columns(result))
                for name, reason in result.missing.items():
                    mark = "[red]failed[/red]" if name in result.failed else "[yellow]missing[/yellow]"
                    console.print(f"{mark} {name}: {escape(reason)}", highlight=False)
                console.print(f"[dim]{stages}[/dim]", highlight=False)
                yield result
            except NoResultError as error:
                console.print(f"[red]No result:[/red] {escape(str(error))}", highlight=False)
                if isinstance(error, LastCaseError):
                    raise typer.Exit(1) from error
            console.print()
            bar.advance(task)


class Stages:
    """What a case spends its time on, by the names of what it says it does."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._marks = [(now(), "")]

    def begin(self, doing: str) -> None:
        self._marks.append((self._now(), doing))

    def end(self) -> None:
        self.begin("")

    def __str__(self) -> str:
        """ "12.3 s (building 8.1, timing 4.0)": stages of less than a twentieth are left out."""
        whole = self._marks[-1][0] - self._marks[0][0]
        spent = [(doing, end - start) for (start, doing), (end, _) in pairwise(self._marks) if doing]
        long = ", ".join(f"{doing} {seconds:.1f}" for doing, seconds in spent if seconds >= max(whole / 20, 0.1))
        return f"{whole:.1f} s" + (f" ({long})" if long else "")


def _made(kind: type[Suite[Any, Any]], given: dict[str, Any]) -> Suite[Any, Any]:
    with options.usage_errors():
        return kind(**given)


def _command(kind: type[Suite[Any, Any]]) -> Callable[..., None]:
    """What Typer makes the command of a suite from: a function whose parameters are the suite's fields."""

    def command(**given: Any) -> None:
        if not execute(_made(kind, given), output()):
            raise typer.Exit(1)

    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in fields(kind)}
    own_first = [name for base in kind.__mro__ for name in vars(base).get("__annotations__", ()) if name in defaults]
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hints[name]) for name in own_first
    ]
    command.__doc__ = kind.__doc__
    command.__annotations__ = {name: hints[name] for name in own_first}
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


for suite_type in SUITES:
    app.command(suite_type.name)(_command(suite_type))


@app.command("all")
def everything(
    out: Annotated[Path, typer.Option(help="Folder of the files.", callback=options.writable_folder)] = Path(
        "benchmarks/results"
    ),
    device: options.Device = None,
    min_ms: options.MinMs = 400,
    warm_ms: options.WarmMs = 300,
    commit: options.Commit = None,
) -> None:
    """Every suite that this machine can run: a file for each, and a chart where it has one."""
    options.device(device)  # a wrong name is no reason to skip
    console, complete = output(), True
    for kind in SUITES:
        known = {field.name for field in fields(kind)}
        for name, differing in kind.files.items():
            console.rule(name)
            shared = {"device": device, "min_ms": min_ms, "warm_ms": warm_ms, "commit": commit}
            paths = {"json": out / f"{name}.json", "png": out / f"{name}.png"}
            given: dict[str, Any] = {option: value for option, value in {**shared, **paths}.items() if option in known}
            try:
                complete &= execute(_made(kind, {**given, **differing}), console)
            except typer.BadParameter as error:
                console.print(f"[yellow]skipped[/yellow] {name}: {escape(error.message)}", highlight=False)
    if not complete:
        raise typer.Exit(1)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Result files just measured.")],
    committed: Annotated[Path, typer.Option(help="Folder with files of the same names.")] = Path("benchmarks/results"),
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="How much lower a ratio may be, a fraction.")] = 0.03,
) -> None:
    """Whether fresh results are as far ahead of their peers as the committed ones; a line for each that is not."""
    from supersonic_moe.bench.check import findings

    lines = [line for file in files for line in findings(file, committed / file.name, tolerance)]
    for line in lines:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)
    typer.echo(f"{len(files)} as far ahead as committed.")
