"""Processes that start in a tenth of a second: forked from a server that has imported what tests run in them.

The server has started no thread, because torch's autograd does not survive a fork, and asked for no GPU, because CUDA
does not either.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from typing import Any

IMPORTED = ["parallel_training", "parallel_trainers", "cold_processes"]


@functools.cache
def context() -> Any:
    """Of ``multiprocessing``, with the server running. It passes over what it cannot import in silence, and Python 3.11
    looks only where the variable says.
    """
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return found


def imported() -> list[str]:
    """Which of them a process has that was told to import this module only."""
    return [name for name in IMPORTED if name in sys.modules]
