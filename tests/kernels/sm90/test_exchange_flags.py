"""Flags that another GPU or the host reads: written with release and read with acquire, for the whole system."""

from __future__ import annotations

import random
import re

import pytest
import sass
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.nvrtc")

from recorded_launches import recorded_launches  # noqa: F401

from supersonic_moe.jit.spec import resolve
from supersonic_moe.kernels.sm90 import exchange_flags


def test_every_flag_is_written_and_read_by_one_of_two_functions() -> None:
    """``words`` of ranks and the host's: only its details, which WHY publishes, are written plainly."""
    program = resolve(exchange_flags.SPECS[0])
    code = re.sub(r"//[^\n]*", "", program.source + program.headers["exchange/flags.cuh"])
    assert re.findall(r"\b(?:words|host)\[\w*\]? *\[(\w+)\] *=", code) == []
    assert re.findall(r"host\[(\w+)\] *=", code) == ["CALL", "PHASE", "PEER", "WANTED", "SEEN"]
    assert re.findall(r"(\w+)\((?:words|wait\.words)\[\w+\] \+", code) == ["store_release_system"] * 4
    assert re.findall(r"(\w+)\((?:mine|wait\.host) \+", code) == [*["load_acquire_system"] * 3, "store_release_system"]
    header = program.headers["ptx/memory.cuh"]
    assert header.count("st.release.sys.global.u64") == header.count("ld.acquire.sys.global.u64") == 1


def test_the_machine_code_orders_flags_for_the_whole_system() -> None:
    """A flag to the others, the reason to the host and the word that stops them: each behind a barrier of memory. The
    word that says in which call a rank waits, written twice, publishes nothing.
    """
    for kernel in sass.compiled(*exchange_flags.SPECS):
        opcodes = sass.opcodes(kernel.listing)
        assert opcodes["LDG.E.64.STRONG.SYS"] >= 3 and opcodes["BPT.TRAP"] == 1
        assert not any("STRONG.GPU" in opcode for opcode in opcodes)
        order = re.findall(r"MEMBAR\.ALL\.SYS|STG\.E\.64\.STRONG\.SYS", kernel.listing)
        barrier, flag = "MEMBAR.ALL.SYS", "STG.E.64.STRONG.SYS"
        assert order == [barrier, flag, flag, flag, *[barrier, flag] * 2]


def test_launches_have_what_the_kernels_take(launches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **kwargs: zeros(*size, **kwargs))
    blocks = [torch.zeros(1024, dtype=torch.uint8) for _ in range(3)]
    flags = exchange_flags.ExchangeFlags(blocks, 1, 2.5)
    flags.begin(1, 7, 2)
    flags.meet(3 << 29 | 64, 7, 2)
    (begin, grid, told), (meet, _, met) = launches
    assert (begin.spec.name, meet.spec.name, grid) == ("exchange_begin", "exchange_meet", (1, 1, 1))
    same = {"rank": 1, "ranks": 3, "limit_ns": 2_500_000_000, "call": 7, "phase": 2}
    same |= {"words": flags._table.data_ptr(), "host": flags._host.data_ptr(), "state": flags._state.data_ptr()}
    assert told == same | {"bank": 1} and met == same | {"kind": 3 << 29 | 64}
    assert flags._table.tolist() == [block.data_ptr() for block in blocks]
    assert flags.failure() is None
    flags.stop(2)
    assert flags._host.tolist() == [0] * 6 + [3, 0]
    flags._host[:6] = torch.tensor([1, 7, 2, 0, 9, 8])
    assert flags.failure() == exchange_flags.Failure(exchange_flags.LATE, 7, 2, 0, 9, 8)


def test_words_of_the_host_are_those_of_the_kernel() -> None:
    code = resolve(exchange_flags.SPECS[0]).headers["exchange/flags.cuh"]
    numbers = {name: int(value) for name, value in re.findall(r"\b([A-Z_]+) = (\d+)(?=[,;])", code)}
    assert numbers["TOLD"] == exchange_flags._TOLD and numbers["WHY"] == exchange_flags._WHY
    assert numbers["FLAGS"] == exchange_flags.MAX_RANKS
    order = ["WHY", "CALL", "PHASE", "PEER", "WANTED", "SEEN"]
    assert [numbers[name] for name in order] == list(range(len(exchange_flags.Failure._fields)))
    reasons = exchange_flags.LATE, exchange_flags.STOPPED, exchange_flags.OTHER_CALL
    assert tuple(numbers[name] for name in ("LATE", "STOPPED", "OTHER_CALL")) == reasons


@pytest.mark.gpu
def test_two_streams_of_one_gpu_hand_words_to_each_other() -> None:
    """100 exchanges through two banks in a random order, one stream ahead of the other: the first look at the flags."""
    order = random.Random(0)
    head, words = 1024, 4096
    blocks = [torch.zeros(head + 2 * 4 * words, dtype=torch.uint8, device="cuda") for _ in range(2)]
    banks = [
        [block[head + 4 * words * b : head + 4 * words * (b + 1)].view(torch.int32) for block in blocks] for b in (0, 1)
    ]
    flags = [exchange_flags.ExchangeFlags(blocks, rank, 5.0) for rank in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = torch.zeros(2, 100, words, dtype=torch.int32, device="cuda")
    banks[0][0].fill_(7).zero_()  # a first round loads what would otherwise be loaded while a wait runs
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    for rank in range(2):
        with torch.cuda.stream(streams[rank]):
            flags[rank].begin(0, 0, 0)
            streams[rank].synchronize()
            flags[rank].meet(64, 0, 0)
            got[rank, 0].copy_(banks[0][1 - rank])
    torch.cuda.synchronize()
    for number in range(100):
        bank = order.randrange(2)
        for rank in order.sample((0, 1), 2):
            with torch.cuda.stream(streams[rank]):
                flags[rank].begin(bank, number, 0)
                torch.cuda._sleep(order.randrange(100_000))
                banks[bank][rank].fill_(1000 * rank + number)
                flags[rank].meet(64, number, 0)
                got[rank, number].copy_(banks[bank][1 - rank])
    torch.cuda.synchronize()
    assert [flag.failure() for flag in flags] == [None, None]
    numbers = torch.arange(100, dtype=torch.int32, device="cuda")[:, None]
    for rank in range(2):
        wrong = (got[rank] != 1000 * (1 - rank) + numbers).any(1).nonzero().flatten().tolist()
        assert not wrong, f"rank {rank} read other words in exchanges {wrong}"
