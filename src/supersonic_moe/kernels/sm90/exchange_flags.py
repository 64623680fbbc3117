"""Flags of ranks whose GPUs reach each other's memory, NVLink or one GPU: who may be written to, whose rows are there.

Layout
    Each rank has a block of memory that all ranks reach; it starts with WORDS words of 64 bits, zero at first:

        done[r]      rank r has read everything of the exchanges up to this epoch
        written[r]   the rows of rank r for the exchange of this epoch are where they are read
        stop         0, or 1 + the rank that told this one to stop

    A flag is epoch · 2³² + what the exchange carries. Only rank r writes [r], with system release after its data; only
    the owner reads it, with >= and system acquire. Nothing is reset.
Order, on the stream of each rank
    begin(bank)   epoch += 1; tell all: done with the one before; wait until all are done with the last one of this bank
    copies        into this bank, of any rank
    meet()        tell all: written; wait until all have written
    copies        from this bank, of any rank; they end before the next begin
    Without copies, an exchange has several epochs, told and awaited one after the other by the kernels that write and
    read what belongs to them (rank_tokens.py): written[r] is then the last one that rank r has told.
    Epochs live on the device, so all of it can be captured in a CUDA graph; a graph may use the banks in any order.
Limits
    A wait that takes longer than its limit by the clock of the GPU, or whose rank carries something else, tells the
    host (which rank, call, phase, epoch) and the other ranks, then traps: nothing computes on with rows that never
    came. The host tells a wait to stop through the same words, which stay readable after a trap, and a wait that takes
    longer than a moment says there in which call it is.
Cost
    Two launches of one warp, and one way through NVLink, for an exchange.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.jit.spec import KernelSpec

MAX_RANKS = 32
WORDS = 2 * MAX_RANKS + 1
OPCODES = ("STG.E.64.STRONG.SYS", "LDG.E.64.STRONG.SYS", "MEMBAR.ALL.SYS")
SPECS = tuple(
    KernelSpec(name, "exchange_flags.cu", threads=32, opcodes=OPCODES) for name in ("exchange_begin", "exchange_meet")
)
LATE, STOPPED, OTHER_CALL = 1, 2, 3
_WHY, _TOLD, _WAITS_IN, _HOST_WORDS = 0, 6, 7, 8


class Failure(NamedTuple):
    """Of a wait, as the GPU has written it down."""

    why: int
    """LATE, STOPPED or OTHER_CALL."""
    call: int
    phase: int
    peer: int
    """The rank that was waited for, or that told this one to stop."""
    wanted: int
    """Epoch, or the whole flag if OTHER_CALL."""
    seen: int


@functools.cache
def _kernels() -> tuple[Kernel, Kernel]:
    begin, meet = SPECS
    return kernel_of(begin), kernel_of(meet)


class ExchangeFlags:
    """Those of one rank.

    Args:
        blocks: of each rank as seen from here: contiguous uint8 on this rank's device, the first 8·WORDS bytes zero.
        limit_s: seconds that a wait may last.
    """

    def __init__(self, blocks: Sequence[Tensor], rank: int, limit_s: float) -> None:
        device = blocks[rank].device
        self._table = torch.tensor([block.data_ptr() for block in blocks], dtype=torch.int64, device=device)
        self._state = torch.zeros(3, dtype=torch.int64, device=device)  # epoch, and that of each bank
        self._host = torch.zeros(_HOST_WORDS, dtype=torch.int64, pin_memory=True)
        self.same: dict[str, Any] = {
            "words": self._table,
            "rank": rank,
            "ranks": len(blocks),
            "limit_ns": int(limit_s * 1e9),
            "host": self._host.data_ptr(),
            "state": self._state,
        }
        """Arguments of every wait, but for its call and phase."""

    def begin(self, bank: int, call: int, phase: int) -> None:
        """``bank``: 0 or 1."""
        with on_device(self._state):
            _kernels()[0].launch((1, 1, 1), call=call, phase=phase, bank=bank, **self.same)

    def meet(self, kind: int, call: int, phase: int) -> None:
        """``kind``: 32 bits that are the same on all ranks, or a wait fails."""
        with on_device(self._state):
            _kernels()[1].launch((1, 1, 1), call=call, phase=phase, kind=kind, **self.same)

    def mark(self) -> torch.cuda.Event:
        """What the current stream has been given so far."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._state.device))
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._state.device)

    def failure(self) -> Failure | None:
        """Reads the host's memory alone."""
        why, *others = self._host.tolist()[:_TOLD]
        return Failure(why, *others) if why else None

    def waits_in(self) -> int:
        """The call in which the GPU waits for another rank; 0 if it does not, or has only begun."""
        return int(self._host[_WAITS_IN])

    def stop(self, rank: int) -> None:
        """A wait of this rank fails from now on, because of ``rank``."""
        self._host[_TOLD] = 1 + rank
