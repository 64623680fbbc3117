"""Where the commands print."""

from __future__ import annotations

import shutil

from rich.console import Console

FILE_COLUMNS = 240  # the widest table, that of `bench precision`, has 204


def console() -> Console:
    """Standard output. In a file or a pipe nobody asked for 80 columns, in which tables lose digits: there the widest
    table fits, unless $COLUMNS says otherwise.
    """
    chosen = Console()
    if not chosen.is_terminal:
        chosen.width = shutil.get_terminal_size((FILE_COLUMNS, 25)).columns
    return chosen
