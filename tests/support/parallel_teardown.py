"""How ranks of tests/parallel leave."""

from __future__ import annotations

import gc
import threading

import torch
import torch.distributed as dist
from parallel_cases import here, inputs, make, run


def teardown(order: str) -> str:
    """Leave in some ``order``."""
    ep, tokens = make(), [3] * dist.get_world_size()
    given = here(inputs(tokens, torch.float32), tokens)
    run(ep, given)
    if order == "close, destroy":
        ep.close()
        dist.destroy_process_group()
    elif order == "destroy, close":
        dist.destroy_process_group()
        ep.close()
    elif order == "destroy, drop":
        dist.destroy_process_group()
        del ep
    elif order == "drop":
        del ep
    elif order == "interrupt":
        raise KeyboardInterrupt
    return order  # "exit": neither


def threads_after_dropping() -> int:
    ep = make()
    del ep
    gc.collect()
    return sum("_look_after" in t.name for t in threading.enumerate())
