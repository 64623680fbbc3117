"""Rows sorted by expert, for tests of the Triton kernels, and what one rounding of fp32 may differ by."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def assert_rounded(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    """``got`` is ``want`` (fp64) computed in fp32 and rounded once. ``scale`` bounds the terms of a sum that may
    cancel.

    Triton's interpreter truncates to bfloat16 instead of rounding, hence a whole unit in the last place.
    """
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype]
    torch.testing.assert_close(got.double().cpu(), want, rtol=rtol, atol=4e-6 * scale)


def offsets_of(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def owners_of(counts: list[int], dead: int, device: torch.device) -> Tensor:
    """row_expert, with E for ``dead`` rows."""
    owners = [e for e, n in enumerate(counts) for _ in range(n)] + [len(counts)] * dead
    return torch.tensor(owners, dtype=torch.int32, device=device)
