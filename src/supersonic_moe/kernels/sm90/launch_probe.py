"""What one kernel launch costs the host, measured with kernels that do nothing.

A layer of a mixture-of-experts model launches about twenty kernels forward and backward; the host must stay ahead of
the GPU, which works 50 to 300 µs on each. The aim is at most 8 µs a launch, a cached tensor map included.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from supersonic_moe.jit.launch import kernel_of
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import tensor_map

SPECS = (
    KernelSpec("launch_probe", "launch_probe.cu", threads=32),
    KernelSpec("launch_probe_tma", "launch_probe.cu", threads=32),
)


@dataclass(frozen=True)
class LaunchOverhead:
    """Median host microseconds of one launch: four tensors and four scalars; one of the tensors replaced by a tensor
    map that is found in the cache; the look-up of that map alone."""

    plain_us: float
    tensor_map_us: float
    map_lookup_us: float


def measure_launch_overhead(repeats: int = 200, batch: int = 20) -> LaunchOverhead:
    """Measure on the current device; each of `repeats` samples is `batch` launches into an empty queue."""
    plain, tma = map(kernel_of, SPECS)
    x, grid = torch.empty(256, 256, dtype=torch.bfloat16, device="cuda"), (1, 1, 1)

    def launch_plain() -> None:
        plain.launch(grid, a=x, b=x, c=x, d=x, m=1, n=2, k=3, scale=1.0)

    def launch_tma() -> None:
        tma.launch(grid, map=tensor_map(x, box=(128, 64)), b=x, c=x, d=x, m=1, n=2, k=3, scale=1.0)

    def look_up() -> None:
        tensor_map(x, box=(128, 64))

    plain_us, tensor_map_us, map_lookup_us = (
        _median_us(function, repeats, batch) for function in (launch_plain, launch_tma, look_up)
    )
    return LaunchOverhead(plain_us, tensor_map_us, map_lookup_us)


def _median_us(function: Callable[[], None], repeats: int, batch: int) -> float:
    samples = []
    for _ in range(repeats + 10):  # the first ten compile, load and warm up
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(batch):
            function()
        samples.append((time.perf_counter() - started) / batch * 1e6)
    return statistics.median(samples[10:])
