"""Flags that another GPU or the host reads: written with release and read with acquire, for the whole system."""

from __future__ import annotations

import re

import pytest
import sass

from supersonic_moe.jit.spec import resolve
from supersonic_moe.kernels.sm90 import exchange_flags

pytest.importorskip("cuda.bindings.nvrtc")


def test_every_flag_is_written_and_read_by_one_of_two_functions() -> None:
    """``words`` of ranks and the host's: only its details, which WHY publishes, are written plainly."""
    program = resolve(exchange_flags.SPECS[0])
    code = re.sub(r"//[^\n]*", "", program.source)
    assert re.findall(r"\b(?:words|host)\[\w*\]? *\[(\w+)\] *=", code) == []
    assert re.findall(r"host\[(\w+)\] *=", code) == ["CALL", "PHASE", "PEER", "WANTED", "SEEN"]
    assert re.findall(r"(\w+)\((?:words|wait\.words)\[\w+\] \+", code) == ["store_release_system"] * 3
    assert re.findall(r"(\w+)\((?:mine|wait\.host) \+", code) == [*["load_acquire_system"] * 3, "store_release_system"]
    header = program.headers["ptx/memory.cuh"]
    assert header.count("st.release.sys.global.u64") == header.count("ld.acquire.sys.global.u64") == 1


def test_the_machine_code_orders_flags_for_the_whole_system() -> None:
    """A flag to the others, the reason to the host and the word that stops them: each behind a barrier of memory."""
    for kernel in sass.compiled(*exchange_flags.SPECS):
        opcodes = sass.opcodes(kernel.listing)
        assert opcodes["LDG.E.64.STRONG.SYS"] >= 3 and opcodes["BPT.TRAP"] == 1
        assert not any("STRONG.GPU" in opcode for opcode in opcodes)
        order = re.findall(r"MEMBAR\.ALL\.SYS|STG\.E\.64\.STRONG\.SYS", kernel.listing)
        assert order == ["MEMBAR.ALL.SYS", "STG.E.64.STRONG.SYS"] * 3
