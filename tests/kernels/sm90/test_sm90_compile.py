"""Every CUDA kernel configuration compiles for sm_90a without a GPU: no spill, no stack, and the instructions it is
about."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from supersonic_moe.jit import CompileError, KernelSpec, SpecError, compile_all
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import CubinCache
from supersonic_moe.jit.nvrtc import parse_ptxas_log
from supersonic_moe.kernels.sm90 import registered_specs
from supersonic_moe.kernels.sm90.gemm_config import tile_columns
from supersonic_moe.kernels.sm90.self_test import self_test_spec

# The first test compiles what all of them look at: three to five minutes of two cores, more where the cores are shared.
pytestmark = pytest.mark.timeout(1500)

TEST_KERNELS = Path(__file__).parent

# The wgmma wrappers at every width in each type, and every pair of layouts.
WIDTHS = (64, 96, 128, 192, 256)
WGMMA_SPECS = [
    *(self_test_spec(torch.bfloat16, width, mn_major, mn_major) for width in WIDTHS for mn_major in (False, True)),
    self_test_spec(torch.bfloat16, 128, a_mn_major=True),
    self_test_spec(torch.bfloat16, 128, b_mn_major=True),
    *(self_test_spec(torch.float8_e4m3fn, width) for width in WIDTHS),
]

# The other wrappers, in 2D and 3D, and the instructions that they must become.
WRAPPER_OPCODES = {
    "multicast": (
        *("UTMALDG.{rank}D.MULTICAST", "UTMALDG.{rank}D", "UTMASTG.{rank}D", "UTMAREDG.{rank}D.ADD"),
        *("UTMACMDFLUSH", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS.ARRIVE.TRANS64.RED"),
    ),
    "gather": (
        *("UTMALDG.2D", "HGMMA", "LDSM.16.MT88.4", "LDSM.16.M88.4", "STSM.16.MT88.4"),
        *("F2FP.SATFINITE.E4M3", "FENCE.VIEW.ASYNC", "ACQBULK", "PREEXIT"),
    ),
    "deadlock": ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "BPT.TRAP", "BAR.ARV"),
}
WRAPPER_SPECS = [
    KernelSpec(
        name,
        "ptx_wrappers.cu",
        constants=(("RANK", rank),),
        opcodes=tuple(opcode.format(rank=rank) for opcode in opcodes),
        root=TEST_KERNELS,
    )
    for name, opcodes in WRAPPER_OPCODES.items()
    for rank in (2, 3)
]


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> CubinCache:
    cache = CubinCache(tmp_path_factory.mktemp("cubins"))
    failed = [result for result in compile_all(registered_specs(), cache=cache) if result.error]
    assert not failed, "\n".join(f"{result.spec}: {result.error}" for result in failed)
    return cache


@pytest.mark.parametrize("spec", [*registered_specs(), *WGMMA_SPECS, *WRAPPER_SPECS], ids=str)
def test_compiles_without_spills_to_the_expected_instructions(spec: KernelSpec, cubins: CubinCache) -> None:
    cubin = build(spec, cubins)
    resources = cubin.report.kernel(spec.name)
    assert cubin.report.remarks == ()
    assert (resources.spill_store_bytes, resources.spill_load_bytes, resources.stack_bytes) == (0, 0, 0)
    assert resources.registers * spec.threads <= 64 * 1024
    opcodes = disassemble(cubin.image)[spec.name]
    missing = [wanted for wanted in spec.opcodes if not any(opcode.startswith(wanted) for opcode in opcodes)]
    assert not missing, f"{spec} has no {missing} in its SASS; it has {sorted(opcodes)}"


@pytest.mark.parametrize("spec", WGMMA_SPECS, ids=str)
def test_wgmma_has_the_width_and_layout_it_is_named_for(spec: KernelSpec, cubins: CubinCache) -> None:
    constants = dict(spec.constants)
    name, step = ("QGMMA", 32) if constants["E4M3"] else ("HGMMA", 16)
    shape = f"{name}.64x{constants['BLOCK_N']}x{step}.F32"
    lines = [line for line in sass(build(spec, cubins).image).splitlines() if "GMMA" in line]
    assert len(lines) >= 4 and all(shape in line for line in lines), lines
    for operand, flag in (("A_MN_MAJOR", ".tnspA"), ("B_MN_MAJOR", ".tnspB")):
        assert all((flag in line) == bool(constants[operand]) for line in lines), (operand, lines)


@pytest.mark.parametrize(
    ("columns", "depth", "tile"),
    [(3072, 4096, 384), (3072, 4095, 256), (2048, 8192, 256), (4096, 4096, 384), (384, 9000, 384), (8, 9000, 256)],
)
def test_wide_tiles_are_for_deep_products_that_fill_them(columns: int, depth: int, tile: int) -> None:
    assert tile_columns(columns, depth) == tile


def test_registers_are_reallocated_at_the_limit_that_three_warpgroups_start_with(cubins: CubinCache) -> None:
    """ptxas reports 168 = 65536 / 384 registers, not what it needs: the sign that it honours setmaxnreg."""
    for spec in registered_specs():
        if spec.name == "self_test":
            assert build(spec, cubins).report.kernel("self_test").registers == 168


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
ptxas info    : Function properties for helper
ptxas         .     32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
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


@functools.lru_cache(maxsize=64)
def sass(cubin: bytes) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton wheel ships no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "--dump-sass", file.name], capture_output=True, check=True, text=True).stdout


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)")


def disassemble(cubin: bytes) -> dict[str, set[str]]:
    """Instructions of each kernel: the text of cuobjdump, one "Function : name" section for each."""
    _, *sections = re.split(r"Function : (\w+)", sass(cubin))
    return {name: set(_INSTRUCTION.findall(text)) for name, text in zip(sections[::2], sections[1::2], strict=True)}
