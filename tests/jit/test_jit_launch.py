"""Launching and tensor maps without a GPU: what the driver would be handed, and what is refused before it."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from supersonic_moe.jit import Kernel, KernelSpec, LaunchError, SpecError, TensorMapError, signature, tensor_map
from supersonic_moe.jit import build as build_module
from supersonic_moe.jit import driver as driver_module
from supersonic_moe.jit import launch as launch_module
from supersonic_moe.jit import tma as tma_module
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import CubinCache, encode_entry, entry_name
from supersonic_moe.jit.launch import kernel_of, on_device
from supersonic_moe.jit.spec import KERNEL_ROOT, resolve


@pytest.fixture
def spec(tmp_path: Path) -> KernelSpec:
    (tmp_path / "scale.cu").write_text(SCALE)
    return KernelSpec("scale", "scale.cu", root=tmp_path)


# ---- signatures ------------------------------------------------------------------------------------------------------

SCALE = """
struct alignas(64) TensorMap { unsigned char bytes[128]; };
using i32 = int;  // extern "C" __global__ void scale(double no)
extern "C" __global__ void __launch_bounds__(32 * (1 + 3), 1)
    scale(const __grid_constant__ TensorMap map,  /* read, by TMA */
          int* x, const i32 n) { x[n] *= 2; }
"""


def test_a_signature_is_read_from_the_source() -> None:
    found = signature.parse(SCALE, "scale")
    assert str(found) == "scale(TensorMap map, int* x, i32 n)" and found.sizes == [128, 8, 4]
    every = """extern "C" __global__ void k(const i32 a, u32 b, const i64 c, u64 d, const float e,
        const void *__restrict__ f, const unsigned char * const as) {}"""
    assert [(p.keyword, p.declared, p.kind.code) for p in signature.parse(every, "k").parameters] == [
        ("a", "i32", "i"), ("b", "u32", "I"), ("c", "i64", "q"), ("d", "u64", "Q"), ("e", "float", "f"),
        ("f", "void*", "Q"), ("as_", "unsigned char*", "Q"),
    ]  # fmt: skip
    assert signature.parse('extern "C" __global__ void nothing() {}', "nothing").parameters == ()
    with pytest.raises(SpecError, match=r'no extern "C" __global__ function scales'):
        signature.parse(SCALE, "scales")
    with pytest.raises(SpecError, match=r"k: a parameter is a pointer or one of i32, .*; got 'const double x'"):
        signature.parse('extern "C" __global__ void k(int n, const double x) {}', "k")
    with pytest.raises(SpecError, match="not called stream"):
        signature.parse('extern "C" __global__ void k(int stream) {}', "k")


def test_argument_slots_are_aligned_and_filled_in_one_call() -> None:
    text = 'extern "C" __global__ void k(i32 a, u8* b, const __grid_constant__ TensorMap c, float d, i64 e) {}'
    layout, offsets = signature.parse(text, "k").slots()
    assert offsets == [0, 8, 64, 192, 200] and layout.size == 208
    buffer = bytearray(layout.size)
    layout.pack_into(buffer, 0, -1, 2**63, b"m" * 128, 1.5, -2)
    assert buffer[:4] == b"\xff" * 4 and buffer[8:16] == (2**63).to_bytes(8, "little")
    assert buffer[64:192] == b"m" * 128 and buffer[200:] == (-2).to_bytes(8, "little", signed=True)
    assert signature.parse('extern "C" __global__ void k() {}', "k").slots()[1] == []


# ---- launches --------------------------------------------------------------------------------------------------------


def test_launch_attributes_reach_the_driver_structure(spec: KernelSpec) -> None:
    from cuda.bindings import driver

    from supersonic_moe.jit.launch import _launch_attributes

    config = driver.CUlaunchConfig()
    config.attrs = _launch_attributes(driver, replace(spec, cluster=2, cooperative=True, pdl=True))
    cluster, cooperative, pdl = config.attrs
    assert (cluster.id.name, cooperative.id.name, pdl.id.name) == (
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION",
        "CU_LAUNCH_ATTRIBUTE_COOPERATIVE",
        "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
    )
    assert [getattr(cluster.value.clusterDim, axis) for axis in "xyz"] == [2, 1, 1]
    assert cooperative.value.cooperative == 1 and pdl.value.programmaticStreamSerializationAllowed == 1
    assert _launch_attributes(driver, spec) == []


class FakeDriver:
    """The structures of the real binding, and functions that write down what they are given."""

    def __init__(self, parameter_sizes: list[int]) -> None:
        self.parameter_sizes = parameter_sizes
        self.launches: list[tuple[tuple[int, ...], int, list[bytes]]] = []
        self.smem_limits: list[tuple[int, int]] = []
        self.result = 0
        self.broken = 0

    def __getattr__(self, name: str) -> Any:
        from cuda.bindings import driver

        return getattr(driver, name)

    def cuCtxGetDevice(self) -> Any:
        return 201, None  # no context in this thread

    def cuDeviceGet(self, index: int) -> Any:
        return 0, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return 0, f"context {device}"

    def cuCtxSetCurrent(self, context: str) -> Any:
        return (0,)

    def cuLibraryLoadData(self, image: bytes, *_: Any) -> Any:
        if image == b"too new":
            return 200, None  # CUDA_ERROR_INVALID_IMAGE
        assert image[:4] == b"\x7fELF"
        return 0, "library"

    def cuLibraryGetKernel(self, library: str, name: bytes) -> Any:
        assert (library, name) == ("library", b"scale")
        return 0, 0x1000

    def cuKernelGetParamInfo(self, kernel: int, index: int) -> Any:
        if self.broken:
            return self.broken, None, None
        return (0, 0, self.parameter_sizes[index]) if index < len(self.parameter_sizes) else (1, None, None)

    def cuKernelSetAttribute(self, attribute: Any, value: int, kernel: int, device: int) -> Any:
        self.smem_limits.append((value, device))
        return (0,)

    def cuGetErrorString(self, result: Any) -> Any:
        return 0, b"invalid argument"

    def cuLaunchKernelEx(self, config: Any, function: Any, addresses: int, extra: int) -> Any:
        slots = (ctypes.c_void_p * len(self.parameter_sizes)).from_address(addresses)
        data = [ctypes.string_at(slot or 0, size) for slot, size in zip(slots, self.parameter_sizes, strict=True)]
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.sharedMemBytes)
        self.launches.append((grid, int(config.hStream), data))
        return (self.result,)


class Machine:
    """A fake driver and what torch says of devices and streams; a tensor on a CPU has the device number -1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver, self.device, self.stream = FakeDriver([128, 8, 4]), 0, 77
        for module in (driver_module, launch_module):
            monkeypatch.setattr(module, "binding", lambda: self.driver)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device)
        monkeypatch.setattr(launch_module, "raw_stream", lambda index: self.stream + index)
        monkeypatch.setattr(launch_module, "build", lambda spec, **how: build(spec, CubinCache(None), **how))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_launch_hands_the_driver_grid_stream_and_arguments(spec: KernelSpec, machine: Machine) -> None:
    fake, kernel = machine.driver, Kernel(replace(spec, smem_bytes=100_000))
    kernel.launch((3, 1, 1), map=b"a" * 128, x=0xABC, n=5)
    machine.stream = 78
    kernel.launch((5, 1, 1), n=-1, x=None, map=b"b" * 128)  # in any order
    machine.device = 1
    kernel.launch((4, 2, 1), map=b"c" * 128, x=16, n=True)
    assert fake.launches == [
        ((3, 1, 1, 128, 100_000), 77, [b"a" * 128, (0xABC).to_bytes(8, "little"), (5).to_bytes(4, "little")]),
        ((5, 1, 1, 128, 100_000), 78, [b"b" * 128, bytes(8), b"\xff" * 4]),
        ((4, 2, 1, 128, 100_000), 79, [b"c" * 128, (16).to_bytes(8, "little"), (1).to_bytes(4, "little")]),
    ]
    assert fake.smem_limits == [(100_000, 0), (100_000, 1)]

    fake.result = 1
    with pytest.raises(
        LaunchError, match=r"scale.* failed: CUDA_ERROR_INVALID_VALUE .*grid \(4, 2, 1\).* 100000 bytes"
    ):
        kernel.launch((4, 2, 1), map=b"c" * 128, x=16, n=7)
    fake.parameter_sizes = [128, 8, 8]
    with pytest.raises(LaunchError, match=r"of \[128, 8, 8\] bytes, and its source says scale\(.*128, 8, 4\]"):
        Kernel(spec).launch((4, 2, 1), map=b"c" * 128, x=16, n=7)


def test_a_context_that_a_kernel_has_broken_is_no_wrong_signature(spec: KernelSpec, machine: Machine) -> None:
    machine.driver.broken = 700  # CUDA_ERROR_ILLEGAL_ADDRESS, of a kernel before this one
    with pytest.raises(LaunchError, match=r"asking scale.* for its parameters failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        Kernel(spec).launch((1, 1, 1), map=b"a" * 128, x=16, n=7)


def test_tensors_are_passed_by_address_on_their_device_only(spec: KernelSpec, machine: Machine) -> None:
    kernel, x = Kernel(spec), torch.zeros(1)
    machine.device = -1
    kernel.launch((1, 1, 1), map=b"a" * 128, x=x, n=1)
    assert machine.driver.launches[0][2][1] == x.data_ptr().to_bytes(8, "little")
    machine.device = 0
    with pytest.raises(LaunchError, match=r"scale\(.*\): x is a tensor on cpu, and the current device is cuda:0"):
        kernel.launch((1, 1, 1), map=b"a" * 128, x=x, n=1)
    assert len(machine.driver.launches) == 1


GOOD: dict[str, Any] = {"map": b"m" * 128, "x": None, "n": 7}
WHOLE = r"scale\(TensorMap map, int\* x, i32 n\)"
MISFITS = [
    ({"n": torch.ones(1, dtype=torch.int32)}, "n takes an int of 32 bits; got a tensor of torch.int32 and shape"),
    ({"n": 2**31}, "n takes an int of 32 bits; got the int 2147483648"),
    ({"n": 1.5}, "n takes an int of 32 bits; got the float 1.5"),
    ({"n": None}, "n takes an int of 32 bits; got a NoneType"),
    ({"map": torch.zeros(128, dtype=torch.uint8)}, "map takes a TensorMap; got a tensor"),
    ({"map": None}, "map takes a TensorMap; got a NoneType"),
    ({"x": b"m" * 128}, "x takes a tensor, an address or None; got a bytes"),
    ({"x": -1}, "x takes a tensor, an address or None; got the int -1"),
]


@pytest.mark.parametrize(("change", "words"), MISFITS, ids=[words.partition(";")[0] for _, words in MISFITS])
def test_a_value_that_does_not_fit_is_named(
    change: dict[str, Any], words: str, spec: KernelSpec, machine: Machine
) -> None:
    with pytest.raises(LaunchError, match=f"{WHOLE}: {words}"):
        Kernel(spec).launch((1, 1, 1), **(GOOD | change))
    assert machine.driver.launches == []


def test_a_name_that_does_not_fit_shows_the_signature(spec: KernelSpec, machine: Machine) -> None:
    kernel = Kernel(spec)
    with pytest.raises(TypeError, match=f"{WHOLE}.* missing 1 required keyword-only argument: 'n'"):
        kernel.launch((1, 1, 1), map=b"m" * 128, x=None)
    with pytest.raises(TypeError, match=f"{WHOLE}.* unexpected keyword argument 'm'"):
        kernel.launch((1, 1, 1), **GOOD, m=1)
    with pytest.raises(TypeError, match=f"{WHOLE}.* multiple values for keyword argument 'n'"):
        kernel.launch((1, 1, 1), **GOOD, n=1)
    with pytest.raises(TypeError, match=f"{WHOLE}.* positional argument"):
        kernel.launch((1, 1, 1), *GOOD.values())
    assert machine.driver.launches == []


def test_a_driver_too_old_for_the_packages_cubin_gets_one_of_this_machine(
    spec: KernelSpec, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = resolve(spec).digest()
    own = replace(build(spec, CubinCache(None)), image=b"too new")
    (tmp_path / entry_name(spec.name, key)).write_bytes(encode_entry(spec.name, key, own))
    monkeypatch.setattr(build_module, "SHIPPED_CUBINS", tmp_path)
    kernel = Kernel(spec)
    assert kernel.cubin.origin == "shipped"
    kernel.new_slots(0)
    assert kernel.cubin.origin == "compiled"

    monkeypatch.setattr(machine.driver, "cuLibraryLoadData", lambda *_: (200, None), raising=False)
    with pytest.raises(LaunchError, match="loading scale"):
        Kernel(spec).new_slots(0)


def test_a_tensor_map_is_encoded_once_with_dimensions_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def encode(target: int, *arguments: Any) -> int:
        assert target % 64 == 0
        calls.append(tuple(list(a) if isinstance(a, ctypes.Array) else a for a in arguments))
        ctypes.memset(target, len(calls), 128)
        return 0

    monkeypatch.setattr(tma_module, "_encode_tiled", lambda: encode)
    monkeypatch.setattr(tma_module, "make_context_current", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layout = {"dtype": torch.bfloat16, "shape": (5, 300, 64), "strides": (30000, 80, 1)}
    tma_module._cached.cache_clear()
    first = tensor_map(1 << 20, box=(1, 128, 64), **layout)
    assert first == b"\1" * 128 == tensor_map(1 << 20, box=(1, 128, 64), **layout)
    # type bfloat16, rank, address, shape, strides in bytes, box, element strides, no interleave, 128 B, 256 B, zeros
    dims = ([64, 300, 5], [160, 60000], [64, 128, 1], [1, 1, 1])
    (call,) = calls
    assert call == (9, 3, 1 << 20, dims[0], [*dims[1], 0], dims[2], dims[3], 0, 3, 3, 0)
    assert tensor_map(2 << 20, box=(1, 128, 32), swizzle=64, **(layout | {"shape": (5, 300, 32)}), l2_promotion=0)
    tma_module._cached.cache_clear()


def test_threads_that_ask_at_once_get_one_kernel(spec: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would be loaded twice, the second time perhaps while the first one waits on the GPU."""
    from supersonic_moe.kernels.sm90 import rank_tokens

    make, threads = Kernel.__init__, 8

    def slowly(self: Kernel, *args: Any) -> None:
        time.sleep(0.02)
        make(self, *args)

    monkeypatch.setattr(Kernel, "__init__", slowly)
    monkeypatch.setattr(launch_module, "_kernels", {})
    rank_tokens._kernel.cache_clear()
    for ask in (lambda: kernel_of(spec), lambda: rank_tokens._kernel("post_tokens")):
        together = threading.Barrier(threads)
        with ThreadPoolExecutor(threads) as pool:
            asked = [pool.submit(lambda: (together.wait(), ask())[1]) for _ in range(threads)]  # noqa: B023
        assert len({id(one.result()) for one in asked}) == 1
    rank_tokens._kernel.cache_clear()  # of this test's own kernels


def test_kernels_of_the_package_are_made_in_one_place() -> None:
    files = [file for file in KERNEL_ROOT.iterdir() if file.name.endswith(".py")]
    assert len(files) > 20
    assert [file.name for file in files if re.search(r"\bKernel\(", file.read_text())] == []


def test_an_empty_grid_launches_nothing_even_without_a_gpu(spec: KernelSpec) -> None:
    Kernel(spec).launch((0, 1, 1), map=b"", x=None, n=0)


def test_the_device_of_a_tensor_is_selected_only_where_another_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, selected = torch.empty(1), []

    class Selected:
        def __init__(self, device: torch.device) -> None:
            assert device == tensor.device

        def __enter__(self) -> None:
            selected.append(True)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Selected)
    for current, times in ((tensor.get_device(), 0), (tensor.get_device() + 1, 1)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        with on_device(tensor):
            assert len(selected) == times


BAD_MAPS = [
    ({"shape": (8,) * 6, "strides": (8,) * 6, "box": (8,) * 6}, "1 to 5 dimensions"),
    ({"box": (64,)}, "one stride and one box size"),
    ({"dtype": torch.float64}, "no tensor map for torch.float64"),
    ({"swizzle": 16}, "swizzle must be one of"),
    ({"l2_promotion": 32}, "l2_promotion must be one of"),
    ({"shape": (0, 64)}, "skip the launch when empty"),
    ({"address": 1 << 20 | 8}, "multiples of 16 bytes, got 0x100008"),
    ({"strides": (64, 2)}, "last dimension must be contiguous"),
    ({"strides": (60, 1)}, "has stride 120 bytes; pad the row length to a multiple of 8 elements"),
    ({"box": (257, 64)}, "1 to 256 elements"),
    ({"box": (0, 64)}, "1 to 256 elements"),
    ({"box": (64, 4)}, "multiple of 16 bytes, got 4 elements of torch.bfloat16 = 8 bytes"),
    ({"box": (64, 128)}, "at most 128 bytes, got 128 elements of torch.bfloat16 = 256; load several boxes of 64"),
]


@pytest.mark.parametrize(("change", "words"), BAD_MAPS, ids=[words for _, words in BAD_MAPS])
def test_tensor_maps_are_refused_with_the_rule(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"dtype": torch.bfloat16, "shape": (256, 64), "strides": (64, 1), "box": (128, 64)}
    arguments.update(change)
    with pytest.raises(TensorMapError, match=words):
        tensor_map(arguments.pop("address", 1 << 20), **arguments)


def test_a_tensor_map_of_an_address_needs_its_layout() -> None:
    with pytest.raises(TensorMapError, match="needs dtype, shape and strides"):
        tensor_map(1 << 20, box=(8, 8))
    assert issubclass(TensorMapError, LaunchError) and issubclass(TensorMapError, ValueError)
