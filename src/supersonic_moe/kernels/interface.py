"""What a backend is: one protocol for each thing that it can do. mypy checks every backend against them where
``registry.kernels`` puts it together.

Shapes: T tokens, K choices, P rows of a routing plan (sorted by expert; see ``config/plan.py``), E experts, H hidden, I
intermediate, N1 = 2I (gated) or I, G positions (the rows of each expert, padded to whole blocks of 128). Indices and
offsets are int32. Buffers are undefined in dead rows, those at and past ``expert_offsets[-1]``; nothing reads them.
A dtype that is not named is that of the inputs; "accumulation dtype" is fp32, and fp64 for fp64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.config.router import TopKRouter

# ---- arguments that belong together ----------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """A tensor in e4m3 with the scales of its blocks (``quantization/block_format.py``): it stands for q · scale."""

    q: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


Operand = TypeVar("Operand", Tensor, Quantized)


class Rows(NamedTuple, Generic[Operand]):
    """P rows: those of ``x`` that an index names, or ``x`` as it lies."""

    x: Operand
    """(T, C); (P, C) without an index."""
    gather_index: Tensor | None = None
    """(P,) row -> row of x; -1 for a row of zeros."""

    @property
    def num_rows(self) -> int:
        """P"""
        return self.x.shape[0] if self.gather_index is None else self.gather_index.shape[0]


RANGE_ROWS = 256
"""Rows of a block of :class:`Arrivals` and :class:`RowBlocks`: what a cluster of two blocks computes."""


class Arrivals(NamedTuple):
    """Rows of the first operand that come while a product runs, part by part. Parts have blocks of RANGE_ROWS rows,
    counted from the first row of each expert on, and each block is in one of them: tiles and bits are those of a
    product whose rows lie there.
    """

    begin_PE: Tensor
    """(parts, E) int32, in blocks: part p has the blocks [begin[p, e], end[p, e]) of expert e."""
    end_PE: Tensor
    there_P: Tensor | None
    """(parts,) int32, not 0 once the rows of the part are there. The first part is there when the product starts. None:
    all parts are, after ``wait``.
    """
    wait: Callable[[], None]
    """Makes the current stream wait for all parts: for what does not look at ``there``, or cannot."""


class RowBlocks(NamedTuple):
    """Some of the rows of each expert, in blocks of RANGE_ROWS from its first one on: a part of a product. Parts that
    cover all blocks once give the bits of the whole product.
    """

    begin_E: Tensor
    """int32, in blocks."""
    end_E: Tensor
    after: Callable[[Tensor], None]
    """Called with the result once the part is launched."""


class Gate(NamedTuple):
    """What lies between the two projections, and the order of the columns that it reads."""

    activation: Activation
    layout: GateUpLayout


class UpProjection(NamedTuple, Generic[Operand]):
    """What the first product and the activation read."""

    x: Rows[Operand]
    """P rows of H."""
    w1: Operand
    """(E, N1, H)"""
    b1: Tensor | None
    """(E, N1)"""
    expert_offsets: Tensor
    """(E+1,) expert e owns the rows [expert_offsets[e], expert_offsets[e+1])."""
    row_expert: Tensor
    """(P,) row -> expert; E for dead rows."""
    gate: Gate
    save: bool
    """Whether backward will read Z."""


class DownBackward(NamedTuple, Generic[Operand]):
    """What the backward of the second product and of the activation reads."""

    dout: Rows[Operand]
    """P rows of H."""
    w2: Operand
    """(E, H, I); transposed, (E, I, H), in FP8."""
    z: Operand
    """(P, N1) as ``up_projection`` saved it."""
    b1: Tensor | None
    """(E, N1)"""
    row_scores: Tensor
    """(P,)"""
    expert_offsets: Tensor
    row_expert: Tensor
    gate: Gate


class Into(NamedTuple):
    """Where a weight gradient goes."""

    out: Tensor | None = None
    """A new tensor if None."""
    transposed: bool = False
    """The gradient is stored (E, N, M) instead of (E, M, N)."""
    accumulate: bool = False
    """It is added to what ``out`` holds."""


NEW = Into()


class TokenRows(NamedTuple):
    """The rows of each token, in the order in which they are summed."""

    rows: Tensor
    """(S,) rows of token after token; -1 entries are skipped."""
    offsets: Tensor | None
    """(T+1,) token t has rows[offsets[t]:offsets[t+1]]; None where every token has ``each``."""
    each: int
    num_tokens: int


class Slots(NamedTuple):
    """What a plan is made of: the (token, expert) pairs as the router wrote them, and sizes."""

    ids: Tensor
    """(S,) slot -> expert, int32 or int64."""
    tokens: Tensor | None
    """(S,) slot -> token; None: every token has ``per_token`` slots, one token after the other."""
    per_token: int
    num_tokens: int
    num_experts: int
    tile: int
    """Rows of an expert are padded to a multiple of this."""
    capacity: int
    """P"""


class PlanTensors(NamedTuple):
    """The tensors of a :class:`RoutingPlan` that are made on the device, int32."""

    expert_offsets: Tensor
    """(E+1,)"""
    gather_index: Tensor
    """(P,)"""
    scatter_index: Tensor
    """(P,)"""
    row_expert: Tensor
    """(P,)"""
    reverse_index: Tensor
    """(S,)"""
    counts: Tensor
    """(E,)"""


class Departures(NamedTuple):
    """Copies of tokens for ranks, in order of rank, then token: as many as ``tokens_R`` sums up to, of at most T·R."""

    ids_TK: Tensor
    """int32 experts; -1 where a choice has none."""
    token_M: Tensor
    """int32 token of each copy; -1 where there is none."""
    copy_TR: Tensor
    """int32 copy of each token for each rank; -1 where it does not go."""
    copy_TK: Tensor
    """int32 copy that carries each choice; -1 where it has no expert."""
    tokens_R: Tensor
    """int32 tokens for each rank."""
    rows_E: Tensor
    """int32 or int64 choices of each expert."""


class Sources(NamedTuple):
    """Where the tokens of a plan come from: ``ranks`` ranks, in order, with as many tokens each."""

    rank: int
    """This one."""
    ranks: int
    places: int
    """Tokens of each."""


class PartLimits(NamedTuple):
    """Of :class:`Arrivals`."""

    begin_PE: Tensor
    end_PE: Tensor


class Banks(NamedTuple):
    """Where rows for each rank go in an exchange: ``each`` places of rank after rank."""

    bytes_R: Sequence[Tensor]
    table_R: Tensor
    """(R,) int64 addresses of these, on the device."""
    rank: int
    places: int
    """M of each rank in a call, of which ``each`` travel from ``first`` on."""
    first: int
    each: int


class Rounding(NamedTuple):
    """How token rounding rounds (``routing/token_rounding.py``)."""

    scale: float | None
    """The scaling factor of a sigmoid base router, None for a softmax one."""
    mode: str
    tile: int
    seed: int
    step: Tensor | int


class KeptPairs(NamedTuple):
    """The (token, expert) pairs that token rounding keeps, sorted by token and expert."""

    scores: Tensor
    """(C,) in the accumulation dtype; 0 for what is not in use."""
    experts: Tensor
    """(C,) -1 for what is not in use."""
    token_offsets: Tensor
    """(T+1,) token t has the pairs [token_offsets[t], token_offsets[t+1])."""


class Segments(NamedTuple):
    """The rows of each expert padded to whole blocks of 128 positions."""

    offsets: Tensor
    """(E+1,) expert e owns the positions [offsets[e], offsets[e+1]), a multiple of 128 of them."""
    row_index: Tensor
    """(G,) position -> row of the plan; -1 where there is none, or where it reads no token."""
    token_index: Tensor
    """(G,) position -> token that this row reads; -1 likewise."""
    source: Tensor
    """(G/128,) block of positions -> block that reads the same tokens: block c where its first token is 128 c, else
    itself. Its own source has nothing in front of it, so that what a block holds need be written there only.
    """


class BothOrders(NamedTuple):
    """A tensor quantized twice, for the two kinds of product that read it."""

    rows: Quantized
    """(P, C) with scales (P, C/128), stored transposed: the rows format, in which no row feels its neighbours."""
    columns: Quantized
    """(C, G) with scales (C/128, G/128): transposed, in tiles, its positions those of :class:`Segments`."""


# ---- capabilities ----------------------------------------------------------------------------------------------------


class Routing(Protocol):
    """From logits to scores and to a routing plan."""

    def route_forward(
        self, logits_TE: Tensor, k: int, router: TopKRouter, correction_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(scores (T, K) in the accumulation dtype, ids (T, K) int32), best first; rules: ``routing/topk.py``."""

    def route_backward(
        self, dscores_TK: Tensor, logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, router: TopKRouter
    ) -> Tensor:
        """dlogits (T, E) in the dtype of the logits."""

    def token_rounding_forward(
        self, logits_TE: Tensor, scores_TK: Tensor, ids_TK: Tensor, rounding: Rounding, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(tokens (C), experts (C), scores (C) in the dtype of ``scores_TK``, counts (E), token_offsets (T+1)) with
        C = ``capacity``; rules: ``routing/token_rounding.py``.
        """

    def token_rounding_backward(
        self, dscores_C: Tensor, logits_TE: Tensor, kept: KeptPairs, scale: float | None
    ) -> Tensor:
        """dlogits (T, E) in the dtype of the logits."""

    def switch_loss_forward(self, logits_TE: Tensor, counts_E: Tensor, sigmoid: bool = False) -> Tensor:
        """() in the accumulation dtype. ``sigmoid``: of normalised sigmoids, else of the softmax; definition:
        ``routing/aux_loss.py``.
        """

    def switch_loss_backward(self, dloss: Tensor, logits_TE: Tensor, counts_E: Tensor, sigmoid: bool = False) -> Tensor:
        """dlogits (T, E) in the dtype of the logits."""

    def build_plan(self, slots: Slots) -> PlanTensors:
        """A slot whose expert is outside [0, E), whose token is outside [0, T), or whose row would be past
        ``capacity``, is skipped: its reverse index is -1.
        """

    def departures_everywhere(self, ids_TK: Tensor, num_experts: int, ranks: int, places: int) -> Departures:
        """Of ids int32 or int64, outside [0, E) where a choice has no expert: all tokens go to all ranks, the copy of
        token t for rank r to the place r·places + t.
        """

    def row_parts(self, expert_offsets: Tensor, gather_index: Tensor, sources: Sources) -> PartLimits:
        """The parts of a plan's row blocks: own rows, those of ranks after this one, if there are such ranks, those of
        ranks before it, likewise; which part has a block with rows of two: ``parallel/ranges.py``.
        """

    def push_rows(self, rows_TC: Tensor, copy_TR: Tensor, own_TC: Tensor, to: Banks) -> None:
        """Row t to place t of this rank in the bank of each rank with copy[t, rank] >= 0; for this rank to ``own``."""

    def needed_rows(self, ids_UK: Tensor, experts: int, ranks: int) -> Tensor:
        """(1 + U,) int32: how many tokens have an id in [0, experts), and which, those of all ranks in turn."""

    def push_back(self, rows_UC: Tensor, needed: Tensor, to: Banks) -> None:
        """Of rows r·M + t that ``needed_rows`` names, to place t - ``first`` of this rank in the bank of rank r."""

    def take_rows(self, out_UC: Tensor, needed: Tensor, of: Banks) -> None:
        """What ``push_rows`` of all other ranks has put into the bank of this one, to rows r·M + t likewise."""


class Experts(Protocol):
    """The expert MLPs, forward and backward, in the dtype of the inputs."""

    ALIGNMENT: int
    """Operands start, and step from row to row, at multiples of so many bytes (``kernels/alignment.py``)."""

    def up_projection(self, step: UpProjection[Tensor], arriving: Arrivals | None = None) -> tuple[Tensor, Tensor]:
        """(Z = X · W1ᵀ (P, N1) without the bias, or (0, N1) if not ``save``; A = act(Z + b1) (P, I))."""

    def down_backward(
        self, step: DownBackward[Tensor], arriving: Arrivals | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dZ (P, N1), s · A (P, I), dS (P) in the accumulation dtype, without the part of b2), from dA = dO · W2
        before the score. Rows of score 0 give exact zeros in the first two.
        """

    def grouped_mm(
        self, a: Rows[Tensor], b_EKN: Tensor, expert_offsets: Tensor, parts: Sequence[RowBlocks] = ()
    ) -> Tensor:
        """(P, N): a[row] · b[expert of row]. ``b`` may be a transposed view. ``parts``: in this order, or the whole
        before ``after`` of all.
        """

    def grouped_mm_wgrad(self, a: Rows[Tensor], b_PN: Tensor, expert_offsets: Tensor, into: Into = NEW) -> Tensor:
        """(E, M, N): a[rows of e]ᵀ · b[rows of e], or its transpose (E, N, M); exact zeros for an expert without
        rows.
        """

    def gather_sum(
        self,
        y_PH: Tensor,
        row_scale_P: Tensor | None,
        bias_EH: Tensor | None,
        row_expert_P: Tensor,
        tokens: TokenRows,
        out: Tensor | None = None,
    ) -> Tensor:
        """(T, H): the sum over the token's rows, in order, of scale[row] · (y[row] + bias[expert of row]); 0 for a
        token without rows. Into ``out`` if given.
        """

    def zero_dead_rows(self, y_PN: Tensor, expert_offsets: Tensor) -> None:
        """y[row] = 0 for the rows at and past ``expert_offsets[-1]``, in place."""

    def pick(self, values_N: Tensor, index_P: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(P,) in ``dtype``, by default that of the values: values[index[p]], exactly 0 where index[p] < 0."""

    def row_dot(self, a: Rows[Tensor], b_EH: Tensor, row_expert_P: Tensor, out_P: Tensor) -> None:
        """out[row] += <a[row], b[expert of row]>, in the accumulation dtype; dead rows stay as they are."""

    def segment_sum(self, a: Rows[Tensor], row_scale_P: Tensor | None, expert_offsets: Tensor) -> Tensor:
        """(E, N) in the accumulation dtype: the sum of scale[row] · a[row] over the rows of each expert."""


class Quantizers(Protocol):
    """Passes that quantize, transpose or pad for products in e4m3 (``quantization/block_format.py``)."""

    def quantize_rows(self, x_RC: Tensor, pow2: bool = False, tma: bool = False) -> Quantized:
        """(R, C) with scales (R, C/128). ``tma``: stored transposed, as the loads of rows without an index want them;
        rows that are read through an index want them row by row.
        """

    def dequantize_rows(self, x: Quantized, out_RC: Tensor | None = None) -> Tensor:
        """(R, C) bf16 of rows with scales (R, C/128): code times scale in fp32, rounded once. Into ``out`` if given."""

    def quantize_saved(self, z_RC: Tensor) -> Quantized:
        """(R, C) int8 with the exponents of groups of 1 x 32, four in each word of (R, C/128) int32, stored transposed:
        what backward sees of a pre-activation that is kept in int8.
        """

    def quantize_weights(
        self, weights_ENK: Sequence[Tensor], pow2: bool = False
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each: (q (E, N, K), its transpose (E, K, N), scale (E, N/128, K/128)); the transpose has ``scale.mT``."""

    def quantize_columns(
        self, x_RC: Tensor, index_G: Tensor, pow2: bool = False, tiled: bool = False, segments: Segments | None = None
    ) -> Quantized:
        """(C, G): column g is row index[g] of x, or zeros where index[g] < 0. Scales (C, G/128), or (C/128, G/128)
        where ``tiled``: one for 128 x 128 elements, a single number where a product would else multiply by one for each
        row. ``segments``: whose ``token_index`` is ``index``; blocks that are not their own source, and those behind
        the last segment, may stay undefined then.
        """

    def quantize_both_orders(self, x_RC: Tensor, index_G: Tensor, pow2: bool = False) -> BothOrders:
        """Rows as they lie, and columns as ``quantize_columns(tiled=True)`` gives them. ``index`` holds a row at most
        once; rows that it does not hold are undefined.
        """

    def pad_segments(self, expert_offsets: Tensor, gather_index_P: Tensor, capacity: int) -> Segments:
        """The rows of a plan in positions; G = ``capacity``, which ``padded_capacity`` gives."""


class Fp8Experts(Experts, Quantizers, Protocol):
    """The expert MLPs with products in e4m3; what is stored between them is bf16. Both operands of such a product are
    read along the contraction, so backward takes the weights transposed.
    """

    def grouped_mm_fp8(
        self, a: Rows[Quantized], b_ENK: Quantized, expert_offsets: Tensor, parts: Sequence[RowBlocks] = ()
    ) -> Tensor:
        """(P, N) bf16: a[row] · b[expert of row]ᵀ. ``parts`` as in ``grouped_mm``."""

    def grouped_mm_wgrad_fp8(
        self,
        a_MG: Quantized,
        b_NG: Quantized,
        padded_offsets: Tensor,
        into: Into = NEW,
        source: Tensor | None = None,
    ) -> Tensor:
        """(E, M, N): a[:, positions of e] · b[:, positions of e]ᵀ, or its transpose (E, N, M); exact zeros for an
        expert without positions. ``a`` has a scale for each row and block of positions, ``b`` one for each tile. With
        ``source``, that of :class:`Segments`, a block of positions of ``a`` is read where it says.
        """

    def up_projection_fp8(
        self, step: UpProjection[Quantized], recipe: Fp8Recipe, arriving: Arrivals | None = None
    ) -> tuple[Quantized, Quantized]:
        """(Z as backward will see it, A = act(Z + b1) (P, I)). Of rows that arrive, codes alone: scales are there.

        Z (P, N1) is without the bias: e4m3 with scales, int8 with words of exponents (``quantize_saved``), or bf16 with
        none, (0, N1/128), after ``recipe.save_preactivation``; (0, N1) bf16 if not ``save``, or if backward computes it
        again. All scales are stored transposed.
        """

    def down_backward_fp8(
        self, step: DownBackward[Quantized], arriving: Arrivals | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``down_backward`` with dZ and s · A in bf16."""

    def down_backward_fp8_quantize(
        self, step: DownBackward[Quantized], segments: Segments, pow2: bool, arriving: Arrivals | None = None
    ) -> tuple[BothOrders, Quantized, Tensor]:
        """(dZ (P, N1) and (N1, G), s · A (I, G), dS (P)): ``down_backward_fp8`` in the formats of
        ``quantize_both_orders`` and ``quantize_columns(tiled=True)``.
        """


CAPABILITIES: dict[str, type] = {"routing": Routing, "experts": Experts, "quantizers": Quantizers, "fp8": Fp8Experts}


def functions_of(capability: type) -> list[str]:
    """Names of the functions of a protocol."""
    return [name for name in dir(capability) if not name.startswith("_")]


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend, by capability."""

    routing: Routing
    experts: Experts
    quantizers: Quantizers
    fp8: Fp8Experts | None
    """None: it has no FP8 products."""
