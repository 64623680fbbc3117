"""Routing metadata: which row of the expert-sorted buffers belongs to which token.

Three index spaces:

* **token** t in [0, T): a row of x.
* **slot** s in [0, S): one (token, choice) pair as the router wrote it; for top-k routing s = t * K + j, so flat
  scores are slot-indexed.
* **row** r in [0, P): a row of the expert-sorted buffers. Expert e owns rows [expert_offsets[e], expert_offsets[e+1]);
  within an expert rows keep slot order (a stable counting sort), which makes every sum over rows deterministic.

``P`` (``capacity``) is an upper bound known on the host; how many rows are in use is known on the device only. Rows
come in three kinds: real rows; *padding* rows, which round an expert's segment up to ``tile`` (empty experts stay
empty); and *dead* rows past the last segment. Padding and dead rows read no token (``gather_index`` -1, loads give
zeros), have score 0 and are read by no token, so they add exactly zero to every output and gradient, even where x holds
NaN. Slots whose expert id is outside [0, E) (-1 or an expert-parallel sentinel) get no row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Device metadata of one routing decision; all tensors int32. See the module docstring for the index spaces."""

    num_tokens: int
    num_experts: int
    capacity: int
    """Rows allocated (P)."""
    tile: int
    """Segments are padded to a multiple of this; 1 means no padding."""
    expert_offsets: Tensor
    """(E+1,) row segments of the experts, padding included."""
    gather_index: Tensor
    """(P,) row -> token; -1 for padding and dead rows."""
    scatter_index: Tensor
    """(P,) row -> slot; -1 for padding and dead rows."""
    row_expert: Tensor
    """(P,) row -> expert; dead rows have E."""
    reverse_index: Tensor
    """(S,) slot -> row; -1 for skipped slots."""
    counts: Tensor | None
    """(E,) real rows of each expert, padding excluded; None where they are the differences of ``expert_offsets``."""
    token_rows: Tensor
    """(S,) the rows of each token, in the order in which they are summed; -1 entries are skipped."""
    token_offsets: Tensor | None
    """(T+1,) the rows of token t are token_rows[token_offsets[t]:token_offsets[t+1]]; None where every token has S/T
    slots.
    """
    identity: bool = False
    """Rows are the tokens themselves (already dispatched): nothing needs gathering."""

    @property
    def num_slots(self) -> int:
        return self.reverse_index.shape[0]

    @property
    def slots_per_token(self) -> int:
        return self.num_slots // self.num_tokens if self.token_offsets is None and self.num_tokens else 0

    @property
    def expert_counts(self) -> Tensor:
        """(E,) int32 real rows of each expert, padding excluded."""
        return self.expert_offsets.diff() if self.counts is None else self.counts
