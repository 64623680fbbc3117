"""Every CUDA kernel configuration compiles for sm_90a without a GPU: no spill, no stack, and the instructions it is
about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

import sass_table
from sass import compiled

from supersonic_moe.jit import CompileError, KernelSpec, SpecError, nvrtc_version
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import CubinCache
from supersonic_moe.jit.nvrtc import parse_ptxas_log
from supersonic_moe.kernels.sm90 import registered_specs
from supersonic_moe.kernels.sm90.gemm_config import tile_columns
from supersonic_moe.kernels.sm90.self_test import self_test_spec

TEST_KERNELS = Path(__file__).parent

# The wgmma wrappers at every width in each type, and every pair of layouts.
WIDTHS = (64, 96, 128, 192, 256)
WGMMA_SPECS = [
    *(self_test_spec(torch.bfloat16, width, mn_major, mn_major) for width in WIDTHS for mn_major in (False, True)),
    self_test_spec(torch.bfloat16, 128, a_mn_major=True),
    self_test_spec(torch.bfloat16, 128, b_mn_major=True),
    *(self_test_spec(torch.float8_e4m3fn, width) for width in WIDTHS),
]


def wrapper_spec(name: str, *opcodes: str, **constants: int) -> KernelSpec:
    return KernelSpec(name, f"ptx_{name}.cu", tuple(constants.items()), opcodes=opcodes, root=TEST_KERNELS)


# The other wrappers, and the instructions that they must become.
WRAPPER_SPECS = [
    *(
        wrapper_spec(
            "multicast",
            *(f"UTMALDG.{rank}D.MULTICAST", f"UTMALDG.{rank}D", f"UTMASTG.{rank}D", f"UTMAREDG.{rank}D.ADD"),
            *("UTMACMDFLUSH", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS.ARRIVE.TRANS64.RED"),
            RANK=rank,
        )
        for rank in (2, 3)
    ),
    wrapper_spec(
        "gather",
        *("UTMALDG.2D", "HGMMA", "LDSM.16.MT88.4", "LDSM.16.M88.4", "STSM.16.MT88.4"),
        *("F2FP.SATFINITE.E4M3", "FENCE.VIEW.ASYNC", "ACQBULK", "PREEXIT"),
    ),
    wrapper_spec("deadlock", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BPT.TRAP", "BAR.ARV"),
]

NVRTC_OF_THE_TABLE, TABLE = sass_table.load()

SHIPPED = registered_specs()
if not torch.cuda.is_available():  # a machine with a GPU needs them all
    SHIPPED = sass_table.to_compile(SHIPPED, sass_table.load_digests())
TOGETHER = 12
"""Kernels of one test: one call of the disassembler, and 20 to 40 s in all."""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(SHIPPED), TOGETHER), ids=lambda first: f"{SHIPPED[first].name}-{first}")
def test_shipped_kernels_are_what_the_table_says(first: int) -> None:
    moved = {}
    for kernel in compiled(*SHIPPED[first : first + TOGETHER]):
        row, name = sass_table.row(kernel), str(kernel.spec)
        if nvrtc_version() == NVRTC_OF_THE_TABLE and (changes := sass_table.moved(row, TABLE.get(name, {}))):
            moved[name] = changes
    assert not moved, (
        f"other code than {sass_table.FILE.name} says: {moved}. If that is meant, write down why and accept it with "
        "`make sass-table`"
    )


def test_the_table_lists_the_shipped_kernels_and_is_of_this_compiler() -> None:
    differ = set(TABLE) ^ {str(spec) for spec in registered_specs()}
    assert not differ, f"only {sass_table.FILE.name} or only the package has {differ}; run `make sass-table`"
    if nvrtc_version() != NVRTC_OF_THE_TABLE:
        pytest.skip(f"the table is that of NVRTC {NVRTC_OF_THE_TABLE}, this is {nvrtc_version()}: nothing was compared")


def test_what_is_compiled_again(tmp_path: Path) -> None:
    """Another source, another promise; and of the rest about one in sixteen."""
    spec = write_kernel(tmp_path, 'extern "C" __global__ void k() {}', "k")
    specs = [replace(spec, constants=(("I", i),)) for i in range(160)]
    digests = {str(spec): sass_table.digest(spec) for spec in specs}
    again = sass_table.to_compile(specs, digests)
    assert 2 < len(again) < 25
    kept = next(spec for spec in specs if spec not in again)
    assert sass_table.to_compile([replace(kept, opcodes=("HGMMA",))], digests)
    assert sass_table.to_compile([replace(kept, threads=2 * kept.threads)], digests)
    (tmp_path / "kernel.cu").write_text("changed")
    assert sass_table.to_compile(specs, digests) == specs


def test_what_counts_as_a_change() -> None:
    row = {"registers": 168, "instructions": 1000, "HGMMA": 16, "SHFL": 4}
    assert sass_table.moved({**row, "instructions": 1010}, row) == []
    assert sass_table.moved({**row, "instructions": 989}, row) == ["instructions 1000 -> 989 (-1.1%)"]
    assert sass_table.moved({**row, "SHFL": 5, "STL": 1}, row) == ["SHFL 4 -> 5 (+25.0%)", "STL 0 -> 1"]
    assert sass_table.moved({**row, "registers": 160, "HGMMA": 0}, row) == [
        "registers 168 -> 160 (-4.8%)",
        "HGMMA 16 -> 0 (-100.0%)",
    ]


def test_wgmma_has_the_width_and_layout_it_is_named_for() -> None:
    for kernel in compiled(*WGMMA_SPECS):
        constants = dict(kernel.spec.constants)
        name, step = ("QGMMA", 32) if constants["E4M3"] else ("HGMMA", 16)
        shape = f"{name}.64x{constants['BLOCK_N']}x{step}.F32"
        lines = [line for line in kernel.listing.splitlines() if "GMMA" in line]
        assert len(lines) >= 4 and all(shape in line for line in lines), lines
        for operand, flag in (("A_MN_MAJOR", ".tnspA"), ("B_MN_MAJOR", ".tnspB")):
            assert all((flag in line) == bool(constants[operand]) for line in lines), (operand, lines)


def test_wrappers_become_the_instructions_they_are_named_for() -> None:
    compiled(*WRAPPER_SPECS)


@pytest.mark.parametrize(
    ("columns", "depth", "tile"),
    [
        *((3072, 4096, 384), (3072, 4095, 256), (2048, 8192, 256), (4096, 4096, 384), (384, 9000, 384), (8, 9000, 256)),
        *((2880, 512, 320), (2880, 5760, 320), (1856, 384, 320), (264, 64, 320), (2688, 64, 256), (1280, 64, 256)),
    ],
)
def test_wide_tiles_are_for_products_that_fill_them(columns: int, depth: int, tile: int) -> None:
    assert tile_columns(columns, depth) == tile


def test_a_compile_error_carries_the_log(tmp_path: Path) -> None:
    spec = write_kernel(tmp_path, 'extern "C" __global__ void broken(int* x) { x[0] = missing; }', "broken")
    with pytest.raises(CompileError, match='identifier "missing" is undefined'):
        build(spec, CubinCache(None))


def test_a_performance_remark_is_an_error(tmp_path: Path) -> None:
    body = 'asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");'
    spec = write_kernel(tmp_path, f'extern "C" __global__ void slow(int* x) {{ {body} x[0] = 1; }}', "slow")
    with pytest.raises(CompileError, match="C7508"):
        build(spec, CubinCache(None))
    capped = f'extern "C" __global__ void __launch_bounds__(128, 1) slow(int* x) {{ {body} x[0] = 1; }}'
    assert build(write_kernel(tmp_path, capped, "slow"), CubinCache(None)).report.remarks == ()


def test_log_parser_keeps_kernels_apart() -> None:
    log = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a call
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for helper
ptxas         .     32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""
    report = parse_ptxas_log(log)
    first, second = report.kernel("first"), report.kernel("second")
    assert (first.registers, first.stack_bytes, first.spill_store_bytes, first.spill_load_bytes) == (255, 16, 8, 12)
    assert (first.static_smem_bytes, second.registers, second.stack_bytes, second.static_smem_bytes) == (1024, 24, 0, 0)
    assert len(report.remarks) == 1 and "C7510" in report.remarks[0]
    with pytest.raises(KeyError, match="third"):
        report.kernel("third")


def test_specs_refuse_what_cannot_be_launched() -> None:
    spec = registered_specs()[0]
    for change, words in (
        ({"threads": 100}, "multiple of 32"),
        ({"threads": 2048}, "multiple of 32"),
        ({"smem_bytes": 232449}, "232448 bytes"),
        ({"cluster": 16}, "1 to 8 blocks"),
    ):
        with pytest.raises(SpecError, match=words):
            replace(spec, **change)


def test_kernels_are_closed_under_their_includes(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"<cuda_bf16.h>.*only headers of their own folder"):
        build(write_kernel(tmp_path, "#include <cuda_bf16.h>\n", "k"), CubinCache(None))
    with pytest.raises(SpecError, match=r"cannot read .*absent.cuh \(included by kernel.cu\)"):
        build(write_kernel(tmp_path, '#include "absent.cuh"\n', "k"), CubinCache(None))


def write_kernel(folder: Path, text: str, name: str) -> KernelSpec:
    (folder / "kernel.cu").write_text(text)
    return KernelSpec(name, "kernel.cu", root=folder)
