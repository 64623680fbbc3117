"""Where the commands print, and what they show meanwhile."""

from __future__ import annotations

import shutil

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FILE_COLUMNS = 240  # the widest table, that of `bench precision`, has 204


def console() -> Console:
    """Standard output. In a file or a pipe nobody asked for 80 columns, in which tables lose digits: there the widest
    table fits, unless $COLUMNS says otherwise.
    """
    chosen = Console()
    if not chosen.is_terminal:
        chosen.width = shutil.get_terminal_size((FILE_COLUMNS, 25)).columns
    return chosen


def kernel_progress(console: Console) -> Progress:
    """A bar over kernels that are being built; field ``now`` of a task names the last one."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}", style="dim", markup=False),
        console=console,
    )
