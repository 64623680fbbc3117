"""``supersonic-moe bench``: a command for each suite of ``bench/suites``, ``all``, and ``check`` of two files."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import fields
from inspect import Parameter, Signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

from supersonic_moe.bench import options
from supersonic_moe.bench.suite import Suite
from supersonic_moe.bench.suites import SUITES
from supersonic_moe.cli.output import console as output
from supersonic_moe.cli.stopping import stoppable

Case = TypeVar("Case")
Result = TypeVar("Result", bound=Any)

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory against peers, side by side in one run.")


def execute(suite: Suite[Case, Result], console: Console) -> bool:
    """Measure, print, write and draw; whether each case and everything of ours in it has a result. What is measured is
    written after every case, so that whatever ends the process leaves it.
    """
    run = Run(suite)
    with stoppable(lambda signal: run.tell(console, f"Stopped by {signal}. ")):
        return _execute(run, console)


def _execute(run: Run[Case, Result], console: Console) -> bool:
    from supersonic_moe.bench.timing import LastCaseError

    suite = run.suite
    with options.usage_errors():
        cases = run.begin()
    _make_current(suite)
    console.print(f"{suite.heading}\n[dim]{suite.method}[/dim]\n")
    try:
        with suite.around(), closing(_measured(suite, cases, console)) as measured:
            for case, result in measured:
                run.add(case, result)
    except LastCaseError as error:
        run.tell(console)
        raise typer.Exit(1) from error
    if run.missing:
        run.tell(console)
    drawn: Sequence[Path] = ()
    if run.results:
        for renderable in suite.summary(run.results):
            console.print(renderable)
        drawn = suite.figure(run.results)
    for path in (*([] if run.missing else run.files), *drawn):
        console.print(f"Wrote {path}")
    return not run.missing and not any(result.failed for result in run.results)


def _make_current(suite: Suite[Any, Any]) -> None:
    import torch

    if suite.where.type == "cuda":
        torch.cuda.set_device(suite.where)  # events are recorded on the current device


class Run(Generic[Case, Result]):
    """What a command has measured so far, and where that is written."""

    def __init__(self, suite: Suite[Case, Result]) -> None:
        self.suite = suite
        self.files: Sequence[Path] = ()
        self._cases: Sequence[Case] = ()
        self._done: list[tuple[Case, Result]] = []
        self._written = 0  # of those that are done

    def begin(self) -> Sequence[Case]:
        """The cases. The commit is that of now, before a file that is written is a change of it."""
        from supersonic_moe.bench.report import tree_commit

        self._cases = self.suite.cases()
        self._commit = self.suite.commit or tree_commit()
        return self._cases

    @property
    def results(self) -> list[Result]:
        return [result for _, result in self._done]

    @property
    def missing(self) -> list[Case]:
        """Cases without a result."""
        found = list(self._cases)
        for case, _ in self._done:
            found.remove(case)
        return found

    def add(self, case: Case, result: Result) -> None:
        self._done.append((case, result))
        self._write()

    def _write(self) -> None:
        results = self.results
        self.files = self.suite.write(results, [str(case) for case in self.missing], self._commit)
        self._written = len(results)

    def tell(self, console: Console, before: str = "") -> None:
        """What is written where and what is missing, in a sentence each: of the rank that writes."""
        if self.suite.rank:
            return
        if self._written < len(self._done):  # it was stopped while it wrote
            self._write()
        files = " and ".join(map(str, self.files)) or "nothing"
        said = f"{before}Written: {files}. Measured: {len(self._done)} of {len(self._cases)} cases."
        if missing := ", ".join(map(str, self.missing)):
            said += f" Missing: {missing}."
        console.print(said, markup=False, highlight=False, soft_wrap=True)


def _measured(
    suite: Suite[Case, Result], cases: Sequence[Case], console: Console
) -> Generator[tuple[Case, Result], None, None]:
    """Every case, each handed out and shown as soon as it is measured; one that fails is explained and left out."""
    from supersonic_moe.bench.timing import LastCaseError, NoResultError

    columns, rest = (*Progress.get_default_columns(), TimeElapsedColumn()), Rest(len(cases))
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            stages = Stages()

            def show(doing: str, case: Case = case, stages: Stages = stages) -> None:
                stages.begin(doing)
                bar.update(task, description=f"{case}: {doing}")

            try:
                result = suite.run(case, show)
            except NoResultError as error:
                stages.end()
                console.print(f"[red]No result:[/red] {escape(str(error))}", highlight=False)
                if isinstance(error, LastCaseError):
                    raise
            else:
                stages.end()
                yield case, result
                console.print(suite.columns(result))
                for name, reason in result.missing.items():
                    mark = "[red]failed[/red]" if name in result.failed else "[yellow]missing[/yellow]"
                    console.print(f"{mark} {name}: {escape(reason)}", highlight=False)
            console.print(f"[dim]{stages}{rest.after_a_case()}[/dim]\n", highlight=False)
            bar.advance(task)


class Rest:
    """How long the cases that are left take, if they take as long as those so far. The first one does not count: it
    waits for what others find compiled.
    """

    def __init__(self, cases: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._cases, self._now = cases, now
        self._ends: list[float] = []

    def after_a_case(self) -> str:
        """ "; 3 cases left, about 40 s", from the second case on."""
        self._ends.append(self._now())
        done = len(self._ends)
        if done == 1 or (left := self._cases - done) == 0:
            return ""
        seconds = left * (self._ends[-1] - self._ends[0]) / (done - 1)
        about = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        return f"; {left} case{'s' if left > 1 else ''} left, about {about}"


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
