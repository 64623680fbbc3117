"""What a fresh process runs in a test of the kernel cache: in a module of its own, which that process can import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from supersonic_moe.jit import KernelSpec
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import CubinCache


def build_at_once(spec: KernelSpec, directory: Path, barrier: Any) -> tuple[int, str, bytes]:
    barrier.wait(timeout=120)
    cubin = build(spec, CubinCache(directory))
    return os.getpid(), cubin.origin, cubin.image
