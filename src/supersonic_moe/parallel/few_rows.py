"""A serving call whose experts have few rows, between ranks that reach each other's memory: nothing is copied. A user
asks for it by ``MegaMoE(direct=True)``, because its speed over several GPUs has not been measured yet.

Each rank writes its tokens to where the streaming kernels of the others read them, and these write what they make of
them to where it is summed: no message is packed, sent or unpacked around the operator. Which kernel does what, what a
block holds and who waits for whom is in ``kernels/sm90/rank_tokens.py``. Launches of a call, beside the operator's own
two or three:

    post_tokens   in front: choices and x are told, choices of all are awaited
    sum_parts     behind: parts are told and awaited

On a CPU, where only tests have memory that several ranks reach, the same steps are plain torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.inference.topk import moe_fp8_topk
from supersonic_moe.inference.workspace import workspace_bytes
from supersonic_moe.jit.launch import Launch, on_device
from supersonic_moe.kernels.alignment import ALIGNMENT as VECTOR
from supersonic_moe.kernels.alignment import aligned, aligned_tensor
from supersonic_moe.kernels.reference import quantize_rows
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90 import rank_tokens
from supersonic_moe.kernels.sm90.rank_tokens import EPOCHS, X_LEFT, Layout, RankTokens
from supersonic_moe.parallel.copies import Copies
from supersonic_moe.parallel.symmetric import HEAD
from supersonic_moe.parallel.watch import PHASES
from supersonic_moe.quantization.block_format import E4M3, blocks

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
            step = self._launch if given.x_TH.is_cuda else self._compute
            step(tokens, given, out_TH, accumulate)

    # ---- on Hopper ---------------------------------------------------------------------------------------------------

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
        ids_UK, weights_UK = self._choices(self._copies.memory.blocks[self._rank], tokens.at)
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

    # ---- in plain torch ----------------------------------------------------------------------------------------------

    def _compute(self, tokens: RankTokens, given: Given, out_TH: Tensor, accumulate: bool) -> None:
        flags: Any = tokens.flags  # of a test, which tells in Python what kernels tell
        at, blocks_R = tokens.at, self._copies.memory.blocks
        dispatch, combine = PHASES.index(DISPATCH), PHASES.index(COMBINE)
        count, hidden = given.x_TH.shape
        own = slice(self._rank * self._places, self._rank * self._places + count)
        rest = slice(own.stop, (self._rank + 1) * self._places)
        known = (given.ids_TK >= 0) & (given.ids_TK < self._num_experts)
        flags.advance(EPOCHS)
        for block in blocks_R:
            ids_UK, weights_UK = self._choices(block, at)
            ids_UK[own], weights_UK[own] = torch.where(known, given.ids_TK, -1).int(), given.weights_TK
            ids_UK[rest] = -1
        flags.tell(X_LEFT + 1)
        x, scale = (given.x_TH, given.x_scale_TB)
        if scale is None:
            x, scale = quantize_rows(x, given.pow2)
        needed_R = [(known & (given.ids_TK // self._here == rank)).any(1) for rank in range(self._ranks)]
        for block, needed in zip(blocks_R, needed_R, strict=True):
            x_UH, scale_UB = self._x(block, at, hidden)
            x_UH[own].view(torch.uint8)[needed] = x.view(torch.uint8)[needed]
            scale_UB[own][needed] = scale[needed]
        flags.tell(X_LEFT)

        flags.wait(X_LEFT + 1, tokens.call, dispatch)
        ids_UK, weights_UK = self._choices(blocks_R[self._rank], at)
        first_expert = self._rank * self._here
        flags.wait(X_LEFT, tokens.call, dispatch)
        x_UH, scale_UB = self._x(blocks_R[self._rank], at, hidden)
        part_UH = moe_fp8_topk(
            x_UH, given.experts.w13, given.experts.w2, given.experts.w13_scale, given.experts.w2_scale, weights_UK,
            ids_UK, x_scale=scale_UB, local_expert_offset=first_expert, num_experts=self._num_experts,
            gate_up_order=given.order, swiglu_limit=given.limit, pow2_scales=given.pow2, received_rows=given.received,
        )  # fmt: skip
        has_row_U = ((ids_UK >= first_expert) & (ids_UK < first_expert + self._here)).any(1)
        for rank, block in enumerate(blocks_R):
            of_rank = slice(rank * self._places, (rank + 1) * self._places)
            mine_MH = self._parts(block, at, hidden)[self._rank]
            mine_MH[has_row_U[of_rank]] = part_UH[of_rank][has_row_U[of_rank]]
        flags.tell(0)

        flags.wait(0, tokens.call, combine)
        sum_TH = torch.zeros(count, hidden)
        for needed, part_MH in zip(needed_R, self._parts(blocks_R[self._rank], at, hidden), strict=True):
            sum_TH[needed] += part_MH[:count][needed].float()
        out_TH.copy_(out_TH + sum_TH.bfloat16() if accumulate else sum_TH)

    # ---- regions of a block ------------------------------------------------------------------------------------------

    def _choices(self, block: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
        """Ids and weights (R·M, K)."""
        shape = self._ranks * self._places, self._top_k
        return _view(block, at.ids, torch.int32, *shape), _view(block, at.weights, torch.float32, *shape)

    def _x(self, block: Tensor, at: Layout, hidden: int) -> tuple[Tensor, Tensor]:
        """Codes (R·M, H) and scales (R·M, H / 128)."""
        rows = self._ranks * self._places
        return _view(block, at.codes, E4M3, rows, hidden), _view(block, at.scales, torch.float32, rows, blocks(hidden))

    def _parts(self, block: Tensor, at: Layout, hidden: int) -> Tensor:
        """(R, M, H)"""
        return _view(block, at.parts, torch.bfloat16, self._ranks, self._places, hidden)


def _view(block: Tensor, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return block[start : start + size].view(dtype).view(shape)
