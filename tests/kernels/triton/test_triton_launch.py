"""The short way to launch a Triton kernel finds the variant that Triton itself would find, on the stream of the moment.

No GPU and no compiler: CPU tensors pose as tensors of a device, and a stand-in notes what each variant was compiled for
and what it is launched with. Signs, keys and argument binding are Triton's own.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from supersonic_moe.kernels.triton import launch as launch_module
from supersonic_moe.kernels.triton import shipped
from supersonic_moe.kernels.triton.launch import launch

DEVICES = (0, 1)


def _kernel(x_ptr, y_ptr, count, stride, factor, WIDTH: tl.constexpr, FLAG: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


class Variant:
    """A compiled kernel."""

    packed_metadata = "metadata"

    def __init__(self, device: int) -> None:
        self.function, self.device = object(), device
        self.launches: list[tuple[Any, ...]] = []

    def launch_metadata(self, *_: Any) -> str:
        return "by Triton"

    def run(self, x: int, y: int, z: int, stream: int, function: object, metadata: str, *rest: Any) -> None:
        assert function is self.function and metadata == self.packed_metadata
        self.launches.append(((x, y, z), stream, rest[0], rest[1:3], rest[3:]))


class Cuda:
    """The parts of a driver that a launch asks."""

    device, stream = 0, 100

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()

    class Selected:
        def __init__(self, device: int) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before, fake.device = fake.device, self.device

        def __exit__(self, *_: object) -> None:
            fake.device = self.before

    monkeypatch.setattr(launch_module, "current_device", fake.get_current_device)
    monkeypatch.setattr(torch.cuda, "device", Selected)
    monkeypatch.setattr(launch_module, "raw_stream", fake.get_current_stream)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: getattr(tensor, "on", 0))
    monkeypatch.setattr(launch_module, "_LAUNCHERS", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    return fake


@pytest.fixture
def kernel(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> JITFunction[Any]:
    def compiled(self: Any, key: str, signature: Any, device: int, *_: Any) -> Variant:
        variant = self.device_caches[device][0][key] = Variant(device)
        return variant

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    return JITFunction(_kernel, do_not_specialize=["count"])


def variants(kernel: JITFunction[Any]) -> list[Variant]:
    return [variant for device in DEVICES for variant in kernel.device_caches[device][0].values()]


STORAGE = {dtype: torch.empty(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int32)}
tensors = st.builds(lambda dtype, start: STORAGE[dtype][start:], st.sampled_from(list(STORAGE)), st.integers(0, 9))
integers = st.sampled_from([0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, -(2**31), -(2**35)])
calls = st.tuples(
    st.tuples(tensors, st.none() | tensors, integers, integers, st.none() | st.sampled_from([0.5, 1.0])),
    st.tuples(st.sampled_from([1, 16, 128]), st.booleans()),
    st.sampled_from([4, 8]),
)


def test_repeated_launches_run_the_variant_that_triton_would_choose(kernel: JITFunction[Any]) -> None:
    for tensor in STORAGE.values():
        assert tensor.data_ptr() % 16 == 0

    @settings(max_examples=300)
    @given(st.lists(calls, min_size=1, max_size=8))
    def check(batch: list[Any]) -> None:
        for args, constants, num_warps in batch:
            launch(kernel, (3, 2), args, constants, num_warps=num_warps)
            before = {v: len(v.launches) for v in variants(kernel)}
            launch(kernel, (3, 2), args, constants, num_warps=num_warps)  # without Triton, which knows it by now
            kernel[(3, 2)](*args, *constants, num_warps=num_warps)
            launched = [v for v in variants(kernel) for _ in v.launches[before.get(v, 0) :]]
            assert len(launched) == 2 and launched[0] is launched[1]
            chosen = launched[0]
            ours, tritons = chosen.launches[-2:]
            assert ours[2] is None and tritons[2] == "by Triton"
            assert ours[:2] == tritons[:2] == ((3, 2, 1), 100)
            assert tritons[4] == (*args, *constants)
            assert ours[4] == tuple(t.data_ptr() if isinstance(t, torch.Tensor) else t for t in tritons[4])

    check()


def test_what_a_wheel_carries_is_named_by_all_that_triton_looks_at(kernel: JITFunction[Any]) -> None:
    @settings(max_examples=300)
    @given(st.lists(calls, min_size=2, max_size=8))
    def check(batch: list[Any]) -> None:
        found: dict[str, Variant] = {}
        for args, constants, num_warps in batch:
            chosen = kernel[(1,)](*args, *constants, num_warps=num_warps)
            assert found.setdefault(shipped.variant(kernel, args, constants, num_warps), chosen) is chosen

    check()


def test_a_launch_goes_to_the_device_of_its_tensors_and_the_stream_of_the_moment(
    kernel: JITFunction[Any], cuda: Cuda
) -> None:
    tensors = [torch.empty(4), torch.empty(4)]
    tensors[1].on = 1  # type: ignore[attr-defined]
    for device, stream in itertools.product(DEVICES, (100, 200)):
        cuda.stream = stream
        launch(kernel, (5,), (tensors[device], None, 7, 7, None), (16, True))
        assert cuda.device == 0
    for device, variant in zip(DEVICES, variants(kernel), strict=True):
        assert variant.device == device
        assert [launched[:2] for launched in variant.launches] == [((5, 1, 1), 100 + device), ((5, 1, 1), 200 + device)]


def test_hooks_of_profilers_hear_of_every_launch(kernel: JITFunction[Any]) -> None:
    def hook(_: object) -> None:
        pass

    args, constants = (torch.empty(4), None, 7, 7, None), (16, True)
    launch(kernel, (1,), args, constants)
    triton.knobs.runtime.launch_exit_hook.add(hook)
    try:
        launch(kernel, (1,), args, constants)
    finally:
        triton.knobs.runtime.launch_exit_hook.remove(hook)
    launch(kernel, (1,), args, constants)
    (variant,) = variants(kernel)
    assert [launched[2] for launched in variant.launches] == ["by Triton", "by Triton", None]
    assert variant.launches[1][3][1] is triton.knobs.runtime.launch_exit_hook


def test_a_triton_whose_launcher_is_not_known_launches_by_itself(
    kernel: JITFunction[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ".".join(triton.__version__.split(".")[:2]) in launch_module.KNOWN, "run the tests here and add this version"
    monkeypatch.setattr(launch_module, "_LAUNCHER_IS_KNOWN", False)
    for _ in range(2):
        launch(kernel, (3,), (torch.empty(4), None, 7, 7, 0.5), (16, True))
    (variant,) = variants(kernel)
    assert [launched[2] for launched in variant.launches] == ["by Triton", "by Triton"]
