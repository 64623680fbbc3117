"""A serving call whose experts have few rows, between ranks that reach each other's memory: nothing is copied. A user
asks for it by ``MegaMoE(direct=True)``, because its speed over several GPUs has not been measured yet.

Each rank writes its tokens to where the streaming kernels of the others read them, and these write what they make of
them to where it is summed: no message is packed, sent or unpacked around the operator. Which kernel does what, what a
block holds and who waits for whom is in ``kernels/sm90/rank_tokens.py``. Launches of a call, beside the operator's own
two or three:

    post_tokens   in front: choices and x are told, choices of all are awaited
    sum_parts     behind: parts are told and awaited
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.inference.workspace import workspace_bytes
from supersonic_moe.jit.launch import Launch, on_device
from supersonic_moe.kernels.alignment import ALIGNMENT as VECTOR
from supersonic_moe.kernels.alignment import aligned, aligned_tensor
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90 import rank_tokens
from supersonic_moe.kernels.sm90.rank_tokens import Layout, RankTokens
from supersonic_moe.parallel.copies import Copies
from supersonic_moe.parallel.symmetric import HEAD
from supersonic_moe.parallel.watch import PHASES

FEW_ROWS = 128
"""Of an expert, on average, if all rows came to one rank. Tiles are 1.1 times faster at half as many, but what copies
need around them takes longer."""
DISPATCH, COMBINE = "forward dispatch", "forward combine"


class Given(NamedTuple):
    """What a rank brings to a call."""

    x_TH: Tensor
    x_scale_TB: Tensor | None
    """Of e4m3 x; None: bf16."""
    ids_TK: Tensor
    weights_TK: Tensor
    experts: Fp8Experts
    order: GateUpLayout
    limit: float | None
    pow2: bool
    received: Tensor | None


def most_places(ranks: int, top_k: int, experts_here: int) -> int:
    """M, at most: all rows of a call are streamed, however tokens choose."""
    return FEW_ROWS * experts_here // (ranks * top_k)


def row_bytes(ranks: int, places: int, hidden: int, top_k: int) -> int:
    """Of ``Copies``, so that its two banks together hold what a call needs."""
    return -(-Layout.of(ranks, places, hidden, top_k).end // (2 * ranks * places))


class FewRows:
    """Calls of one rank.

    Args:
        copies: whose memory and flags are used, with rows of ``row_bytes``, and by nobody else.
        places: M, at most so many tokens of a rank.
    """

    def __init__(self, copies: Copies, rank: int, ranks: int, num_experts: int, places: int, top_k: int) -> None:
        self._copies, self._rank, self._ranks, self._num_experts = copies, rank, ranks, num_experts
        self._places, self._top_k = places, top_k
        self._here = num_experts // ranks
        self._arrived = torch.zeros(2, dtype=torch.int32, device=copies.memory.blocks[rank].device)

    def run(self, call: int, given: Given, out_TH: Tensor, *, accumulate: bool) -> None:
        """Writes ``out`` (T, H) bf16, or adds to it."""
        copies, hidden = self._copies, given.x_TH.shape[1]
        with copies.inside(call, DISPATCH):
            regions = Layout.of(self._ranks, self._places, hidden, self._top_k)
            at = Layout(*(HEAD + region for region in regions))
            tokens = RankTokens(copies.memory.flags, at, self._places, call)
            self._launch(tokens, given, out_TH, accumulate)

    def _launch(self, tokens: RankTokens, given: Given, out_TH: Tensor, accumulate: bool) -> None:
        to_TH = out_TH if out_TH.data_ptr() % VECTOR == 0 else out_TH.clone()
        hidden, inter = given.experts.w2.shape[1:]
        size = workspace_bytes(self._ranks * self._places, self._top_k, hidden, inter, self._here)
        workspace = torch.empty(size, dtype=torch.uint8, device=out_TH.device)
        with on_device(out_TH):
            for launch in self._launches(tokens, given, to_TH, accumulate, workspace.data_ptr()):
                launch.run()
        if to_TH is not out_TH:
            out_TH.copy_(to_TH)

    def _launches(
        self, tokens: RankTokens, given: Given, out_TH: Tensor, accumulate: bool, workspace: int
    ) -> list[Launch]:
        from supersonic_moe.inference import sm90  # needs Triton

        dispatch, combine, experts = PHASES.index(DISPATCH), PHASES.index(COMBINE), self._num_experts
        layer = sm90.Layer(aligned(given.experts, VECTOR, "w13", "w2"), None, given.order, given.limit, given.pow2)
        ids_UK, weights_UK = self.choices(self._copies.memory.blocks[self._rank], tokens.at)
        x_TH = aligned_tensor("x", given.x_TH)
        return [
            rank_tokens.post_tokens(
                tokens, dispatch, self._arrived, x_TH, given.x_scale_TB, given.ids_TK, given.weights_TK, experts,
                pow2=given.pow2,
            ),
            *sm90.launches_of_ranks(
                tokens, dispatch, ids_UK, weights_UK, self._rank * self._here, experts, layer, given.received,
                workspace,
            ),
            rank_tokens.sum_parts(tokens, combine, given.ids_TK, experts, out_TH, accumulate=accumulate),
        ]  # fmt: skip

    def choices(self, block: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
        """Ids and weights (R·M, K)."""
        shape = self._ranks * self._places, self._top_k
        return view_of(block, at.ids, torch.int32, *shape), view_of(block, at.weights, torch.float32, *shape)


def view_of(block: Tensor, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """What begins at byte ``start`` of a block."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    return block[start : start + size].view(dtype).view(shape)
