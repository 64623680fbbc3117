"""The chain that every Hopper GEMM here depends on, in one small kernel: TMA load → wgmma → TMA store.

`supersonic-moe doctor` runs it. It is a real, small GEMM, C = A · Bᵀ, so a wrong descriptor, swizzle or barrier phase
shows as a wrong number instead of an argument about one.

Layout (row-major; M = 256, N = 256, K = 512)
    A (M, K) and B (N, K), bf16 or e4m3, K contiguous; C (M, N) bf16. The bf16 kernel also exists for A stored as (K, M)
    and B as (K, N), "MN-major", which weight gradients need.
Tiles
    Two blocks, 128 × BLOCK_N output tiles taken in turn; K in steps of 128 bytes (64 bf16 or 128 e4m3). A stage of the
    ring is 128 rows of A and BLOCK_N of B, 128 bytes each, 128-byte swizzle. Two stages, so that with 8 (bf16) or 4
    (e4m3) steps a tile, and two or more tiles a block, every barrier goes through many phases. One thread loads; two
    warpgroups multiply 64 rows each.
Maths
    fp32 accumulation in the tensor core (about 14 bits for e4m3), one rounding to bf16. The truth is the fp64 product
    on the CPU of the same, already rounded, inputs.
Cost
    2·M·N·K = 67 MFLOP, (M + N)·K·(2 or 1) + 2·M·N = 640 or 384 KiB: microseconds. It measures nothing.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from supersonic_moe.jit.launch import kernel_of
from supersonic_moe.jit.nvrtc import JitError
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map

M, N, K = 256, 256, 512
BLOCK_M, STAGES, BLOCKS = 128, 2, 2
LINE_BYTES = 128
SLAB = 64  # elements of M or N in one line of an MN-major tile
BARRIER_BYTES = 8
TOLERANCE = 0.01  # of max |C|; bf16 rounding gives 0.002, a misplaced tile about 1


@dataclass(frozen=True)
class SelfTestResult:
    """Whether the chain works, and how well: largest |error| / max |C| for each dtype, and the seconds spent
    compiling."""

    ok: bool
    detail: str
    compile_s: float = 0.0
    max_error: dict[str, float] = field(default_factory=dict)


def self_test_spec(
    dtype: torch.dtype, block_n: int = 128, a_mn_major: bool = False, b_mn_major: bool = False
) -> KernelSpec:
    """The configuration for one operand type, tile width and layout; `SPECS` has the two that `doctor` runs."""
    e4m3 = dtype == torch.float8_e4m3fn
    block_k = LINE_BYTES // dtype.itemsize
    bytes_b = -(-block_n // SLAB) * block_k * LINE_BYTES if b_mn_major else block_n * LINE_BYTES
    stage_bytes = BLOCK_M * LINE_BYTES + bytes_b
    return KernelSpec(
        name="self_test",
        source="self_test.cu",
        constants=(
            ("E4M3", int(e4m3)),
            ("BLOCK_N", block_n),
            ("A_MN_MAJOR", int(a_mn_major)),
            ("B_MN_MAJOR", int(b_mn_major)),
            ("STAGES", STAGES),
        ),
        threads=384,
        smem_bytes=STAGES * stage_bytes + BLOCK_M * block_n * 2 + 2 * STAGES * BARRIER_BYTES,
        opcodes=("QGMMA" if e4m3 else "HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM"),
    )


SPECS = (self_test_spec(torch.bfloat16), self_test_spec(torch.float8_e4m3fn))


def multiply(
    a_MK: Tensor, b_NK: Tensor, block_n: int = 128, a_mn_major: bool = False, b_mn_major: bool = False
) -> Tensor:
    """C (M, N) = A · Bᵀ by the self-test kernel; an MN-major operand is passed transposed in memory:
    `a.T.contiguous().T`."""
    dtype = a_MK.dtype
    block_k = LINE_BYTES // dtype.itemsize
    (rows, depth), columns = a_MK.shape, b_NK.shape[0]
    c_MN = torch.full((rows, columns), float("nan"), dtype=torch.bfloat16, device=a_MK.device)
    map_a = _operand_map(a_MK, BLOCK_M, block_k, a_mn_major)
    map_b = _operand_map(b_NK, block_n, block_k, b_mn_major)
    map_c = tensor_map(c_MN, box=(64, 32), swizzle=64)
    tiles_m, tiles_n = -(-rows // BLOCK_M), -(-columns // block_n)
    kernel = kernel_of(self_test_spec(dtype, block_n, a_mn_major, b_mn_major))
    kernel.launch(
        (BLOCKS, 1, 1),
        map_a=map_a,
        map_b=map_b,
        map_c=map_c,
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        blocks_k=-(-depth // block_k),
    )
    return c_MN


def _operand_map(x_XK: Tensor, block_x: int, block_k: int, mn_major: bool) -> TensorMap:
    if mn_major:
        return tensor_map(x_XK.T, box=(block_k, SLAB))
    return tensor_map(x_XK, box=(block_x, block_k))


def run_self_test(device: int | torch.device = 0) -> SelfTestResult:
    """Compile, run and check both kernels on `device`; never raises for a fault of the machine, the result says what is
    wrong."""
    try:
        with torch.cuda.device(device):
            major, minor = torch.cuda.get_device_capability()
            if (major, minor) != (9, 0):
                return SelfTestResult(
                    False, f"the sm90 kernels need compute capability 9.0 (H100, H200), this GPU has {major}.{minor}"
                )
            reports = [kernel_of(spec).cubin for spec in SPECS]
            compile_s = sum(cubin.report.seconds for cubin in reports if cubin.origin == "compiled")
            errors = {
                str(dtype).removeprefix("torch."): _error(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)
            }
    except (JitError, RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        return SelfTestResult(False, f"{type(error).__name__}: {error}")
    wrong = [f"{name} is off by {error:.3g} of max |C|" for name, error in errors.items() if not error <= TOLERANCE]
    detail = "; ".join(wrong) or "TMA load, wgmma (bf16, e4m3) and TMA store give the fp64 product"
    return SelfTestResult(not wrong, detail, compile_s, errors)


def _error(dtype: torch.dtype) -> float:
    """Largest |C - fp64 product| / max |product| on random input; NaN where an element was not written."""
    generator = torch.Generator().manual_seed(0)
    a_MK = torch.randn(M, K, generator=generator).to(dtype)
    b_NK = torch.randn(N, K, generator=generator).to(dtype)
    expected_MN = a_MK.double() @ b_NK.double().T
    actual_MN = multiply(a_MK.cuda(), b_NK.cuda()).cpu().double()
    return float((actual_MN - expected_MN).abs().max() / expected_MN.abs().max())
