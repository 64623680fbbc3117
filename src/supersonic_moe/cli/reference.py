"""The options of every command as docs/cli.md lists them, taken from the program itself.

python -m supersonic_moe.cli.reference     in the repository, after a change of the command line
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from supersonic_moe.bench.readme import put
from supersonic_moe.cli.app import app

PAGE, BLOCK = Path("docs/cli.md"), "options"


def reference() -> str:
    """A heading, the help text and a table of options for each command, in Markdown."""
    return "\n\n".join(_command(typer.main.get_command(app), "supersonic-moe"))


def _command(command: Any, name: str) -> list[str]:
    """``command`` is one of click's, or of typer's copy of click: which of them depends on the version of typer."""
    options = [parameter for parameter in command.params if not parameter.hidden]
    parts = [f"### `{name}`", " ".join(command.help.split("\n\n")[0].split())]
    if options:
        parts.append("\n".join(["| option | default | meaning |", "|---|---|---|", *map(_option, options)]))
    for inner, subcommand in getattr(command, "commands", {}).items():
        parts += _command(subcommand, f"{name} {inner}")
    return parts


def _option(option: Any) -> str:
    is_argument = option.param_type_name == "argument"  # it has no name of its own
    names = [] if is_argument else [", ".join([*option.opts, *option.secondary_opts])]
    name = " ".join([*names, *filter(None, [option.metavar])])
    is_flag = not is_argument and option.is_flag
    default = "" if is_flag or option.default in (None, "", []) else f"`{option.default}`"
    return f"| `{name}` | {default} | {(option.help or '').replace('|', '&#124;')} |"


def main() -> None:
    if not PAGE.is_file():
        sys.exit(f"{PAGE} must be in {Path.cwd()}. Run this in the root of the repository.")
    print(f"{PAGE}: {'updated' if put(PAGE, BLOCK, reference()) else 'nothing to change'}")


if __name__ == "__main__":
    main()
