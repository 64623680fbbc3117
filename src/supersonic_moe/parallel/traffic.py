"""How many bytes expert parallelism sends, for uniform routing."""

from __future__ import annotations

import math
from typing import NamedTuple

from supersonic_moe.quantization.block_format import blocks


def share_of_ranks(num_experts: int, top_k: int, ranks: int) -> float:
    """Probability that a token with K distinct experts, all equally likely, needs a given rank of E/R experts."""
    elsewhere = num_experts - num_experts // ranks
    return 1 - math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)


class Traffic(NamedTuple):
    """Bytes that a rank with T tokens sends to all others together."""

    dispatch: float
    """Forward: x, ids and scores."""
    combine: float
    """Forward: partial outputs."""
    dispatch_backward: float
    """Gradient of the output, and x where it was not kept."""
    combine_backward: float
    """Partial gradients of x, and of scores."""


class Load(NamedTuple):
    """A call of a layer with T tokens on each of R ranks."""

    tokens: int
    hidden: int
    num_experts: int
    top_k: int
    ranks: int
    wire: str
    """``"fp8"`` for FP8 layers whose rows travel so; else BF16."""
    places: int | None = None
    """So many rows go to each rank, needed or not."""
    pushed: bool = False
    """Of these, only choices do, with the scales of x; other rows where they are needed."""
    again: bool = False
    """x is sent once more in backward."""

    @property
    def share(self) -> float:
        """Of the tokens of a rank that another one needs."""
        return share_of_ranks(self.num_experts, self.top_k, self.ranks)

    @property
    def sent(self) -> Traffic:
        needed = self.tokens * self.share
        choices = (self.ranks - 1) * (needed if self.places is None else self.places)
        copies = (self.ranks - 1) * needed if self.pushed else choices
        x = self.hidden if self.wire == "fp8" else 2 * self.hidden
        scales = 4 * blocks(self.hidden) if self.wire == "fp8" else 0
        return Traffic(
            copies * x + choices * (scales + 8 * self.top_k),
            copies * 2 * self.hidden,
            copies * (x + scales + (x if self.again else 0)),
            copies * (2 * self.hidden + 4 * self.top_k),
        )

    def __str__(self) -> str:
        dispatch, combine, there, back = (f"{n / 1e6:.3g}" for n in self.sent)
        return (
            f"for {self.tokens} tokens, of which each rank needs {self.share:.1%}, a rank sends, in MB,\n"
            f"  forward   x, ids, scores {dispatch}, partial outputs {combine}\n"
            f"  backward  {'dout and x again' if self.again else 'dout'} {there}, partial dx and dscores {back}"
        )
