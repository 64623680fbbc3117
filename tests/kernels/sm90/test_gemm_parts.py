"""Parts of kernels/sm90 in configurations and with policies that no kernel of the package has yet: they compile, spill
nothing, and contain the instruction that the configuration names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from sass import compiled

from supersonic_moe.jit import CompileError, KernelSpec
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import CubinCache
from supersonic_moe.kernels.sm90.grouped_gemm import SPECS

FOLDER = Path(__file__).parent
SCHEDULES = {
    "all": "AllTiles<C>{}",
    "row_blocks": "RowBlocks<C>(policies.begin_block, policies.end_block, policies.arrived, 2, C.block_m * C.cluster)",
    "counter": "TileCounter<C>{policies.counter}",
}
READINESS = {"start": "ReadyAtStart{}", "count": "ReadyByCount{policies.arrived, policies.expected, 128}"}
E4M3 = ".operand = Operand::E4M3"


def plain(
    config: str, other: str = "", *, mn_major: bool = False, schedule: str = "all", ready: str = "start"
) -> KernelSpec:
    constants = (
        ("CONFIG_A", config),
        *((("CONFIG_B", other),) if other else ()),
        ("B_MN_MAJOR", int(mn_major)),
        ("SCHEDULE", SCHEDULES[schedule]),
        ("READY", READINESS[ready]),
    )
    return KernelSpec("plain_a", "gemm_parts.cu", constants=constants, root=FOLDER)


def gradient(config: str, *, schedule: str = "all") -> KernelSpec:
    constants = (("CONFIG_A", config), ("SCHEDULE", SCHEDULES[schedule]))
    return KernelSpec("gradient_a", "gradient_parts.cu", constants=constants, root=FOLDER)


# Each with the instruction that multiplies.
CONFIGURATIONS = [
    *((plain(f".block_n = {n}, .stages = 6"), f"HGMMA.64x{n}x16") for n in (8, 16, 24, 32, 64, 152)),
    (plain(".block_n = 64, .stages = 6", mn_major=True), "HGMMA.64x64x16"),
    (plain(".block_n = 256, .stages = 4, .block_m = 64"), "HGMMA.64x256x16"),
    (plain(".block_n = 32, .stages = 8, .block_m = 64, .gather = true"), "HGMMA.64x32x16"),
    (plain(".block_n = 256, .stages = 4, .mma_n = 128, .cluster = 2"), "HGMMA.64x128x16"),
    *((plain(f".block_n = {n}, .stages = 4, {E4M3}"), f"QGMMA.64x{n}x32") for n in (8, 64)),
    (plain(f".block_n = 256, .stages = 3, .block_m = 64, {E4M3}, .gather = true"), "QGMMA.64x128x32"),
    (gradient(".block_n = 64, .stages = 4, .block_m = 64"), "HGMMA.64x64x16"),
    (gradient(".block_n = 256, .stages = 4, .block_m = 64, .gather = true"), "HGMMA.64x256x16"),
]

PLAIN = ".block_n = 256, .stages = 4"
PLAIN_FP8 = f".block_n = 256, .stages = 3, {E4M3}"
GATHERING = f"{PLAIN_FP8}, .cluster = 2, .gather = true, .share_a = true"
POLICIES = [
    (plain(f"{PLAIN}, .cluster = 2", schedule="row_blocks"), "HGMMA"),
    (plain(PLAIN, schedule="counter"), "ATOMG"),
    (plain(f"{PLAIN}, .cluster = 2, .gather = true", ready="count"), "LDG.E.STRONG.SYS"),
    (plain(PLAIN_FP8, schedule="row_blocks"), "QGMMA"),
    (plain(PLAIN_FP8, schedule="counter", ready="count"), "ATOMG"),
    (plain(GATHERING, schedule="row_blocks", ready="count"), "LDG.E.STRONG.SYS"),
    (gradient(f"{PLAIN}, .cluster = 2, .gather = true", schedule="row_blocks"), "HGMMA"),
    (gradient(PLAIN_FP8, schedule="row_blocks"), "QGMMA"),
    (gradient(PLAIN_FP8, schedule="counter"), "ATOMG"),
]


@pytest.mark.parametrize("cases", [CONFIGURATIONS, POLICIES], ids=["configurations", "policies"])
def test_parts_compile_without_spills(cases: list[tuple[KernelSpec, str]]) -> None:
    compiled(*(replace(spec, opcodes=(instruction,)) for spec, instruction in cases))


def test_rows_that_arrive_late_are_not_read_through_the_read_only_cache() -> None:
    config = f"{PLAIN}, .cluster = 2, .gather = true"
    start, count = compiled(plain(config), plain(config, ready="count"))
    assert "LDG.E.CONSTANT" in start.listing and "LDG.E.CONSTANT" not in count.listing


def test_two_configurations_in_one_translation_unit() -> None:
    (both,) = compiled(plain(f"{PLAIN}, .cluster = 2, .gather = true", GATHERING))
    multiplies = {name: set(re.findall("[HQ]GMMA", listing)) for name, listing in both.listings.items()}
    assert multiplies == {"plain_a": {"HGMMA"}, "plain_b": {"QGMMA"}}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (".block_n = 260, .stages = 2", "wgmma has 8 to 256 columns"),
        (".block_n = 64, .stages = 2, .math_groups = 1", "a math warpgroup owns 64 rows"),
        (".block_n = 64, .stages = 2, .share_a = true", "only gathered rows are shared"),
        (f".block_n = 96, .stages = 2, {E4M3}", "a part has one scale of B"),
        (".block_n = 256, .stages = 2", "the loading warps keep a stage"),
    ],
)
def test_configurations_that_do_not_exist_say_so(config: str, sentence: str) -> None:
    with pytest.raises(CompileError, match=sentence):
        build(plain(config), CubinCache(None))


def test_host_and_device_must_agree_on_shared_memory() -> None:
    spec = SPECS[0]
    wrong = tuple((name, int(value) + 16 if name == "SMEM_BYTES" else value) for name, value in spec.constants)
    with pytest.raises(CompileError, match="the host reserves another number of bytes"):
        build(replace(spec, constants=wrong), CubinCache(None))
