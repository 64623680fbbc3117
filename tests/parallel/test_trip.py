"""Autograd along the way of a call's tokens: second derivatives are refused, whatever they are asked by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from supersonic_moe.autograd import apply
from supersonic_moe.parallel.trip import Combine, Dispatch

TRIP: Any = SimpleNamespace(
    send=lambda phase, rows: rows * 2,
    experts_here=2**20,
    send_choices=lambda phase, ids, scores: (ids, scores * 3),
    back=lambda phase, rows: rows * 2,
    summed=lambda rows: rows * 1,
    of_choices=lambda scores: scores * 1.5,
)
"""There and back within one process."""


def test_second_derivatives_across_ranks_are_refused() -> None:
    """Beside a path that has some: the sum of both looked right."""
    x, scores = torch.randn(5, 4, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    there, weights, _ = apply(Dispatch, x, scores, torch.zeros(5, 2, dtype=torch.int64), TRIP)
    out = x + apply(Combine, there * weights[:, :1], TRIP)
    dx, dscores = torch.autograd.grad(out.square().sum(), (x, scores), create_graph=True)
    want = x.detach() * (1 + 12 * scores.detach()[:, :1])
    torch.testing.assert_close(out.detach(), want)
    torch.testing.assert_close(dx.detach(), 2 * want * (1 + 12 * scores.detach()[:, :1]))
    for by in (x, scores):
        for gradient in (dx, dscores):
            with pytest.raises(RuntimeError, match="second derivatives do not exist across ranks"):
                torch.autograd.grad(gradient.square().sum() + x.square().sum() + scores.sum(), by, retain_graph=True)
