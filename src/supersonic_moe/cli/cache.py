"""``supersonic-moe cache``: the directory of compiled kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.table import Table

from supersonic_moe.cli.output import console as output

if TYPE_CHECKING:
    from supersonic_moe.jit import CacheInfo

app = typer.Typer(no_args_is_help=True, help="The compiled kernels on disk: what is there, or remove them.")


@app.command()
def info() -> None:
    """List the entries, each checked against its digest."""
    from supersonic_moe.jit import default_cache

    found = default_cache().info()
    console = output()
    console.print(describe(found), highlight=False)
    if found.entries:
        table = Table("kernel", "key", box=None, pad_edge=False)
        table.add_column("registers", justify="right")
        table.add_column("KiB", justify="right")
        table.add_column("state")
        for entry in found.entries:
            state = (
                f"[yellow]{entry.damage}; compiled again when needed[/yellow]" if entry.damage else "[green]ok[/green]"
            )
            table.add_row(entry.kernel, entry.key[:12], str(entry.registers), f"{entry.file_bytes / 1024:.1f}", state)
        console.print(table)
    _stop_if(found.problem)


@app.command()
def clear() -> None:
    """Remove every compiled kernel; the next use compiles it again."""
    from supersonic_moe.jit import default_cache

    removed = default_cache().clear()
    output().print(f"Removed {describe(removed)}", highlight=False, soft_wrap=True)
    _stop_if(removed.problem)


def _stop_if(problem: str) -> None:
    if problem:
        typer.echo(f"{problem}.", err=True)
        raise typer.Exit(1)


def describe(found: CacheInfo) -> str:
    if found.directory is None:
        from supersonic_moe.jit.cache import no_directory

        return no_directory()
    damaged = sum(1 for entry in found.entries if entry.damage)
    count = f"{len(found.entries)} compiled kernels" + (f" ({damaged} damaged)" if damaged else "")
    return f"{count}, {found.total_bytes / 1024:.0f} KiB in {found.directory}"
