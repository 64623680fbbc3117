"""Channels and streams of calls that are in flight at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ranks
import torch

from supersonic_moe.parallel import ExpertParallel


class Places:
    """Where the calls of a pair run."""

    def __init__(self, ep: ExpertParallel) -> None:
        self.ep, self.streams = ep, list[Any]()
        if ranks.device().type == "cuda" and ep.channels == 2:
            self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        with self.ep.channel(number % self.ep.channels):
            if self.streams:
                self.streams[number].wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.streams[number]):
                    yield
            else:
                yield

    def meet(self) -> None:
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)
