"""Memory that other GPUs read and write while a kernel runs, in the PTX of each kernel that reaches it: its flags by
release and acquire for the whole system, and nothing of it through a cache that does not see what others write.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.nvrtc")

import ptx_flow
from ptx_flow import Access

from supersonic_moe.jit import KernelSpec
from supersonic_moe.jit.spec import resolve
from supersonic_moe.kernels.interface import RANGE_ROWS
from supersonic_moe.kernels.sm90 import (
    down_backward,
    down_backward_fp8_quantize,
    exchange_flags,
    grouped_gemm,
    grouped_gemm_fp8,
    rank_tokens,
    stream_experts,
    up_projection,
    up_projection_fp8,
)

STORE, LOAD = "st.release.sys.global.u64", "ld.acquire.sys.global.u64"
NOTE = "st.relaxed.sys.global.u64"  # to the host, with which nothing is published
OF_RANKS = {spec.name: spec for spec in (*exchange_flags.SPECS, *rank_tokens.SPECS, stream_experts.SPECS[1])}
REGIONS = {  # of the blocks of ranks, by who reads and who writes them
    "exchange_begin": (set(), set()),
    "exchange_meet": (set(), set()),
    "post_tokens": (set(), {"codes_at", "scales_at", "ids_at", "weights_at"}),
    "sum_parts": ({"parts_at"}, set()),
    "stream_experts_ranks": ({"codes_at", "scales_at"}, {"out_at"}),
}
IN_PARTS = {
    spec.source: spec
    for module in (
        down_backward, down_backward_fp8_quantize, grouped_gemm, grouped_gemm_fp8, up_projection, up_projection_fp8
    )
    for spec in module.SPECS
    if ("ROW_BLOCKS", RANGE_ROWS) in spec.constants
}  # fmt: skip


@functools.cache
def found_in(spec: KernelSpec) -> list[Access]:
    return ptx_flow.accesses(ptx_flow.ptx(resolve(spec)), spec)


def regions(access: Access) -> set[str]:
    return {name for name in access.made_of if name.endswith("_at")}


def faults(found: list[Access]) -> list[Access]:
    """Accesses to words of ranks and of the host that are not ordered for the whole system."""
    flags = [a for a in found if "*words" in a.made_of and not regions(a)]
    of_host = [a for a in found if "host" in a.made_of]
    details = [a for a in of_host if a.opcode == "st.global.u64"]  # published by a release behind them
    wrong = [a for a in flags if a.opcode not in (STORE, LOAD)]
    wrong += [a for a in of_host if a.opcode not in (STORE, LOAD, NOTE) and a not in details]
    data = [a for a in found if "*words" in a.made_of and regions(a)]
    return wrong + [
        a for a in data if ".nc" in a.opcode or ".ca" in a.opcode or not a.opcode.startswith(("ld.", "st."))
    ]


@pytest.mark.parametrize("name", OF_RANKS)
def test_flags_of_ranks_and_of_the_host_are_released_and_acquired(name: str) -> None:
    found = found_in(OF_RANKS[name])
    assert faults(found) == []
    flags = Counter(a.opcode for a in found if "*words" in a.made_of and not regions(a))
    assert flags.keys() == {STORE, LOAD} and flags[LOAD] >= 3, "it waits for flags, and tells others to stop"
    of_host = Counter(a.opcode for a in found if "host" in a.made_of)
    assert of_host == {LOAD: 1, STORE: 1, NOTE: 2, "st.global.u64": 5}
    known = [a for a in found if a.made_of & {"*words", "host"}]
    assert [a for a in found if ".sys" in a.opcode and a not in known] == [], "of unknown memory"


@pytest.mark.parametrize("name", OF_RANKS)
def test_regions_are_read_and_written_by_whom_they_are_for(name: str) -> None:
    """The kernel that waits while it runs reads x by loads that see what another GPU has written."""
    data = [a for a in found_in(OF_RANKS[name]) if "*words" in a.made_of and regions(a)]
    reads, writes = ([a for a in data if a.opcode.startswith(kind)] for kind in ("ld.", "st."))
    assert tuple(set().union(*map(regions, some)) for some in (reads, writes)) == REGIONS[name]
    if name == "stream_experts_ranks":
        assert {a.opcode for a in reads} == {"ld.relaxed.sys.global.v4.u32", "ld.relaxed.sys.global.f32"}


@pytest.mark.parametrize("source", IN_PARTS)
def test_rows_that_arrive_are_told_of_by_words_that_are_acquired(source: str) -> None:
    """By a copy engine or another kernel: the word of a part."""
    words = Counter(a.opcode for a in found_in(IN_PARTS[source]) if "arrived" in a.made_of)
    assert words.keys() == {"ld.acquire.sys.global.u32"}


def test_all_products_in_parts_are_there() -> None:
    assert len(IN_PARTS) == 6


@pytest.mark.parametrize(
    ("kernel", "before", "after"),
    [
        ("exchange_meet", STORE, "st.volatile.global.u64"),
        ("exchange_begin", STORE, "st.release.gpu.global.u64"),
        ("sum_parts", LOAD, "ld.relaxed.sys.global.u64"),
        (
            "sum_parts",
            "store_release_system(wait.words[peer] + WRITTEN + wait.rank, epoch << 32)",
            "wait.words[peer][WRITTEN + wait.rank] = epoch << 32",
        ),
        ("post_tokens", "store_release_system(wait.host + WHY, why)", "atomicExch(wait.host + WHY, why)"),
        (
            "sum_parts",
            "*reinterpret_cast<const uint4*>(parts + row * hidden + column)",
            "__ldg(reinterpret_cast<const uint4*>(parts + row * hidden + column))",
        ),
    ],
)
def test_a_weaker_access_is_found(kernel: str, before: str, after: str) -> None:
    spec = OF_RANKS[kernel]
    program = ptx_flow.changed(resolve(spec), before, after)
    assert faults(ptx_flow.accesses(ptx_flow.ptx(program), spec))
