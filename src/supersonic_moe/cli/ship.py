"""Every CUDA kernel, compiled into the package: a wheel that is built afterwards compiles none where it is used.

    python -m supersonic_moe.cli.ship      in the repository; `make wheel` runs it first

The files lie in ``kernels/sm90/cubins`` under a digest of source, headers and options without the compiler's version,
so a changed kernel never finds an old one, and files of kernels that are no more are removed here. A driver that cannot
load them makes the package compile for itself (`jit/launch.py`).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from supersonic_moe.cli.output import kernel_progress
from supersonic_moe.jit import BuildResult, KernelSpec, compile_all
from supersonic_moe.jit.cache import SHIPPED_CUBINS, encode_entry, entry_name
from supersonic_moe.jit.spec import resolve


def ship(specs: tuple[KernelSpec, ...], directory: Path, console: Console) -> int:
    """Write the cubin of each of ``specs`` to ``directory`` and nothing else; returns their bytes. A kernel that does
    not compile raises its JitError.
    """
    with kernel_progress(console) as progress:
        task = progress.add_task("CUDA kernels", total=len(specs), now="")

        def show(done: int, _total: int, result: BuildResult) -> None:
            progress.update(task, completed=done, now=result.spec.name)

        results = compile_all(specs, progress=show)
    files: dict[str, bytes] = {}
    for result in results:
        if result.cubin is None:
            assert result.error is not None
            raise result.error
        name, key = result.spec.name, resolve(result.spec).digest()
        report = replace(result.cubin.report, seconds=0.0)  # the same bytes whenever they are made
        files[entry_name(name, key)] = encode_entry(name, key, replace(result.cubin, report=report))
    directory.mkdir(exist_ok=True)
    for old in directory.glob("*.cubin"):
        if old.name not in files:
            old.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return sum(map(len, files.values()))


def main() -> int:
    from supersonic_moe.kernels.sm90 import registered_specs  # needs Triton

    console, directory = Console(), Path(str(SHIPPED_CUBINS))
    specs = registered_specs()
    size = ship(specs, directory, console)
    console.print(f"{len(specs)} kernels, {size / 1e6:.1f} MB, in {directory}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
