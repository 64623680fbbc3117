"""Where the commands print."""

from __future__ import annotations

import os

from rich.console import Console

FILE_COLUMNS = 200  # the widest table, that of `bench precision`, has 170


def console() -> Console:
    """Standard output. In a file or a pipe nobody asked for 80 columns, in which tables lose digits: there lines are as
    wide as the widest table, unless $COLUMNS says otherwise.
    """
    chosen = Console()
    if not chosen.is_terminal and "COLUMNS" not in os.environ:
        chosen.width = FILE_COLUMNS
    return chosen
