"""The cold-start suite: what the first forward + backward of a layer costs a new process.

    cold    empty caches: every CUDA and Triton kernel that the layer needs is compiled; "shipped" where the package
            holds compiled kernels (`make wheel`)
    warm    the next process, with the caches that the cold one left behind

Both are repeated in fresh directories, and each metric is the median over the repeats. ``first_call_s`` counts from the
moment at which torch is imported, the CUDA context exists and torch has differentiated something (which makes it import
sympy) to the end of the first forward + backward: import of this package, building the layer, the call. ``total_s``
counts from the start of the process. One more process runs first and is not counted: it brings Python's and torch's
files from the disk into the page cache, and all of them compiled to bytecode, as an installation has them, into a
directory of the benchmark.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from supersonic_moe.bench.report import CaseResult, Metrics
from supersonic_moe.bench.timing import NoResultError
from supersonic_moe.kernels.carried import carried
from supersonic_moe.perf_model import LayerShape

CHILD = Path(__file__).with_name("first_call.py")
SLOWEST_START_S = 300.0  # a process that takes longer is stuck


class ColdStartResult(CaseResult):
    """Metrics of a start with cold and of one with warm caches."""

    def cases(self) -> list[CaseResult]:
        return self.each_alone("_")


def run_case(
    shape: LayerShape, device: torch.device, repeats: int, progress: Callable[[str], None] = lambda _: None
) -> ColdStartResult:
    """Medians by the state of the caches. Raises NoResultError if a process fails."""
    starts: dict[str, list[Metrics]] = {_first_state(carried()): [], "warm": []}
    progress("a process that is not counted")
    with TemporaryDirectory() as bytecode:
        with TemporaryDirectory() as caches:
            start(shape, device, Path(caches), Path(bytecode))
        for repeat in range(repeats):
            with TemporaryDirectory() as caches:
                for state, found in starts.items():
                    progress(f"{state} caches, {repeat + 1} of {repeats}")
                    found.append(start(shape, device, Path(caches), Path(bytecode)))
    return ColdStartResult(str(shape), {state: _medians(found) for state, found in starts.items()})


def _first_state(kernels: dict[str, int]) -> str:
    """What a process with empty caches finds. Half of the kernels are neither state."""
    if all(kernels.values()):
        return "shipped"
    if any(kernels.values()):
        counts = " and ".join(f"{count} of {language}" for language, count in kernels.items())
        raise NoResultError(
            f"A first call is measured with all kernels compiled in the package or with none; it holds {counts}. "
            "`make wheel` compiles both; without the folders kernels/*/cubins there are none."
        )
    return "cold"


def start(shape: LayerShape, device: torch.device, caches: Path, bytecode: Path) -> Metrics:
    """Seconds of one new process, by the names of their metrics."""
    sizes = f"{shape.tokens},{shape.hidden},{shape.intermediate},{shape.experts},{shape.top_k}"
    directories = [str(caches / name) for name in ("supersonic_moe", "triton")]
    python = [sys.executable, "-P", "-X", f"pycache_prefix={bytecode}"]
    command = [*python, str(CHILD), repr(time.monotonic()), sizes, str(device), *directories]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLOWEST_START_S)
    except subprocess.TimeoutExpired:
        raise NoResultError(f"{shape}: no result after {SLOWEST_START_S:.0f} s.") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NoResultError(f"{shape}: the process ended with exit code {done.returncode}: {last}")
    seconds: Metrics = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _medians(starts: list[Metrics]) -> Metrics:
    return {name: statistics.median(seconds[name] for seconds in starts) for name in starts[0]}
