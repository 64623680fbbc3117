"""Hot paths never wait for the GPU: torch raises where one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_host_waits() -> Iterator[None]:
    """RuntimeError from anything in the block that torch knows to wait for the GPU, once all earlier work is done. So
    results are compared after the block: ``torch.equal`` waits.
    """
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
