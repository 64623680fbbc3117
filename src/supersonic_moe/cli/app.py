"""``supersonic-moe``: the commands, in the order a newcomer meets them."""

from __future__ import annotations

from typing import Annotated

import typer

from supersonic_moe.cli import bench, cache
from supersonic_moe.cli.demo import demo
from supersonic_moe.cli.doctor import doctor
from supersonic_moe.cli.explain import explain
from supersonic_moe.cli.warmup import warmup

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Mixture-of-Experts layers: check this machine, train a demo, compile kernels, measure, explain.",
)


def _version(wanted: bool) -> None:
    if wanted:
        import supersonic_moe

        typer.echo(supersonic_moe.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


app.command()(doctor)
app.command()(demo)
app.command()(warmup)
app.add_typer(bench.app, name="bench")
app.command()(explain)
app.add_typer(cache.app, name="cache")
