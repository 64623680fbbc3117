"""How many compiled kernels the package carries: `make wheel` puts them there."""

from __future__ import annotations

import importlib.util

from supersonic_moe.jit import cache


def carried() -> dict[str, int]:
    """By the language they are written in: CUDA and, where it is installed, Triton."""
    counts = {"CUDA": len([*cache.SHIPPED_CUBINS.iterdir()]) if cache.SHIPPED_CUBINS.is_dir() else 0}
    if importlib.util.find_spec("triton"):
        from supersonic_moe.kernels.triton import shipped

        counts["Triton"] = len(shipped.index())
    return counts
