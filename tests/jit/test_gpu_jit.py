"""The JIT on a Hopper GPU: the self test, every instruction wrapper against plain arithmetic, and how kernels are
launched."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the sm90 kernels need compute capability 9.0", allow_module_level=True)

from supersonic_moe.jit import Kernel, KernelSpec, LaunchError, TensorMap, tensor_map
from supersonic_moe.kernels.sm90.launch_probe import SPECS as PROBES
from supersonic_moe.kernels.sm90.launch_probe import measure_launch_overhead
from supersonic_moe.kernels.sm90.self_test import multiply, run_self_test

pytestmark = pytest.mark.gpu

TEST_KERNELS = Path(__file__).parents[1] / "kernels" / "sm90"
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def operands(dtype: torch.dtype, m: int = 192, n: int = 224, k: int = 320) -> tuple[Tensor, Tensor]:
    """Sizes that are multiples of no tile, so that loads and stores cross the edges of all tensors."""
    return torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, k, device="cuda").to(dtype)


def assert_product(c_MN: Tensor, a_MK: Tensor, b_NK: Tensor) -> None:
    expected_MN = a_MK.double() @ b_NK.double().T
    error = ((c_MN.double() - expected_MN).abs().max() / expected_MN.abs().max()).item()
    assert error <= 0.01, error  # NaN, an element that was not written, fails as well


# ---- instructions ----


def test_self_test() -> None:
    result = run_self_test()
    print(result)
    assert result.ok, result.detail
    assert set(result.max_error) == {"bfloat16", "float8_e4m3fn"}


@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    ("dtype", "a_mn_major", "b_mn_major"),
    [(BF16, False, False), (BF16, True, False), (BF16, False, True), (BF16, True, True), (E4M3, False, False)],
    ids=["bf16-KK", "bf16-MK", "bf16-KN", "bf16-MN", "e4m3"],
)
def test_wgmma(width: int, dtype: torch.dtype, a_mn_major: bool, b_mn_major: bool) -> None:
    a_MK, b_NK = operands(dtype)
    a_stored = a_MK.T.contiguous().T if a_mn_major else a_MK
    b_stored = b_NK.T.contiguous().T if b_mn_major else b_NK
    assert_product(multiply(a_stored, b_stored, width, a_mn_major, b_mn_major), a_MK, b_NK)


@pytest.mark.parametrize("rank", [2, 3])
def test_cluster_multicast_store_and_reduce(rank: int) -> None:
    batch = 5
    spec = KernelSpec(
        "multicast", "ptx_multicast.cu", (("RANK", rank),), smem_bytes=12312, cluster=2, root=TEST_KERNELS
    )
    kernel = Kernel(spec)
    x = torch.randn(batch, 64, 64, device="cuda").to(BF16)
    x32 = torch.randint(-9, 9, (batch, 32, 32), device="cuda").float()  # whole numbers: exact in any order
    out = torch.full((2 * batch, 64, 64), float("nan"), dtype=BF16, device="cuda")
    total = torch.ones(1, 32, 32, device="cuda")

    def tiles(tensor: Tensor, rows: int, columns: int) -> TensorMap:
        if rank == 3:
            return tensor_map(tensor, box=(1, rows, columns))
        return tensor_map(tensor.flatten(0, 1), box=(rows, columns))

    maps = {
        "map_in": tiles(x, 32, 64),
        "map_out": tiles(out, 64, 64),
        "map_in32": tiles(x32, 32, 32),
        "map_total": tiles(total, 32, 32),
    }
    kernel.launch((2 * batch, 1, 1), **maps)
    assert torch.equal(out, x.repeat_interleave(2, dim=0))
    assert torch.equal(total[0], 1 + 2 * x32.sum(0))
    with pytest.raises(LaunchError, match="multiple of the cluster size 2"):
        kernel.launch((3, 1, 1), **maps)


def gather_kernel(pdl: bool = False) -> Kernel:
    spec = KernelSpec("gather", "ptx_gather.cu", smem_bytes=40968, pdl=pdl, root=TEST_KERNELS)
    return Kernel(spec)


def test_gather_matrices_formats_and_reduction() -> None:
    rows = torch.randn(100, 64, device="cuda").to(BF16)
    index = torch.randint(0, 100, (64,), dtype=torch.int32, device="cuda")
    index[::7] = -1
    a = torch.where(index[:, None] >= 0, rows[index.clamp(min=0).long()], torch.zeros_like(rows[:64]))
    b = torch.randn(64, 64, device="cuda").to(BF16)
    out = torch.zeros(64, 64, device="cuda")
    transposed, copy = torch.empty_like(b), torch.empty_like(b)
    rounded = torch.empty(64, 64, dtype=E4M3, device="cuda")
    arguments = {
        "map_rows": tensor_map(rows, box=(1, 64)),
        "map_b": tensor_map(b, box=(64, 64)),
        "map_out": tensor_map(out, box=(64, 32)),
        "map_transposed": tensor_map(transposed, box=(64, 64)),
        "index": index,
        "copy": copy,
        "rounded": rounded,
    }
    gather_kernel().launch((1, 1, 1), **arguments)
    assert_product(out, a, b)
    assert torch.equal(copy, a)
    assert torch.equal(transposed, a.T)
    assert torch.equal(rounded.float(), out.to(E4M3).float())

    once = out.clone()
    kernel = gather_kernel(pdl=True)
    for _ in range(3):  # each may start before the one before it ends, and waits for it
        kernel.launch((1, 1, 1), **arguments)
    assert torch.equal(out, once + once + once + once)


def test_a_wait_that_never_ends_becomes_an_error() -> None:
    """In a process of its own: the error destroys the CUDA context."""
    script = f"""
import pathlib, torch
from supersonic_moe.jit import Kernel, KernelSpec
constants = (("WAIT_TIMEOUT_NS", "20000000ull"),)
spec = KernelSpec("deadlock", "ptx_deadlock.cu", constants, threads=64, root=pathlib.Path({str(TEST_KERNELS)!r}))
torch.ones(1, device="cuda")
Kernel(spec).launch((1, 1, 1))
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("stopped:", str(error).splitlines()[0])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.stdout.startswith("stopped: CUDA error"), process.stdout + process.stderr


# ---- launching ----


def test_launch_overhead() -> None:
    overhead = measure_launch_overhead()
    print(overhead)
    assert overhead.tensor_map_us < 25  # the aim is 8; a busy host may be slower


def test_launch_follows_the_current_stream() -> None:
    a_MK, b_NK = operands(BF16)
    multiply(a_MK, b_NK)  # compiled and loaded: what follows only enqueues
    stream, late = torch.cuda.Stream(), torch.zeros_like(a_MK)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 30 ms: a kernel on any other stream would read zeros
        late.copy_(a_MK)
        c_MN = multiply(late, b_NK)
    torch.cuda.current_stream().wait_stream(stream)
    assert_product(c_MN, a_MK, b_NK)


def test_explicit_stream() -> None:
    x, total = torch.zeros(1, 32, 32, device="cuda"), torch.zeros(1, 32, 32, device="cuda")
    big_in = torch.zeros(1, 64, 64, dtype=BF16, device="cuda")
    big_out = torch.empty(2, 64, 64, dtype=BF16, device="cuda")
    kernel = Kernel(KernelSpec("multicast", "ptx_multicast.cu", smem_bytes=12312, cluster=2, root=TEST_KERNELS))
    maps = {
        "map_in": tensor_map(big_in, box=(1, 32, 64)),
        "map_out": tensor_map(big_out, box=(1, 64, 64)),
        "map_in32": tensor_map(x, box=(1, 32, 32)),
        "map_total": tensor_map(total, box=(1, 32, 32)),
    }
    kernel.launch((2, 1, 1), **maps)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
    kernel.launch((2, 1, 1), **maps, stream=stream)
    torch.cuda.synchronize()
    assert torch.equal(total, torch.full_like(total, 2.0))


def test_graph_capture_and_replay() -> None:
    a_MK, b_NK = operands(E4M3)
    multiply(a_MK, b_NK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c_MN = multiply(a_MK, b_NK)
    for _ in range(3):
        a_MK.copy_(operands(E4M3)[0])
        c_MN.fill_(float("nan"))
        graph.replay()
        assert_product(c_MN, a_MK, b_NK)
    first = c_MN.clone()
    graph.replay()
    assert torch.equal(c_MN, first)


def test_two_threads_share_a_kernel() -> None:
    failures: list[BaseException] = []

    def work(m: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    a_MK, b_NK = operands(BF16, m=m)
                    assert_product(multiply(a_MK, b_NK), a_MK, b_NK)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(m,)) for m in (64, 320)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def probe_arguments(x: Tensor | None, **others: object) -> dict[str, object]:
    return {"a": x, "b": x, "c": x, "d": x, "m": 1, "n": 2, "k": 3, "scale": 1.0} | others


def test_cooperative_launch() -> None:
    x = torch.zeros(1, device="cuda")
    kernel, arguments = Kernel(replace(PROBES[0], cooperative=True)), probe_arguments(x)
    kernel.launch((torch.cuda.get_device_properties(0).multi_processor_count, 1, 1), **arguments)
    torch.cuda.synchronize()
    with pytest.raises(LaunchError, match=r"launch_probe failed: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE.*grid"):
        kernel.launch((10**6, 1, 1), **arguments)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(1, device="cuda")
    kernel = Kernel(PROBES[0])
    with pytest.raises(LaunchError, match="b is a tensor on cpu, and the current device is cuda:0"):
        kernel.launch((1, 1, 1), **probe_arguments(x, b=x.cpu()))
    with pytest.raises(LaunchError, match="n takes an int of 32 bits; got the int 1099511627776"):
        kernel.launch((1, 1, 1), **probe_arguments(x, n=2**40))
    with pytest.raises(LaunchError, match=r"got a tensor of torch\.int32"):
        kernel.launch((1, 1, 1), **probe_arguments(x, n=x.int()))
    with pytest.raises(LaunchError, match=r"1 to .* blocks"):
        kernel.launch((1, 70000, 1), **probe_arguments(x))


@pytest.mark.multigpu
def test_two_devices_in_one_process() -> None:
    for device in (1, 0, 1):
        result = run_self_test(device)
        assert result.ok, f"cuda:{device}: {result.detail}"
    a_MK, b_NK = operands(BF16)
    with torch.cuda.device(1), pytest.raises(LaunchError, match="is a tensor on cuda:0"):
        Kernel(PROBES[0]).launch((1, 1, 1), **probe_arguments(None, a=a_MK))
    with torch.cuda.device(1):
        a_on_1, b_on_1 = a_MK.to(1), b_NK.to(1)
        on_1 = multiply(a_on_1, b_on_1)
    assert torch.equal(multiply(a_MK, b_NK), on_1.to(0))
