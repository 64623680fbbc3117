"""The steps of a direct ``MegaMoE`` call in plain torch, between ranks that are threads of one CPU: what the kernels of
``parallel/few_rows.py`` do, for tests of the protocol.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supersonic_moe.inference.topk import moe_fp8_topk
from supersonic_moe.kernels.reference import quantize_rows
from supersonic_moe.kernels.sm90.rank_tokens import EPOCHS, X_LEFT, Layout, RankTokens
from supersonic_moe.parallel.few_rows import COMBINE, DISPATCH, FewRows, Given, view_of
from supersonic_moe.parallel.watch import PHASES
from supersonic_moe.quantization.block_format import E4M3, blocks


class FewRowsInTorch(FewRows):
    def _launch(self, tokens: RankTokens, given: Given, out_TH: Tensor, accumulate: bool) -> None:
        flags: Any = tokens.flags  # which tell in Python what kernels tell
        at, blocks_R = tokens.at, self._copies.memory.blocks
        dispatch, combine = PHASES.index(DISPATCH), PHASES.index(COMBINE)
        count, hidden = given.x_TH.shape
        own = slice(self._rank * self._places, self._rank * self._places + count)
        rest = slice(own.stop, (self._rank + 1) * self._places)
        known = (given.ids_TK >= 0) & (given.ids_TK < self._num_experts)
        flags.advance(EPOCHS)
        for block in blocks_R:
            ids_UK, weights_UK = self.choices(block, at)
            ids_UK[own], weights_UK[own] = torch.where(known, given.ids_TK, -1).int(), given.weights_TK
            ids_UK[rest] = -1
        flags.tell(X_LEFT + 1)
        x, scale = given.x_TH, given.x_scale_TB
        if scale is None:
            x, scale = quantize_rows(x, given.pow2)
        needed_R = [(known & (given.ids_TK // self._here == rank)).any(1) for rank in range(self._ranks)]
        for block, needed in zip(blocks_R, needed_R, strict=True):
            x_UH, scale_UB = self._x(block, at, hidden)
            x_UH[own].view(torch.uint8)[needed] = x.view(torch.uint8)[needed]
            scale_UB[own][needed] = scale[needed]
        flags.tell(X_LEFT)

        flags.wait(X_LEFT + 1, tokens.call, dispatch)
        ids_UK, weights_UK = self.choices(blocks_R[self._rank], at)
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

    def _x(self, block: Tensor, at: Layout, hidden: int) -> tuple[Tensor, Tensor]:
        """Codes (R·M, H) and scales (R·M, H / 128)."""
        rows = self._ranks * self._places
        scales_UB = view_of(block, at.scales, torch.float32, rows, blocks(hidden))
        return view_of(block, at.codes, E4M3, rows, hidden), scales_UB

    def _parts(self, block: Tensor, at: Layout, hidden: int) -> Tensor:
        """(R, M, H)"""
        return view_of(block, at.parts, torch.bfloat16, self._ranks, self._places, hidden)
