"""Processes that start in a tenth of a second: forked from a server that has imported what tests run in them.

The server has started no thread, because torch's autograd does not survive a fork, and asked for no GPU, because CUDA
does not either.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

context: Any = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["parallel_training", "parallel_trainers", "cold_processes"])
