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


def traffic(
    tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    ranks: int,
    wire: str,
    *,
    places: int | None = None,
    again: bool = False,
) -> Traffic:
    """For BF16 layers, or with ``wire="fp8"`` FP8 layers; ``places``: so many rows go to each rank, needed or not;
    ``again``: x is sent once more in backward.
    """
    each = tokens * share_of_ranks(num_experts, top_k, ranks) if places is None else places
    copies = (ranks - 1) * each
    row = hidden + 4 * blocks(hidden) if wire == "fp8" else 2 * hidden
    x_again = (hidden if wire == "fp8" else 2 * hidden) if again else 0
    return Traffic(
        copies * (row + 8 * top_k), copies * 2 * hidden, copies * (row + x_again), copies * (2 * hidden + 4 * top_k)
    )


def described(
    tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    ranks: int,
    wire: str,
    *,
    places: int | None = None,
    again: bool = False,
) -> str:
    sent = traffic(tokens, hidden, num_experts, top_k, ranks, wire, places=places, again=again)
    there, back = (f"{n / 1e6:.3g}" for n in sent[2:])
    share = share_of_ranks(num_experts, top_k, ranks)
    return (
        f"for {tokens} tokens, of which each rank needs {share:.1%}, a rank sends, in MB,\n"
        f"  forward   x, ids, scores {sent.dispatch / 1e6:.3g}, partial outputs {sent.combine / 1e6:.3g}\n"
        f"  backward  {'dout and x again' if again else 'dout'} {there}, partial dx and dscores {back}"
    )
