"""Routing of the inference operator on sm_90a: experts, weights and sorted rows, in one launch up to 128 tokens.

    logits (T, E) -> K experts and weights of each token  (rule: ``config/grouped_routing.py``)
    ids (T, K) of another router, through an offset or a map                                        -> slots
    slots -> rows sorted by local expert, in slot order inside an expert (a stable counting sort)   -> tables

Where rows are streamed, each expert starts at a multiple of 8 rows; else they follow each other.

Slots: s = t * C + j, C = K choices, or K + 1 with a shared expert, which is the last choice of each token and the last
local expert. A slot without a local expert has no row.
Choice
    A warp for a token, E / 32 experts a lane, side by side. Scores are mapped to unsigned keys of the same order (NaN
    as minus infinity). The K-th largest of the lanes' largest keys bounds the chosen ones from below; the few that
    reach it, 10 of 256 for K = 8, get a lane each and count how many are ahead of them. Where more than 32 reach it
    (equal scores), K rounds take the largest key of the warp, then the lowest index that has it.
Up to 128 tokens
    A cluster of 8 blocks, 16 tokens each at most, counts exchanged through distributed shared memory: no memory has to
    be zeroed beforehand, so the caller's workspace may hold anything.
More
    Two launches: blocks choose and count, then each adds up the counts of the blocks before it and places its slots.
Cost
    T E 4 bytes of logits. Instructions: about 580 a warp and token at E = 256 in 8 groups, K = 8.

The kernels also set counters to zero for the ones behind them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.jit.launch import Kernel, Launch, kernel_of
from supersonic_moe.jit.spec import KernelSpec

THREADS = 512
CLUSTER = 8
SMALL_TOKENS = 128  # one cluster of 8 blocks with 16 warps
PASS_TOKENS = 16  # tokens of a block of the larger kernels, at least: one a warp
MAX_BLOCKS = 264  # two on a multiprocessor; every block adds up the counts of all others
ROW_GROUP = 8  # routing/rows.cuh: row_group
ITEM_ROWS = 128  # rows of an expert that the streaming kernel multiplies at a time
VALUES = (1, 2, 4, 8, 16, 32)  # experts of a lane

_SCORING = {Scoring.SIGMOID: 0, Scoring.SOFTMAX: 1, Scoring.SQRT_SOFTPLUS: 2}
_BIAS = {torch.float32: 1, torch.bfloat16: 2}


def _spec(name: str, values: int | None = None, *, cluster: int = 1, pdl: bool = False) -> KernelSpec:
    constants = () if values is None else (("VALUES", values),)
    smem = 0 if values is None else THREADS // 32 * (64 * values + 32) * 4  # routing/choose.cuh: ChoiceShared
    opcodes = ("REDUX.MAX", "MATCH.ANY", "UCGABAR_WAIT") if values and cluster > 1 else ()
    source = "place_rows.cu" if values is None else "route_rows.cu"
    return KernelSpec(name, source, constants, THREADS, smem, cluster, opcodes, pdl=pdl)


SPECS = (
    *(_spec("route_small", values, cluster=CLUSTER) for values in VALUES),
    *(_spec("route_count", values) for values in VALUES),
    _spec("place_small", cluster=CLUSTER),
    _spec("place_count"),
    _spec("place_rows", pdl=True),
)


Buffer = Tensor | int
"""A tensor, or the address of one that the caller lays out itself."""


class RowTables(NamedTuple):
    """int32 buffers that the kernels write. P: at least ``padded_rows(T * C, E)``."""

    offsets: Buffer | None
    """(E + 1,) for the tile kernels: local expert e has the rows [offsets[e], offsets[e + 1]). None: the rows are
    streamed."""
    items: Buffer
    """(1 + max_items, 4): [number of items, rows of the largest, padded rows, 0], then [expert, first row, rows,
    which << 16 | of] of each item: up to 128 rows of an expert, one of so many of it (0 of 1 beyond 32767). Written
    where rows are streamed."""
    row_slot: Buffer
    """(P,): slot of each row; -1 in those between two experts."""
    row_token: Buffer | None
    """(P,): token of each row for the tile kernels; None with ``offsets``."""
    row_out: Buffer | None
    """(P, 2), with ``row_token``: [token, bits of the float32 weight] of a row that is its token's only one, else
    [-1, bits of 1]: see down_projection_fp8.py."""
    slot_row: Buffer
    """(T, C): row of each slot, -1 for none."""
    weights: Buffer
    """(T, C) float32: weight of each slot, scaling factor included; 1 for a shared expert."""
    counters: Buffer
    """(counter_words,): set to zero for the streaming kernel."""
    counts: Buffer | None
    """(264, E) scratch, for more than 128 tokens."""
    counter_words: int
    max_items: int
    """At least ``max_items(E, rows)``."""
    received: Tensor | None = None
    """(routed,), for ids of another router: the rows of each routed expert are added."""


def max_items(num_local: int, rows: int) -> int:
    """Bound of the items of ``rows`` rows."""
    return num_local + rows // ITEM_ROWS


def padded_rows(rows: int, num_local: int) -> int:
    """Bound of the rows that ``rows`` slots take where each expert starts at a multiple of ``ROW_GROUP``."""
    return (rows + (ROW_GROUP - 1) * min(rows, num_local)) // ROW_GROUP * ROW_GROUP


class Choices(NamedTuple):
    """Which experts are local, and how many slots a token has."""

    num_experts: int
    """Of the model: ids outside [0, num_experts) have no row."""
    routed: int
    """Local routed experts."""
    offset: int
    top_k: int
    shared: bool

    @property
    def per_token(self) -> int:
        return self.top_k + self.shared

    @property
    def num_local(self) -> int:
        return self.routed + self.shared


@functools.cache
def _kernel(name: str, values: int | None = None) -> Kernel:
    constants = () if values is None else (("VALUES", values),)
    return kernel_of(next(spec for spec in SPECS if spec.name == name and spec.constants == constants))


def route_rows(
    logits_TE: Tensor, bias_E: Tensor | None, rule: GroupedRouting, choices: Choices, tables: RowTables
) -> list[Launch]:
    """The launches that choose and place. ``logits_TE`` float32 with contiguous rows."""
    values = next(v for v in VALUES if 32 * v >= rule.num_experts)
    size = rule.num_experts // rule.n_group
    lanes, rest = divmod(size, values)
    whole = rest == 0 and lanes & (lanes - 1) == 0
    return _launches(
        "route", values, logits_TE, choices, tables,
        logits=logits_TE, row=logits_TE.stride(0), bias=bias_E, scoring=_SCORING[rule.scoring],
        bias_type=0 if bias_E is None else _BIAS[bias_E.dtype], groups=rule.n_group, kept=rule.topk_group,
        group_size=size, group_lanes_log2=lanes.bit_length() - 1 if whole else -1, factor=rule.scaling_factor,
    )  # fmt: skip


def place_topk(
    ids_TK: Tensor,
    weights_TK: Tensor | None,
    expert_map: Tensor | None,
    scaling_factor: float,
    choices: Choices,
    tables: RowTables,
) -> list[Launch]:
    """The launches that place the choices of another router: ids int32 or int64, weights float32 (None: 1), both
    contiguous.
    """
    return _launches(
        "place", None, ids_TK, choices, tables,
        ids=ids_TK, wide=int(ids_TK.dtype is torch.int64), topk_weights=weights_TK, map=expert_map,
        factor=scaling_factor,
    )  # fmt: skip


def _launches(
    family: str,
    values: int | None,
    of_tokens: Tensor,
    choices: Choices,
    tables: RowTables,
    **source: Tensor | float | None,
) -> list[Launch]:
    """``source``: the parameters that say where a token's choices come from."""
    tokens = of_tokens.shape[0]
    choose = {
        **source, "offset": choices.offset, "num_experts": choices.num_experts, "routed": choices.routed,
        "top_k": choices.top_k, "choices": choices.per_token, "tokens": tokens, "weights": tables.weights,
        "counters": tables.counters, "counter_words": tables.counter_words,
    }  # fmt: skip
    place = {
        "offsets": tables.offsets, "items": tables.items, "row_slot": tables.row_slot, "row_token": tables.row_token,
        "row_out": tables.row_out, "slot_row": tables.slot_row,
    }  # fmt: skip
    if tokens <= SMALL_TOKENS:
        received = {"received": tables.received} if family == "place" else {}
        return [Launch(_kernel(f"{family}_small", values), (CLUSTER, 1, 1), {**choose, **place, **received})]
    blocks = min(MAX_BLOCKS, -(-tokens // PASS_TOKENS))
    grid, span = (blocks, 1, 1), -(-tokens // blocks)
    count = {**choose, "span": span, "counts": tables.counts, "slot_row": tables.slot_row}
    place |= {
        "counts": tables.counts, "tokens": tokens, "span": span, "choices": choices.per_token,
        "num_local": choices.num_local, "weights": tables.weights, "received": tables.received,
        "routed": choices.routed,
    }  # fmt: skip
    return [Launch(_kernel(f"{family}_count", values), grid, count), Launch(_kernel("place_rows"), grid, place)]
