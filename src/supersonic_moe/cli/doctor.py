"""``supersonic-moe doctor``: one screen about this machine; the exit code says whether the package is usable here."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from supersonic_moe.cli.output import console as output

if TYPE_CHECKING:
    from supersonic_moe.cli.health import Check

MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON, for scripts.")] = False,
) -> None:
    """Check GPUs, driver, libraries, kernel cache and a self-test kernel. Exit code 0: usable, 1: broken."""
    from supersonic_moe.cli import health

    console = output()
    if json:
        results = health.run_checks(health.all_checks(), lambda _: None)
        typer.echo(json_format.dumps({"usable": usable(results), "checks": [asdict(c) for c in results]}, indent=1))
    else:
        with console.status("") as status:
            results = health.run_checks(health.all_checks(), lambda name: status.update(f"checking {name}"))
        console.print(_table(results))
        console.print(_verdict(results))
    if not usable(results):
        raise typer.Exit(1)


def usable(results: list[Check]) -> bool:
    return all(check.status != "fail" for check in results)


def _table(results: list[Check]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in results:
        mark, style = MARKS[check.status]
        found = Text(check.found)
        if check.fix:
            found.append(f"\n{check.fix}", style="italic " + style)
        table.add_row(Text(mark, style=style), check.name, found)
    return table


def _verdict(results: list[Check]) -> Text:
    broken = [check.name for check in results if check.status == "fail"]
    if broken:
        return Text(f"\nNot usable: {', '.join(broken)}.", style="bold red")
    warnings = sum(check.status == "warn" for check in results)
    return Text("\nUsable." + (f" Warnings: {warnings}." if warnings else ""), style="bold green")
