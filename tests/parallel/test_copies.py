"""What copies beside products touch, on one rank of two whose flags wait for nobody. Bits: test_virtual_ranks.py."""

from __future__ import annotations

import math
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from supersonic_moe.parallel import copies as module
from supersonic_moe.parallel.collectives import Needed
from supersonic_moe.parallel.copies import Copies, bank_of
from supersonic_moe.parallel.push import Push
from supersonic_moe.parallel.symmetric import HEAD, Memory

PLACES, COLUMNS = 5, 8
BANK = bank_of(2, PLACES, 4 * COLUMNS)
AT = 1, "forward dispatch"


def nothing(*_: Any) -> None: ...


def of_rank_0(apart: bool, kind: type[Copies] = Copies) -> Any:
    """Of 1.0 everywhere in the memory of rank 1."""
    blocks = [torch.full(((HEAD + 2 * BANK) // 4,), float(rank)).view(torch.uint8) for rank in range(2)]
    flags, watch = SimpleNamespace(begin=nothing, meet=nothing), SimpleNamespace(enter=nothing, leave=nothing)
    memory = Memory(blocks, flags, None, apart)  # type: ignore[arg-type]
    return kind(memory, 0, PLACES, 4 * COLUMNS, BANK, watch, None)  # type: ignore[arg-type]


def test_what_is_copied_beside_products_lives_until_they_are_joined() -> None:
    """Also where nobody reads it: its memory would be given to others, and rows or a word written into theirs."""
    copies = of_rank_0(apart=True)
    rows, there = copies.gather_in_parts(torch.full((3, COLUMNS), 2.0), PLACES, [[0], [1]], *AT)
    assert rows[:, 0].tolist() == [2, 2, 2, 0, 0, 1, 1, 1, 1, 1]
    assert there is not None
    assert there.tolist() == [0, 1]
    came = [weakref.ref(rows), weakref.ref(there)]
    del rows, there
    assert None not in [t() for t in came]
    copies.join()
    assert [t() for t in came] == [None, None]

    home, sums = copies.departure(PLACES, COLUMNS, torch.float32, *AT), torch.full((PLACES, COLUMNS), 3.0)
    home.send(sums, [1])
    left = weakref.ref(sums)
    del sums
    assert left() is not None
    home.arrived()
    assert left() is None


def test_between_ranks_of_one_gpu_rows_alone_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word behind them: nobody looks at it, and its memory is soon that of something else."""
    copies, written = of_rank_0(apart=False), list[tuple[int, int]]()
    copy_bytes = module.copy_bytes

    def noted(to: int, source: int, count: int, stream: int | None) -> None:
        written.append((to, to + count))
        copy_bytes(to, source, count, stream)

    monkeypatch.setattr(module, "copy_bytes", noted)
    rows, there = copies.gather_in_parts(torch.full((3, COLUMNS), 2.0), PLACES, [[0], [1]], *AT)
    assert there is None
    assert rows[:, 0].tolist() == [2, 2, 2, 0, 0, 1, 1, 1, 1, 1]
    known = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (rows, *copies.memory.blocks)]
    assert all(any(begin <= to and end <= last for begin, last in known) for to, end in written)


def test_in_a_graph_no_product_waits_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied beside it as ever, and the stream waits for them."""
    copies = of_rank_0(apart=True)
    copies._on_gpu = True
    for owner, name, value in (
        (module, "raw_stream", nothing),
        (module, "on_device", lambda _: nullcontext()),
        (torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        monkeypatch.setattr(owner, name, value)
    rows, there = copies.gather_in_parts(torch.full((3, COLUMNS), 2.0), PLACES, [[0], [1]], *AT)
    assert there is None
    came = weakref.ref(rows)
    del rows
    assert came() is not None
    copies.join()
    assert came() is None


def test_what_is_pushed_is_what_some_rank_needs() -> None:
    """Of three tokens rank 1 needs the second, this one the third and of those of rank 1 the last: nothing else is
    written or read.
    """
    push = of_rank_0(False, Push)
    banks = (block[HEAD:].view(torch.float32).view(2, -1)[:, : 2 * PLACES * COLUMNS] for block in push.memory.blocks)
    ours, theirs = (bank.unflatten(1, (2, PLACES, COLUMNS)) for bank in banks)
    ours.fill_(math.nan)
    ours[1, 1, 4] = 6.0  # what rank 1 has pushed
    before = theirs.clone()
    needed = Needed(torch.tensor([[-1, -1], [-1, 6], [2, -1]], dtype=torch.int32))
    needed.rows = torch.tensor([2, PLACES + 4, 2, *[0] * 8], dtype=torch.int32)
    rows = torch.arange(3.0)[:, None].expand(3, COLUMNS)
    needed.zeros = True
    arrived = push.gather(rows, PLACES, 0, *AT, needed)
    assert arrived[:, 0].tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 0, 6]
    before[1, 0, 1] = 1.0
    assert torch.equal(theirs, before) and int(ours.isfinite().sum()) == COLUMNS

    parts = torch.arange(10.0)[:, None].expand(10, COLUMNS)
    home = push.exchange(parts, *AT, None, None, needed)
    before[0, 0, 4] = 9.0
    assert torch.equal(theirs, before)
    assert torch.equal(home.view(2, PLACES, COLUMNS)[0, 2], parts[2]) and int(home.isfinite().sum()) == COLUMNS
