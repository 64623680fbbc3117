"""A serving call whose experts have few rows, between ranks that reach each other's memory: nothing is copied.

The streaming kernel of the inference operator reads tokens where their ranks have put them and writes what it makes of
them where they are summed: no rows are sent there and back around it. Which kernel does what, what a block holds and
who waits for whom is in ``kernels/sm90/rank_tokens.py``. Launches of a call, beside the operator's own two or three:

    exchange_begin   the bank is free
    post_tokens      choices and x are told
    exchange_wait    the choices of all are there
    sum_parts        parts are told and awaited

On a CPU, where only tests have memory that several ranks reach, the same steps are plain torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.inference.topk import moe_fp8_topk
from supersonic_moe.inference.workspace import ALIGNMENT, SURE_ROWS, workspace_bytes
from supersonic_moe.kernels.alignment import ALIGNMENT as VECTOR
from supersonic_moe.kernels.alignment import aligned, aligned_tensor
from supersonic_moe.kernels.reference import quantize_rows
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90 import rank_tokens
from supersonic_moe.kernels.sm90.rank_tokens import CHOICES_LEFT, EPOCHS, X_LEFT, Layout, RankTokens
from supersonic_moe.parallel.copies import Copies
from supersonic_moe.parallel.watch import PHASES
from supersonic_moe.quantization.block_format import E4M3, blocks

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


def has_few_rows(ranks: int, places: int, top_k: int, experts_here: int) -> bool:
    """Whether all rows of a call are streamed, however tokens choose."""
    return ranks * places * top_k <= SURE_ROWS * experts_here


def row_bytes(ranks: int, places: int, hidden: int, top_k: int) -> int:
    """Of ``Copies``, so that a bank holds what a call needs."""
    return -(-Layout.of(ranks, places, hidden, top_k).end // (ranks * places))


class FewRows:
    """Calls of one rank.

    Args:
        copies: whose banks and flags are used, with rows of ``row_bytes``.
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
            start = copies.bank_start(copies.begin(call, DISPATCH, EPOCHS))
            at = Layout.of(self._ranks, self._places, hidden, self._top_k)
            tokens = RankTokens(copies.memory.flags, Layout(*(start + region for region in at)), self._places, call)
            step = self._launch if given.x_TH.is_cuda else self._compute
            step(tokens, given, out_TH, accumulate)

    # ---- on Hopper ---------------------------------------------------------------------------------------------------

    def _launch(self, tokens: RankTokens, given: Given, out_TH: Tensor, accumulate: bool) -> None:
        from supersonic_moe.inference import sm90  # needs Triton

        hidden, inter = given.experts.w2.shape[1:]
        dispatch, combine = PHASES.index(DISPATCH), PHASES.index(COMBINE)
        size = workspace_bytes(self._ranks * self._places, self._top_k, hidden, inter, self._here)
        workspace = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=out_TH.device)
        address = -(-workspace.data_ptr() // ALIGNMENT) * ALIGNMENT
        layer = sm90.Layer(aligned(given.experts, VECTOR, "w13", "w2"), None, given.order, given.limit, given.pow2)
        x_TH = aligned_tensor("x", given.x_TH)
        rank_tokens.post_tokens(
            tokens, self._arrived, x_TH, given.x_scale_TB, given.ids_TK, given.weights_TK, self._num_experts,
            pow2=given.pow2,
        ).run()  # fmt: skip
        tokens.flags.wait(CHOICES_LEFT, tokens.call, dispatch)
        block = self._copies.memory.blocks[self._rank]
        ids_UK, weights_UK = (self._of_choices(block, first, dtype) for first, dtype in self._choices(tokens.at))
        first_expert = self._rank * self._here
        for launch in sm90.launches_of_ranks(
            tokens, dispatch, ids_UK, weights_UK, first_expert, self._num_experts, layer, given.received, address
        ):
            launch.run()
        to_TH = out_TH if out_TH.data_ptr() % VECTOR == 0 else out_TH.clone()
        rank_tokens.sum_parts(
            tokens, combine, given.ids_TK, self._num_experts, to_TH, accumulate=accumulate
        ).run()  # fmt: skip
        if to_TH is not out_TH:
            out_TH.copy_(to_TH)

    # ---- in plain torch ----------------------------------------------------------------------------------------------

    def _compute(self, tokens: RankTokens, given: Given, out_TH: Tensor, accumulate: bool) -> None:
        flags: Any = tokens.flags  # of a test, which tells in Python what kernels tell
        at, blocks_R = tokens.at, self._copies.memory.blocks
        dispatch, combine = PHASES.index(DISPATCH), PHASES.index(COMBINE)
        count, hidden = given.x_TH.shape
        own = slice(self._rank * self._places, self._rank * self._places + count)
        rest = slice(own.stop, (self._rank + 1) * self._places)
        known = (given.ids_TK >= 0) & (given.ids_TK < self._num_experts)
        for block in blocks_R:
            ids_UK, weights_UK = (self._of_choices(block, first, dtype) for first, dtype in self._choices(at))
            ids_UK[own], weights_UK[own] = torch.where(known, given.ids_TK, -1).int(), given.weights_TK
            ids_UK[rest] = -1
        flags.tell(CHOICES_LEFT)
        x, scale = (given.x_TH, given.x_scale_TB)
        if scale is None:
            x, scale = quantize_rows(x, given.pow2)
        shape = (self._places, hidden), (self._places, blocks(hidden))
        x_of = [_view(block, at.codes, E4M3, *shape[0]) for block in blocks_R]
        scale_of = [_view(block, at.scales, torch.float32, *shape[1]) for block in blocks_R]
        x_of[self._rank][:count].copy_(x)
        scale_of[self._rank][:count].copy_(scale)
        flags.tell(X_LEFT)

        flags.wait(CHOICES_LEFT, tokens.call, dispatch)
        ids_UK, weights_UK = (
            self._of_choices(blocks_R[self._rank], first, dtype) for first, dtype in self._choices(at)
        )
        first_expert = self._rank * self._here
        flags.wait(X_LEFT, tokens.call, dispatch)
        part_UH = moe_fp8_topk(
            torch.cat([x.view(torch.uint8) for x in x_of]).view(E4M3), given.experts.w13, given.experts.w2,
            given.experts.w13_scale, given.experts.w2_scale, weights_UK.contiguous(), ids_UK,
            x_scale=torch.cat(scale_of), local_expert_offset=first_expert, num_experts=self._num_experts,
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
        for rank, part_MH in enumerate(self._parts(blocks_R[self._rank], at, hidden)):
            there = given.ids_TK // self._here == rank
            needed = (known & there).any(1)
            sum_TH[needed] += part_MH[:count][needed].float()
        out_TH.copy_(out_TH + sum_TH.bfloat16() if accumulate else sum_TH)

    # ---- regions of a block ------------------------------------------------------------------------------------------

    def _choices(self, at: Layout) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        return (at.ids, torch.int32), (at.weights, torch.float32)

    def _of_choices(self, block: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        """(R·M, K)"""
        return _view(block, start, dtype, self._ranks * self._places, self._top_k)

    def _parts(self, block: Tensor, at: Layout, hidden: int) -> Tensor:
        """(R, M, H)"""
        return _view(block, at.parts, torch.bfloat16, self._ranks, self._places, hidden)


def _view(block: Tensor, start: int, dtype: torch.dtype, *shape: int) -> Tensor:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return block[start : start + size].view(dtype).view(shape)
