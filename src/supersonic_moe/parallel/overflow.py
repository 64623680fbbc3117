"""Fixed places for tokens that travel, and what happens if there are too few: it is never silent.

All ranks learn the largest number that any of them has for another. On a CPU each looks at it and raises at once. A GPU
is not waited for: scores become NaN there, and with them the outputs of all tokens that have an expert, sent or not
(``departures.py``); the host looks at the number some calls later, when it is there in any case. All ranks look at the
same call, so all of them raise or none.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from supersonic_moe.parallel.collectives import Collectives

LAG = 8
"""Calls after which the host looks; it may be so far ahead of the device without waiting."""


class Overflow:
    """Whether more than ``capacity`` tokens would have gone from any rank to another."""

    def __init__(self, ranks: Collectives, capacity: int) -> None:
        self.ranks, self.capacity = ranks, capacity
        self._most: Tensor | None = None
        """Of all calls since the last error, on the device; calls in a CUDA graph add to it at each replay."""
        self._coming = deque[tuple[Tensor, Any]]()
        """Copies in pinned memory, and the events after which they are there."""

    def guard(self, scores_TK: Tensor, tokens_R: Tensor, call: int) -> Tensor:
        """The scores, or NaN on a GPU if there are too few places. Raises as the module says."""
        capturing = tokens_R.is_cuda and torch.cuda.is_current_stream_capturing()
        if len(self._coming) == LAG and not capturing:
            number, copied = self._coming.popleft()
            copied.synchronize()
            self.ranks.watch.check()  # an aborted exchange leaves any number
            self._raise_if(int(number))
        most = self.ranks.maximum(tokens_R.max().reshape(1), call, "forward dispatch")
        if not most.is_cuda:
            self._raise_if(int(most))
            return scores_TK
        if self._most is None:
            self._most = torch.zeros_like(most)
        torch.maximum(self._most, most, out=self._most)
        if not capturing:
            number = torch.empty(1, dtype=most.dtype, pin_memory=True)
            number.copy_(most, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(most.device))
            self._coming.append((number, copied))
        return torch.where(most > self.capacity, torch.nan, scores_TK)

    def check(self) -> None:
        """Wait for the device, and raise for any call since the last error."""
        if self._most is not None:
            self._raise_if(int(self._most))

    def _raise_if(self, most: int) -> None:
        if most <= self.capacity:
            return
        self._coming.clear()
        if self._most is not None:
            self._most.zero_()
        raise ValueError(
            f"no rank may send more than capacity = {self.capacity} tokens to another in a call; one had {most}. "
            'Make the ExpertParallel with a larger capacity (max_tokens always suffices) or with capacity="exact".'
        )
