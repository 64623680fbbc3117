"""Experts spread over the ranks of a group: tokens go where their experts live, partial sums come back.

Rank r of R holds the experts [r·E/R, (r+1)·E/R); every rank has tokens of its own, any number of them. T tokens here, U
tokens received, K choices a token, H hidden.

    forward    dispatch   x, ids, scores of each token once to each rank that needs them     (T, ·) -> (U, ·)
               experts    part[u] = sum over the token's local rows of s (Y + b2)            as on one GPU
               combine    part back home; out[t] = sum of its parts, in order of ranks       (U, H) -> (T, H)
    backward   combine    dout to the same ranks
               experts    as on one GPU: dW1, dW2 have the tokens of all ranks
               dispatch   dx parts and dscores back home; dx[t] = sum of its parts, in order of ranks

Received tokens lie in order of source rank, then token: inside an expert, rows are in the order that one process with
the tokens of all ranks would have. So products and weight gradients have the bits of that process, and outputs and dx
differ by one rounding of each part. Every rank runs everything on zero tokens, too, so graphs never differ by rank.

Bytes each way, by rank: 2·H·p·T·(R−1) in BF16, p the probability that a token needs a given rank; + 8·K for each copy.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal, NoReturn, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from supersonic_moe import checks, functional
from supersonic_moe.autocast import autocast_dtype
from supersonic_moe.autograd import apply
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.config.router import TokenRounding, TopKRouter
from supersonic_moe.functional import LayerOutput, RouterWeight, Selection
from supersonic_moe.parallel import exact_wire, fp8_wire
from supersonic_moe.parallel.channel import Channel, Sizes
from supersonic_moe.parallel.collectives import Ranks, group_of
from supersonic_moe.parallel.departures import Departures
from supersonic_moe.parallel.traffic import Load
from supersonic_moe.parallel.transport import TRANSPORTS
from supersonic_moe.parallel.trip import Combine, Dispatch, Dispatched, Trip
from supersonic_moe.private_api import replace_saved, uncompiled
from supersonic_moe.quantization.block_format import blocks
from supersonic_moe.routing.plan import plan_from_topk
from supersonic_moe.training.options import ExpertOptions, Options, lists_options


class _Taken(threading.local):
    number = 0
    """Of the channel that calls of a thread go through."""


class ExpertParallel:
    """Experts of one or more layers, spread over a group. It has no parameters; layers of one size may share it.

    All ranks make the same calls in the same order, with any number of tokens up to ``max_tokens``, 0 included.

    Args:
        group: ranks that share the experts, a process group of ``torch.distributed`` or a one-dimensional DeviceMesh.
        num_experts: E of the whole layer, a multiple of the number of ranks. top_k: K. hidden: H.
        max_tokens: most tokens of a rank in one call; with an exact ``capacity``, more are an error on every rank.
        capacity: ``"exact"`` asks the host for the number of tokens that arrive, one synchronization in each forward,
            and allocates no more. A number of tokens is what each rank may send to each other one: buffers have this
            size and nothing waits for the host, so that a call can be captured in a CUDA graph. If more would go,
            nothing is dropped silently: on a CPU the call raises on every rank; on a GPU its outputs are NaN and the
            eighth call after it, or ``check()``, raises on every rank.
        transport: ``"all_to_all"`` sends each token to the ranks that need it, by collectives. ``"gather"`` sends all
            tokens to all ranks, as if each had ``max_tokens``: nothing waits for the host, no number can be too small,
            and a call can be captured in a CUDA graph. For few ranks, where most tokens need most of them anyway, and
            for steps whose tokens are near ``max_tokens``. Buffers have R·max_tokens rows, those inside the experts K
            times as many. Where each rank has a Hopper GPU that reaches the memory of all others (one host, NCCL),
            copy engines carry them, else collectives. ``"push"`` has the places of ``"gather"``, and sends what is
            needed: kernels write each token to the GPUs that need it, and parts back. It is for more ranks, and for
            steps with fewer tokens than ``max_tokens``; experimental, because it has not been timed. Where GPUs do not
            reach each other's memory it is ``"gather"``. ``"auto"`` takes copies where they are possible, capacity is
            exact and at least 80 % of the tokens need any given rank, else ``"all_to_all"``. ``explain()`` says which,
            and why.
        wire: how x and the gradient of the output travel. ``"exact"`` is in their own dtype; ``"fp8"``, for layers with
            an ``Fp8Recipe`` with ``scale="pow2"`` or ``wgrad="bf16"``, as the experts would quantize them: half of the
            bytes, the same bits of outputs and gradients of x. ``"auto"`` takes it for calls in bfloat16 with an
            ``Fp8Recipe(scale="pow2")`` and FP8 weight gradients, which lose nothing by it, and ``"exact"`` for others.
            Parts go back in the dtype of x.
        keep_received: whether tokens that arrived are kept for backward. If not, their home sends them once more: U·H
            elements less for each layer whose backward is to come. Under activation checkpointing there is nothing to
            save. It concerns ``experts`` and ``MoE``; experts of your own between ``dispatch`` and ``combine`` keep
            what they like.
        channels: calls that may be in flight at the same time, each through buffers of its own; see ``channel``.
        timeout_s: longest wait for another rank. Then :class:`ExpertParallelError` says who is missing.
    """

    _names = "ExpertParallel", "max_tokens"
    """What the user made, and its limit of tokens."""
    compared: ClassVar[tuple[str, ...]] = (
        "num_experts", "top_k", "hidden", "max_tokens", "capacity", "transport", "wire", "keep_received", "channels",
        "timeout_s",
    )  # fmt: skip
    """What all ranks must have in common."""

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        *,
        num_experts: int,
        top_k: int,
        hidden: int,
        max_tokens: int,
        capacity: int | Literal["exact"] = "exact",
        transport: Literal["auto", "all_to_all", "gather", "push"] = "auto",
        wire: Literal["auto", "exact", "fp8"] = "exact",
        keep_received: bool = True,
        channels: int = 1,
        timeout_s: float = 300.0,
    ) -> None:
        sizes = {"num_experts": num_experts, "hidden": hidden, "max_tokens": max_tokens, "channels": channels}
        for name, value in sizes.items():
            checks.positive(name, value)
        checks.flag("keep_received", keep_received)
        checks.choices_fit(top_k, num_experts)
        checks.number("timeout_s", timeout_s, lowest=0.01)
        if capacity != "exact":
            if isinstance(capacity, str) or capacity is None:
                raise TypeError(f'capacity must be "exact" or a number of tokens; got {checks.short(capacity)}.')
            checks.positive("capacity", capacity)
        for name, choice, known in (("wire", wire, ("auto", "exact", "fp8")), ("transport", transport, TRANSPORTS)):
            if choice not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {checks.short(choice)}.")
        if transport in ("gather", "push") and capacity != "exact":
            raise ValueError(
                f'transport="{transport}" has a place for each of max_tokens tokens, and no capacity; got {capacity}. '
                "Leave capacity out."
            )
        self.group = group_of(group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if num_experts % self.size:
            raise ValueError(
                f"num_experts must be a multiple of the ranks of the group; got {num_experts} experts for {self.size} "
                "ranks. Add experts, or use fewer ranks."
            )
        self.num_experts, self.top_k, self.hidden, self.max_tokens = num_experts, top_k, hidden, max_tokens
        if transport == "auto" and capacity != "exact":
            transport = "all_to_all"
        self.capacity, self.transport, self.wire, self.timeout_s = capacity, transport, wire, timeout_s
        self.keep_received, self.channels = keep_received, channels
        self.experts_here = num_experts // self.size
        """E / R"""
        self.first_expert = self.rank * self.experts_here
        self.others = frozenset(dist.get_process_group_ranks(self.group)) - {dist.get_rank()}
        """Ranks of the default group that hold other experts."""
        self._all, self._taken = list[Channel](), _Taken()
        if self.size > 1:
            key = self._agree()
            common = Sizes(
                num_experts, top_k, max_tokens, self.row_bytes(), capacity, timeout_s, self._names, self.largest_bank()
            )
            self._all = [Channel(self.group, number, transport, common, key) for number in range(channels)]
            self.transport = self._channel.transport
            if channels > 1:
                dist.barrier(self.group)  # nobody leaves while others still connect to it

    def row_bytes(self) -> int:
        """Of the rows of an exchange, at most: of x in 16 bits; of ids, scores and scales."""
        return max(2 * self.hidden, 8 * self.top_k + 4 * blocks(self.hidden))

    def largest_bank(self) -> int | None:
        """Bytes of one of the two buffers that copies go through, at most; None: as many as there are rows."""
        return None

    def _agree(self) -> str:
        """A name that this object has on all ranks, after they have compared their arguments."""
        arguments = {name: getattr(self, name) for name in self.compared}
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (uuid.uuid4().hex, arguments), group=self.group)
        for rank, (_, theirs) in enumerate(found):
            for name, value in arguments.items():
                if theirs[name] != value:
                    kind, limit = self._names
                    raise ValueError(
                        f"{kind} needs the same arguments on every rank; {limit if name == 'max_tokens' else name} is "
                        f"{value!r} on rank {self.rank} and {theirs[name]!r} on rank {rank}."
                    )
        return f"supersonic_moe/{found[0][0]}"

    # ---- calls -------------------------------------------------------------------------------------------------------

    @contextmanager
    def channel(self, number: int) -> Iterator[None]:
        """Calls that this thread starts inside the block, and their backward, go through channel ``number``, from 0 to
        ``channels`` - 1; calls outside go through channel 0. Calls of one channel belong on one stream, or on streams
        that wait for each other. Those of two have no buffer in common: two micro-batches, or two layers side by side,
        may be in flight on streams of their own. Still every rank makes the same calls in the same order.
        """
        if not isinstance(number, int) or not 0 <= number < self.channels:
            raise ValueError(
                f"a channel must be at least 0 and less than channels = {self.channels} of the ExpertParallel; got "
                f"{checks.short(number)}. Make it with more channels."
            )
        before, self._taken.number = self._taken.number, number
        try:
            yield
        finally:
            self._taken.number = before

    @property
    def _channel(self) -> Channel:
        """That of the next call of this thread; of more than one rank."""
        return self._all[self._taken.number]

    @property
    def ranks(self) -> Ranks:
        """What carries the rows of the next call of this thread, for those who measure it; of more than one rank."""
        return self._channel.ranks

    def call(self) -> AbstractContextManager[None]:
        """A call, of more than one rank: of what is refused inside the block, or fails, the others are told at once.
        Not of what is refused where the compiler traces: ranks may differ in that.
        """
        return nullcontext() if torch.compiler.is_compiling() else self._channel.call()

    def refuse_call(self, error: Exception) -> None:
        """A layer has refused what it was called with, before ``run_layer``."""
        if self.size > 1 and not torch.compiler.is_compiling():
            self._channel.refuse(error)

    # ---- the layer ---------------------------------------------------------------------------------------------------

    def run_layer(
        self,
        x_TH: Tensor,
        router_or_logits: RouterWeight | Callable[[Tensor], Tensor],
        w1: Tensor,
        w2: Tensor,
        selection: Selection,
        options: ExpertOptions,
    ) -> LayerOutput:
        """``functional.run_layer`` with the router of all experts and the weights of those of this rank, ``w1``
        (E/R, N1, H) and ``w2`` (E/R, H, I). ``expert_counts`` (E,) are choices of the tokens here.
        """
        if self.size == 1:
            w1, w2, options = _local(w1), _local(w2), _local_biases(options)
            return functional.run_layer(x_TH, router_or_logits, w1, w2, selection, options)
        with self.call():
            router = selection.router
            self.check_layer(self.num_experts, selection.num_experts_per_tok, self.hidden, router)
            assert not isinstance(router, TokenRounding)
            if selection.token_mask_T is not None:
                x_TH = selection.without_padding(x_TH)
            if isinstance(router_or_logits, RouterWeight):
                router_or_logits = router_or_logits._replace(weight_EH=_local(router_or_logits.weight_EH))
            logits_TE, x_TH = functional.router_logits(x_TH, self._checked_x(x_TH), router_or_logits, self.num_experts)
            if options.get("validate"):
                checks.finite_logits(logits_TE)
            scores_TK, ids_TK = selection.top_k(logits_TE, router, options.get("backend", "auto"))
            out_TH, rows_E = self._experts(x_TH, ids_TK, scores_TK, w1, w2, options)
            return LayerOutput(out_TH, logits_TE, rows_E.to(torch.int32), ids_TK)

    @lists_options
    def experts(
        self,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_scores_TK: Tensor,
        w1: Tensor,
        w2: Tensor,
        **options: Unpack[ExpertOptions],
    ) -> Tensor:
        """``functional.topk_experts`` for the ids (T, K) of all experts and the weights of those of this rank, ``w1``
        (E/R, N1, H) and ``w2`` (E/R, H, I). Biases likewise.
        """
        if self.size == 1:
            w1, w2 = _local(w1), _local(w2)
            checks.tensor("w1", w1, 3, "(E/R, N1, H)")  # of fewer experts than E the plain layer would skip ids
            checks.size("w1", "expert count", w1.shape[0], self.experts_here, "the experts of this rank")
            return functional.topk_experts(x_TH, topk_ids_TK, topk_scores_TK, w1, w2, **_local_biases(options))
        with self.call():
            x_TH = self._checked_x(x_TH)
            self._check_choices(x_TH, topk_ids_TK, topk_scores_TK)
            if options.get("validate"):
                checks.valid_topk_ids(topk_ids_TK, self.num_experts)
                checks.finite_scores("topk_scores", topk_scores_TK)
            out_TH: Tensor = self._experts(x_TH, topk_ids_TK, topk_scores_TK, w1, w2, options)[0]
            return out_TH

    @uncompiled  # sizes on the host, collectives, limits on waits
    def _experts(
        self, x_TH: Tensor, ids_TK: Tensor, scores_TK: Tensor, w1: Tensor, w2: Tensor, options: ExpertOptions
    ) -> tuple[Tensor, Tensor]:
        """(out (T, H), choices of each expert (E,))."""
        with self.call():
            w1, w2 = _local(w1), _local(w2)
            for name, weight in (("w1", w1), ("w2", w2)):
                checks.tensor(name, weight, 3, "(E/R, N1, H)" if name == "w1" else "(E/R, H, I)")
                checks.size(name, "expert count", weight.shape[0], self.experts_here, "the experts of this rank")
            checks.size("w1", "hidden size (last dimension)", w1.shape[2], self.hidden, "hidden of the ExpertParallel")
            options = _local_biases(options)
            read = Options.read(options)
            found = self._channel.departures(ids_TK)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not read.inference):
                if self.wire == "fp8" or (self.wire == "auto" and fp8_wire.is_free(read.recipe, x_TH)):
                    return self._experts_fp8(x_TH, scores_TK, found, w1, w2, read), found.rows_E
                trip, rows, scores_TK = self._channel.start(x_TH, scores_TK, found)
                way = exact_wire.way_of(trip, x_TH, self.top_k, read)
                if way is not None:
                    e, keeps = functional.checked_experts(x_TH, w1, w2, read), self.keep_received
                    return exact_wire.experts(e, scores_TK, found.ids_TK, way, keeps=keeps), found.rows_E
                got = self._dispatched(x_TH, scores_TK, found.ids_TK, trip, rows)
                part_UH = functional.experts_from_plan(got.x, got.scores.reshape(-1), got.plan, w1, w2, **options)
                assert got.handle is not None
                if part_UH.requires_grad and not self.keep_received:
                    replace_saved(part_UH, got.x, got.handle.again(x_TH))
                return apply(Combine, part_UH, got.handle), found.rows_E

    def _experts_fp8(
        self, x_TH: Tensor, scores_TK: Tensor, found: Departures, w1: Tensor, w2: Tensor, options: Options
    ) -> Tensor:
        if not isinstance(options.recipe, Fp8Recipe) or x_TH.dtype is not torch.bfloat16:
            raise TypeError(
                f'wire="fp8" needs an Fp8Recipe and bfloat16; got {options.recipe} and {checks.describe(x_TH)}. Make '
                'the ExpertParallel with wire="exact", or the layer with recipe=Fp8Recipe().'
            )
        if options.recipe.scale == "fp32" and options.recipe.wgrad == "fp8":
            raise ValueError(
                'wire="fp8" needs scales that are powers of two, or weight gradients in bf16: rounding twice with fp32 '
                f'scales would cost them accuracy; got {options.recipe}. Use Fp8Recipe(scale="pow2") or '
                'Fp8Recipe(wgrad="bf16").'
            )
        e = functional.checked_experts(x_TH, w1, w2, options)
        trip, rows, scores_TK = self._channel.start(e.x, scores_TK.float(), found)
        here, keeps = None if rows is None else sum(rows), self.keep_received
        return fp8_wire.experts(e, scores_TK, found.ids_TK, trip, here, keeps=keeps)

    # ---- its parts ---------------------------------------------------------------------------------------------------

    @uncompiled
    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_scores_TK: Tensor) -> Dispatched:
        """Send each token to the ranks of its experts; differentiable in x and scores.

        Args:
            topk_ids_TK: int32 or int64 ids of all experts; outside [0, E), such as -1, a choice has no expert.
            topk_scores_TK: floating.
        """
        if self.size == 1:
            x_TH = self._checked_x(x_TH)
            self._check_choices(x_TH, topk_ids_TK, topk_scores_TK)
            ids = torch.where(topk_ids_TK < self.num_experts, topk_ids_TK, -1).clamp(min=-1).to(torch.int32)
            plan = plan_from_topk(ids, self.num_experts)
            return Dispatched(x_TH, ids, topk_scores_TK, plan.expert_counts, plan, None)
        with self.call():
            x_TH = self._checked_x(x_TH)
            self._check_choices(x_TH, topk_ids_TK, topk_scores_TK)
            found = self._channel.departures(topk_ids_TK)
            trip, rows, scores_TK = self._channel.start(x_TH, topk_scores_TK, found)
            if trip.needed is not None:
                trip.needed.zeros = True  # experts of one's own may read what no plan does
            return self._dispatched(x_TH, scores_TK, found.ids_TK, trip, rows)

    @uncompiled
    def combine(self, part_UH: Tensor, handle: Trip | None) -> Tensor:
        """(T, H) in the dtype of ``part``: for each token of this rank the sum of what its ranks computed, in order of
        ranks. ``part_UH`` has a row for each received token.
        """
        if handle is None and self.size == 1:
            return part_UH
        if not isinstance(handle, Trip):
            raise TypeError(f"handle must be the .handle of what dispatch() returned; got {type(handle).__name__}.")
        with handle.ranks.watch.telling(handle.call):
            checks.tensor("part", part_UH, 2, "(U, H)")
            shape = handle.arrived, self.hidden
            checks.size("part", "shape", tuple(part_UH.shape), shape, "a row for each received token")
            out: Tensor = apply(Combine, part_UH, handle)
            return out

    def _dispatched(
        self, x_TH: Tensor, scores_TK: Tensor, ids_TK: Tensor, trip: Trip, rows: list[int] | None
    ) -> Dispatched:
        x_UH, scores_UK, ids_UK = apply(Dispatch, x_TH, scores_TK, ids_TK, trip)
        plan = plan_from_topk(ids_UK, self.experts_here, capacity=None if rows is None else sum(rows))
        return Dispatched(x_UH, ids_UK, scores_UK, plan.expert_counts if rows is None else rows, plan, trip)

    # ---- life --------------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What this object does and why, and how many bytes it sends for ``max_tokens`` and uniform routing."""
        here = (
            f"{self.num_experts} experts over {self.size} ranks, {self.experts_here} on each; this is rank {self.rank}"
        )
        if self.size == 1:
            return f"{here}\ntransport: none, a group of one rank runs the plain layer"
        sizes = (self.max_tokens, self.hidden, self.num_experts, self.top_k, self.size)
        fixed = None
        places = "as many as needed: the host waits once in each forward"
        if self._channel.fixed_places:
            fixed = self.max_tokens
            places = f"{self.max_tokens} for each rank: no wait for the host"
        elif self.capacity != "exact":
            fixed = self.capacity
            places = f"{self.capacity} tokens for each pair of ranks: no wait for the host, more raise"
        lines = [
            here,
            f"transport: {self.transport}, {self._channel.how}",
            f"wire: {self.wire}, x and gradients of outputs {fp8_wire.DTYPES[self.wire]}",
            f"places: {places}",
            str(Load(*sizes, self.wire, fixed, again=not self.keep_received, pushed=self.transport == "push")),
            f"limit of a wait: {self.timeout_s:g} s",
        ]
        if self.channels > 1:
            lines.insert(2, f"channels: {self.channels}, each with a process group and buffers of its own")
        return "\n".join(lines)

    def warm_up(self) -> None:
        """Compile every CUDA kernel of the package (``supersonic-moe warmup``), then wait for the other ranks as long
        as their group allows. So no rank waits for the compiler of another inside ``timeout_s``.
        """
        if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
            from supersonic_moe.jit import compile_all
            from supersonic_moe.kernels.sm90 import registered_specs

            compile_all(registered_specs())
        dist.barrier(self.group)

    def check(self) -> None:
        """Wait for the device, and raise if a rank was missing or a call with a fixed ``capacity`` has overflowed."""
        for channel in self._all:
            channel.watch.finish()
            if channel.overflow is not None:
                channel.overflow.check()

    def close(self) -> None:
        """This rank makes no more calls; others that wait for it are told so. May be called twice."""
        for channel in self._all:
            channel.watch.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        """Copies of a layer share the group."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ExpertParallel belongs to the running processes of its group, so a layer that has one cannot be "
            "pickled. Save its state_dict(), and load that into a layer with an ExpertParallel of its own."
        )

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check_layer(self, num_experts: int, top_k: int, hidden: int, router: TopKRouter | TokenRounding) -> None:
        """Raises ValueError if a layer does not fit."""
        sizes = {"num_experts": num_experts, "top_k": top_k, "hidden": hidden}
        for name, value in sizes.items():
            own = getattr(self, name)
            if value != own:
                raise ValueError(
                    f"a layer must have the {name} of its ExpertParallel, {own}; got {value}. Make another one for it."
                )
        if self.size > 1 and isinstance(router, TokenRounding):
            raise ValueError(
                "TokenRounding rounds what an expert gets from one rank, not from all of them; got "
                f"{checks.short(router)} with {self.size} ranks. Use its base router."
            )

    def _checked_x(self, x_TH: Tensor) -> Tensor:
        """x in the dtype of the computation."""
        checks.tensor("x", x_TH, 2, "(T, H)")
        checks.strided("x", x_TH)
        checks.floating("x", x_TH)
        checks.size("x", "hidden size (last dimension)", x_TH.shape[1], self.hidden, "hidden of the ExpertParallel")
        return x_TH.to(autocast_dtype(x_TH) or x_TH.dtype)

    def _check_choices(self, x_TH: Tensor, ids_TK: Tensor, scores_TK: Tensor) -> None:
        checks.ids("topk_ids", ids_TK, 2)
        shape = (x_TH.shape[0], self.top_k)
        checks.size("topk_ids", "shape", tuple(ids_TK.shape), shape, "(T, K): rows of x, top_k of the ExpertParallel")
        checks.same_shape("topk_ids", ids_TK, "topk_scores", scores_TK)
        checks.floating("topk_scores", scores_TK)
        for name, t in (("topk_ids", ids_TK), ("topk_scores", scores_TK)):
            checks.same_device(name, t, "x", x_TH)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _local(weight: Tensor) -> Tensor:
    """The experts of this rank, of a weight that ``shard_experts`` has made a DTensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _local_biases(options: ExpertOptions) -> ExpertOptions:
    for name in ("b1", "b2"):
        if isinstance(bias := options.get(name), DTensor):
            options = {**options, name: bias.to_local()}  # type: ignore[misc]
    return options
