"""Launching and tensor maps without a GPU: what the driver would be handed, and what is refused before it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from supersonic_moe.jit import (
    F32,
    I32,
    I64,
    PTR,
    TENSOR_MAP,
    Kernel,
    KernelSpec,
    LaunchError,
    TensorMapError,
    tensor_map,
)
from supersonic_moe.jit import driver as driver_module
from supersonic_moe.jit import launch as launch_module
from supersonic_moe.jit import tma as tma_module
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import CubinCache
from supersonic_moe.jit.launch import on_device, slot_layout


@pytest.fixture
def spec(tmp_path: Path) -> KernelSpec:
    (tmp_path / "scale.cu").write_text('extern "C" __global__ void scale(int* x) { x[threadIdx.x] *= 2; }')
    return KernelSpec("scale", "scale.cu", root=tmp_path)


def test_argument_slots_are_aligned_and_filled_in_one_call() -> None:
    layout, offsets = slot_layout((I32, PTR, TENSOR_MAP, F32, I64))
    assert offsets == [0, 8, 64, 192, 200] and layout.size == 208
    buffer = bytearray(layout.size)
    layout.pack_into(buffer, 0, -1, 2**63, b"m" * 128, 1.5, -2)
    assert buffer[:4] == b"\xff" * 4 and buffer[8:16] == (2**63).to_bytes(8, "little")
    assert buffer[64:192] == b"m" * 128 and buffer[200:] == (-2).to_bytes(8, "little", signed=True)
    assert slot_layout(())[1] == []


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
        assert image[:4] == b"\x7fELF"
        return 0, "library"

    def cuLibraryGetKernel(self, library: str, name: bytes) -> Any:
        assert (library, name) == ("library", b"scale")
        return 0, 0x1000

    def cuKernelGetParamInfo(self, kernel: int, index: int) -> Any:
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


def test_a_launch_hands_the_driver_grid_stream_and_arguments(spec: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device, stream = FakeDriver([128, 8, 4]), [0], [77]
    for module in (driver_module, launch_module):
        monkeypatch.setattr(module, "binding", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    monkeypatch.setattr(launch_module, "raw_stream", lambda index: stream[0] + index)
    monkeypatch.setattr(launch_module, "build", lambda spec: build(spec, CubinCache(None)))
    kernel = Kernel(replace(spec, smem_bytes=100_000), (TENSOR_MAP, PTR, I32))

    kernel.launch((3, 1, 1), b"a" * 128, 0xABC, 5)
    stream[0] = 78
    kernel.launch((3, 1, 1), b"b" * 128, None, -1)
    device[0] = 1
    kernel.launch((4, 2, 1), b"c" * 128, 16, 7)
    assert fake.launches == [
        ((3, 1, 1, 128, 100_000), 77, [b"a" * 128, (0xABC).to_bytes(8, "little"), (5).to_bytes(4, "little")]),
        ((3, 1, 1, 128, 100_000), 78, [b"b" * 128, bytes(8), b"\xff" * 4]),
        ((4, 2, 1, 128, 100_000), 79, [b"c" * 128, (16).to_bytes(8, "little"), (7).to_bytes(4, "little")]),
    ]
    assert fake.smem_limits == [(100_000, 0), (100_000, 1)]

    fake.result = 1
    with pytest.raises(
        LaunchError, match=r"scale.* failed: CUDA_ERROR_INVALID_VALUE .*grid \(4, 2, 1\).* 100000 bytes"
    ):
        kernel.launch((4, 2, 1), b"c" * 128, 16, 7)
    with pytest.raises(LaunchError, match="argument 1 is a tensor on cpu"):
        kernel.launch((4, 2, 1), b"c" * 128, torch.zeros(1), 7)
    with pytest.raises(LaunchError, match=r"takes \(TENSOR_MAP, PTR, I32\); the arguments \(bytes\) do not fit"):
        kernel.launch((4, 2, 1), b"c" * 128)
    with pytest.raises(LaunchError, match=r"parameters of \[128, 8, 4\] bytes, and is declared with \(PTR\) of \[8\]"):
        Kernel(spec, (PTR,)).prepare()


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


def test_an_empty_grid_launches_nothing_even_without_a_gpu(spec: KernelSpec) -> None:
    Kernel(spec, (PTR, I32)).launch((0, 1, 1), None, 0)


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
    ({"dtype": torch.uint8, "oob_nan": True}, "oob_nan needs bfloat16 or float32"),
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
