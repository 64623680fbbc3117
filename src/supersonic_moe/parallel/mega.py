"""FP8 experts spread over ranks, for serving: one call from tokens at home to combined outputs at home.

Rank r of R holds the experts [r·E/R, (r+1)·E/R). T tokens here, U received, K choices a token.

    home     q(x)       e4m3 with a scale for 128, unless x comes so                  (T, H)
             dispatch   codes; scales, ids and weights in a second message            (T, ·) -> (U, ·)
    there    experts    ``inference.moe_fp8_topk`` on what arrived, bf16 out          (U, H)
    home     combine    the parts of a token, added in order of ranks, rounded once   (U, H) -> (T, H)

With one rank nothing travels, and a call is ``moe_fp8_topk``. With more, this is the composed form: the collectives of
:class:`ExpertParallel` around the operator. It is right, and nothing is sent while products run. With ``direct=True``,
between ranks that reach each other's memory, dispatch and combine are loads and stores of the operator's own kernel
(``few_rows.py``).

**Weights before or after the down-projection.** The operator multiplies a token's weight w after it. With fp32 scales
that is the same number as before it: the block w·c has the scale w·s, and w·c / (w·s) = c / s has the codes of c. With
``pow2_scales`` the two differ by a rounding to e4m3.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from supersonic_moe import checks
from supersonic_moe.config.activation import GateUpLayout, as_layout, check_limit
from supersonic_moe.config.grouped_routing import MAX_TOP_K
from supersonic_moe.inference.operands import INTERMEDIATE_MULTIPLE, check_experts, check_x, output
from supersonic_moe.inference.ops import on_sm90
from supersonic_moe.inference.topk import activation_scales, check_choices, check_received, moe_fp8_topk
from supersonic_moe.inference.workspace import streams, workspace_bytes
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.parallel import few_rows
from supersonic_moe.parallel.collectives import group_of
from supersonic_moe.parallel.copies import Copies
from supersonic_moe.parallel.expert_parallel import ExpertParallel
from supersonic_moe.parallel.few_rows import FewRows, Given
from supersonic_moe.parallel.traffic import Load
from supersonic_moe.private_api import uncompiled
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

TRANSPORTS = ("gather", "all_to_all", "push")
LARGEST_BANK = 512 << 20
"""Bytes of each of the two buffers that other ranks reach, at most: 8 ranks of 8192 tokens of 7168 columns would need
896 MiB. An exchange more costs two flags, where it carries half a gigabyte."""


class _Received(NamedTuple):
    """U tokens from all ranks, in order of source rank."""

    x: Quantized
    """(U, H) e4m3 codes, (U, H / 128) scales."""
    ids: Tensor
    """(U, K) int32 experts of this rank, counted from 0; -1 where a choice lives elsewhere."""
    weights: Tensor
    """(U, K) float32"""


class _Exchange(ExpertParallel):
    """The collectives of a serving call: rows in e4m3 there, partial outputs back, no autograd."""

    _names = "MegaMoE", "max_tokens_per_rank"
    compared = (*ExpertParallel.compared, "intermediate", "direct")

    def __init__(
        self, group: dist.ProcessGroup | DeviceMesh, intermediate: int, direct: bool, **arguments: Any
    ) -> None:
        self.intermediate, self.direct = intermediate, direct
        super().__init__(group, **arguments)
        self.few: FewRows | None = None
        """Calls without copies, where they are possible."""
        if isinstance(copies := self._channel.ranks, Copies) and direct:
            sizes = (self.num_experts, self.max_tokens, self.top_k)
            self.few = FewRows(copies, self.rank, self.size, *sizes)

    @property
    def symmetric_bytes(self) -> int:
        """Of this rank's memory that the others reach."""
        copies = self._channel.ranks
        return copies.memory.blocks[self.rank].numel() if isinstance(copies, Copies) else 0

    def row_bytes(self) -> int:
        least = super().row_bytes()
        if not self.direct:
            return least
        return max(least, few_rows.row_bytes(self.size, self.max_tokens, self.hidden, self.top_k))

    def largest_bank(self) -> int | None:
        return None if self.direct else LARGEST_BANK

    @uncompiled
    def in_place(self, given: Given, out_TH: Tensor, accumulate: bool) -> None:
        """Writes ``out``, or adds to it, by a call without copies."""
        assert self.few is not None
        with self.call():
            self._channel.check_tokens(given.x_TH.shape[0])
            self.few.run(self._channel.calls, given, out_TH, accumulate=accumulate)

    @uncompiled  # sizes on the host, collectives, limits on waits
    def there_and_back(
        self, x: Quantized, weights_TK: Tensor, ids_TK: Tensor, experts: Callable[[_Received], Tensor]
    ) -> Tensor:
        """(T, H): what ``experts`` makes (U, H) of the received tokens, summed at home."""
        with self.call():
            found = self._channel.departures(ids_TK)
            # for their number and a dtype that all ranks have
            trip, _, _ = self._channel.start(weights_TK, weights_TK, found)
            ids_UK, weights_UK, scale_UB = trip.send_choices("forward dispatch", found.ids_TK, weights_TK, x.scale)
            codes_UH = trip.send("forward dispatch", x.q.view(torch.uint8)).view(E4M3)
            part_UH = experts(_Received(Quantized(codes_UH, scale_UB), ids_UK, weights_UK))
            return trip.summed(trip.back("forward combine", part_UH))


class MegaMoE:
    """FP8 experts of layers of one size, spread over a group: dispatch, experts, combine in one call. Inference only.

    It holds no weights; all layers of a model may share it. All ranks make the same calls in the same order, with any
    number of tokens up to ``max_tokens_per_rank``, 0 included.

    Args:
        group: ranks that share the experts, a process group of ``torch.distributed`` or a one-dimensional DeviceMesh;
            None: this process alone, which then needs no ``torch.distributed``.
        num_experts: E of the whole layer, a multiple of the number of ranks.
        hidden: H, a multiple of 128. intermediate: I, a multiple of 64. top_k: K, at
            most 16.
        transport: how tokens travel between ranks, as in :class:`ExpertParallel`: ``"gather"`` sends all of them to
            all ranks and never waits for the host, so a call can be captured in a CUDA graph; ``"all_to_all"`` sends
            what is needed, and the host waits once in each call; ``"push"`` sends what is needed to the places of
            ``"gather"``, and has not been timed. With ``"gather"`` max_tokens_per_rank decides what travels, with it
            and with ``"push"`` which kernels run, not the tokens of a call: have an object of its own for small
            batches.
        direct: with ``"gather"``, between GPUs that reach each other's memory, kernels write tokens and partial outputs
            to where other ranks read them, and nothing is copied; elsewhere tokens travel as without. For few rows:
            max_tokens_per_rank · K · R² ≤ 128 · E. Experimental: right in all its tests, and not timed yet.
        timeout_s: longest wait for another rank. Then :class:`ExpertParallelError` says who is missing. A direct call
            waits for x, behind choices that have come, 5 s at most.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        num_experts: int,
        hidden: int,
        intermediate: int,
        top_k: int,
        max_tokens_per_rank: int,
        *,
        transport: Literal["gather", "all_to_all", "push"] = "gather",
        direct: bool = False,
        timeout_s: float = 300.0,
    ) -> None:
        for name, value in (("num_experts", num_experts), ("max_tokens_per_rank", max_tokens_per_rank)):
            checks.positive(name, value)
        for name, value, of in (("hidden", hidden, BLOCK), ("intermediate", intermediate, INTERMEDIATE_MULTIPLE)):
            checks.positive(name, value)
            if value % of:
                raise ValueError(
                    f"{name} must be a multiple of {of}; got {value}. Pad the weights of the checkpoint to one."
                )
        checks.choices_fit(top_k, num_experts)
        if top_k > MAX_TOP_K:
            raise ValueError(
                f"top_k must be at most {MAX_TOP_K}, choices of a token that the operator takes; got {top_k}."
            )
        checks.number("timeout_s", timeout_s, lowest=0.01)
        if transport not in TRANSPORTS:
            raise ValueError(
                f"transport must be one of {', '.join(map(repr, TRANSPORTS))}; got {checks.short(transport)}."
            )
        ranks = 1 if group is None else dist.get_world_size(group_of(group))
        checks.flag("direct", direct)
        if direct:
            _check_direct(ranks, num_experts, top_k, max_tokens_per_rank, transport)
        self.num_experts, self.hidden, self.intermediate, self.top_k = num_experts, hidden, intermediate, top_k
        self.max_tokens_per_rank = max_tokens_per_rank
        self.transport: str = transport
        self._ranks: _Exchange | None = None
        if group is not None and ranks > 1:
            self._ranks = _Exchange(
                group, intermediate, direct, num_experts=num_experts, top_k=top_k, hidden=hidden,
                max_tokens=max_tokens_per_rank, transport=transport, timeout_s=timeout_s,
            )  # fmt: skip
            self.transport = self._ranks.transport
        self.rank = 0 if self._ranks is None else self._ranks.rank
        self.size = 1 if self._ranks is None else self._ranks.size
        self.experts_here = num_experts // self.size
        """E / R"""
        self.first_expert = self.rank * self.experts_here
        self._w13_shape = (self.experts_here, 2 * intermediate, hidden)

    def __call__(
        self,
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        w13_scale: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        gate_up_order: GateUpLayout | str,
        x_scale: Tensor | None = None,
        swiglu_limit: float | None = None,
        pow2_scales: bool = False,
        received_rows: Tensor | None = None,
        out: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """(T, H) bfloat16: the weighted sum of each token's experts, wherever they live. T may differ by rank and call.

        Args:
            x: (T, H) bfloat16, quantized inside in blocks of 1 x 128, or float8_e4m3fn with ``x_scale``.
            w13, w2: (E/R, 2 I, H), (E/R, H, I) float8_e4m3fn: the experts of this rank, from ``first_expert`` on.
            w13_scale, w2_scale: (E/R, 2 ceil(I / 128), H / 128), with interleaved rows (E/R, ceil(2 I / 128), H / 128);
                (E/R, H / 128, ceil(I / 128)). float32.
            topk_weights: (T, K) float32, multiplied into the outputs of experts.
            topk_ids: (T, K) int32 or int64, of all experts. Outside [0, E), such as -1, a choice has no expert; a token
                without any is exactly +0.
            gate_up_order, swiglu_limit, pow2_scales: as in ``inference.moe_fp8_topk``; each rank's are those of its
                own experts, and nobody compares them.
            x_scale: (T, H / 128) float32, any strides; for e4m3 x only.
            received_rows: (E/R,) int32, to which the rows that each expert here got are added.
            out: (T, H) bfloat16 for the result.
            accumulate: add the result to ``out``, rounded to bfloat16 before and after.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or setting, with the fix.
            ExpertParallelError: another rank is missing, or calls something else.
        """
        if self._ranks is None:
            _check_accumulate(accumulate, out, x)
            self._check_fit(x, w13, topk_ids, self.max_tokens_per_rank)
            result = moe_fp8_topk(
                x, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids, x_scale=x_scale, num_experts=self.num_experts,
                gate_up_order=gate_up_order, swiglu_limit=swiglu_limit, pow2_scales=pow2_scales,
                received_rows=received_rows, out=None if accumulate else out,
            )  # fmt: skip
            return out.add_(result) if accumulate and out is not None else result
        with self._ranks.call():
            _check_accumulate(accumulate, out, x)
            self._check_fit(x, w13, topk_ids, math.inf)  # of too many tokens the exchange tells all ranks
            return self._over_ranks(
                x, (w13, w2, w13_scale, w2_scale), topk_weights, topk_ids, as_layout(gate_up_order), x_scale,
                swiglu_limit, pow2_scales, received_rows, out, accumulate,
            )  # fmt: skip

    def _over_ranks(
        self, x: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], topk_weights: Tensor, topk_ids: Tensor,
        order: GateUpLayout, x_scale: Tensor | None, limit: float | None, pow2: bool, received_rows: Tensor | None,
        out: Tensor | None, accumulate: bool,
    ) -> Tensor:  # fmt: skip
        check_x("x", x, check_experts(*weights, order), weights[0])
        scale = activation_scales(x, x_scale, "token_major")
        check_choices(topk_weights, topk_ids, x)
        check_limit("swiglu_limit", limit)
        checks.flag("pow2_scales", pow2)
        if received_rows is not None:
            check_received(received_rows, weights[0])
        if out is not None:
            output(out, x)
        assert self._ranks is not None
        if self._ranks.few is not None:
            w13, w2, w13_scale, w2_scale = weights
            given = Given(
                x.contiguous(), scale, topk_ids.contiguous(), topk_weights.contiguous(),
                Fp8Experts(w13, w13_scale, w2, w2_scale), order, limit, pow2, received_rows,
            )  # fmt: skip
            result = output(out, x)
            with torch.no_grad():
                self._ranks.in_place(given, result, accumulate)
            return result

        def experts(got: _Received) -> Tensor:
            return moe_fp8_topk(
                got.x.q, *weights, got.weights, got.ids, x_scale=got.x.scale, num_experts=self.num_experts,
                gate_up_order=order, swiglu_limit=limit, pow2_scales=pow2, received_rows=received_rows,
            )  # fmt: skip

        with torch.no_grad():
            if scale is None:
                kernels = registry.fp8_kernels("sm90" if on_sm90(x) else "reference")
                rows = kernels.quantize_rows(x.contiguous(), pow2)
            else:
                rows = Quantized(x.contiguous(), scale)
            summed: Tensor = self._ranks.there_and_back(rows, topk_weights, topk_ids, experts)
        if out is None:
            return summed
        return out.add_(summed) if accumulate else out.copy_(summed)

    def call(self) -> AbstractContextManager[None]:
        """Around a call: of what is refused inside the block the other ranks are told at once."""
        return nullcontext() if self._ranks is None else self._ranks.call()

    # ---- life --------------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What a call does, what it sends for ``max_tokens_per_rank`` and uniform routing, and its device memory."""
        ranks, tokens, experts = self.size, self.max_tokens_per_rank, self.experts_here
        lines = [f"{self.num_experts} experts over {ranks} ranks, {experts} on each; this is rank {self.rank}"]
        received = ranks * tokens
        hidden = self.hidden
        needed = workspace_bytes(received, self.top_k, hidden, self.intermediate, experts)
        if self._ranks is None:
            lines.append("way: one rank runs inference.moe_fp8_topk, and nothing travels")
        else:
            sizes = (tokens, hidden, self.num_experts, self.top_k, ranks)
            fixed = None if self.transport == "all_to_all" else tokens
            sent = Load(*sizes, "fp8", fixed, pushed=self.transport == "push").sent
            if self._ranks.few is not None:
                lines.append(
                    "way: direct, since ranks reach each other's memory: tokens are written in e4m3 to "
                    "where the streaming kernel of inference.moe_fp8_topk reads them, and partial outputs in bf16 to "
                    "where they are summed; nothing is copied"
                )
            else:
                lines.append(
                    "way: composed of dispatch in e4m3, inference.moe_fp8_topk on what arrived, and partial outputs "
                    "back in bf16; nothing is sent while products run"
                )
                needed += received * (hidden + 4 * blocks(hidden) + 8 * self.top_k + 4 * hidden)
                if fixed is not None:
                    lines.append(f"kernels on Hopper: {self._kernels()}")
            said = self._ranks.explain().splitlines()
            lines += [line for line in said if line.startswith(("transport", "places", "limit"))]
            lines.append(
                f"for {tokens} tokens a rank sends, in MB: {sent.dispatch / 1e6:.3g} there, {sent.combine / 1e6:.3g} "
                "back"
            )
        memory = f"memory: at most {needed / 2**30:.3g} GiB for a call of {tokens} tokens on every rank"
        if self._ranks is not None and (symmetric := self._ranks.symmetric_bytes):
            memory += f", beside {symmetric / 2**30:.3g} GiB that all ranks reach"
        lines.append(memory)
        return "\n".join(lines)

    def _kernels(self) -> str:
        """Which ones the places of all ranks take, however few tokens a call brings."""
        most, per_token = self.max_tokens_per_rank, self.size * self.top_k

        def tiles(places: int) -> bool:
            rows, expected = places * per_token, places * self.top_k
            return not streams(rows, expected, self.hidden, self.intermediate, self.experts_here)

        if not tiles(most):
            return "rows are streamed, in every call"
        streamed = bisect_left(range(most), True, key=tiles) - 1
        return f"tiles, in every call; rows are streamed up to max_tokens_per_rank = {streamed}"

    def warm_up(self) -> None:
        """With other ranks: compile every CUDA kernel of the package, then wait for them as long as their group allows.
        So no rank waits for the compiler of another inside ``timeout_s``.
        """
        if self._ranks is not None:
            self._ranks.warm_up()

    def check(self) -> None:
        """Wait for the device, and raise if a rank was missing."""
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        """This rank makes no more calls; others that wait for it are told so. May be called twice."""
        if self._ranks is not None:
            self._ranks.close()

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _check_fit(self, x: Tensor, w13: Tensor, topk_ids: Tensor, most: float) -> None:
        """Sizes are those of this object; what else is wrong the operator says."""
        try:
            if w13.shape == self._w13_shape and topk_ids.shape[1] == self.top_k and x.shape[0] <= most:
                return
        except (AttributeError, IndexError):
            pass
        checks.tensor("w13", w13, 3, "(E/R, 2 I, H)")
        checks.size("w13", "shape", tuple(w13.shape), self._w13_shape, "(E/R, 2 I, H) of this MegaMoE")
        checks.tensor("topk_ids", topk_ids, 2, "(T, K)")
        checks.size("topk_ids", "choices", topk_ids.shape[1], self.top_k, "top_k of this MegaMoE")
        checks.tensor("x", x, 2, "(T, H)")
        if x.shape[0] > most:
            raise ValueError(
                f"a rank must not have more than max_tokens_per_rank = {most} tokens in a call; got {x.shape[0]}. Make "
                "the MegaMoE with a larger max_tokens_per_rank."
            )


def _check_direct(ranks: int, num_experts: int, top_k: int, places: int, transport: str) -> None:
    """Sizes and transport with which ``direct=True`` can be."""
    if transport != "gather":
        raise ValueError(
            f'direct=True needs a place for each token on every rank, as transport="gather" has; got {transport!r}. '
            "Leave transport out, or direct."
        )
    most = few_rows.most_places(ranks, top_k, num_experts // ranks)
    if ranks > 1 and places > most:
        raise ValueError(
            f"direct=True needs few rows: max_tokens_per_rank must not exceed {most} with {ranks} ranks, "
            f"{num_experts} experts and top_k = {top_k}; got {places}. Lower max_tokens_per_rank, or leave direct out."
        )


def _check_accumulate(accumulate: bool, out: Tensor | None, x: Tensor) -> None:
    if accumulate:
        checks.flag("accumulate", accumulate)
        if out is None:
            raise ValueError("accumulate adds the result to out; got out=None. Pass out, or accumulate=False.")
        output(out, x)
