"""``supersonic-moe demo``: the run of ``make demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supersonic_moe.bench import options


def demo(
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps. Default: as many as the time allows.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Training time. Default: fits the device.")] = None,
    device: options.Device = None,
    out: Annotated[
        Path, typer.Option(help="Where loss.png and expert_load.png go.", callback=options.writable_folder)
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Weights, batches and sampling.")] = 0,
) -> None:
    """Train a small byte-level MoE language model on Python's own source code, and see that it learns."""
    from supersonic_moe.demo.train import run

    where = str(options.device(device))
    with options.usage_errors():
        run(steps=steps, seconds=seconds, device=where, out=out, seed=seed)
