"""Load a cubin and launch its kernel through the CUDA driver, at a few microseconds of host time.

    kernel = Kernel(spec, (TENSOR_MAP, PTR, I32))
    kernel.launch((132, 1, 1), tensor_map(x_TH, box=(128, 64)), out_TH, num_tokens)

The work of a launch is split by how often its inputs change. Once per process: build the cubin, load it as a
`CUlibrary`, whose kernel handle belongs to no context and therefore serves every GPU. Once per thread and device: the
launch attributes (cluster, cooperative, programmatic dependent launch), the shared-memory limit, and an argument buffer
with one slot for each parameter and the array of slot addresses that the driver wants. Per launch: one
`struct.pack_into` fills all slots, grid and stream are set if they differ from last time, and `cuLaunchKernelEx` copies
the slots before it returns, so the next launch may overwrite them. Buffers belong to a thread because the binding
releases the GIL during the call.

Importing this module needs no driver; the first launch does.
"""

import ctypes
import struct
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import Cubin
from supersonic_moe.jit.driver import LaunchError, binding, call, error_text, make_context_current
from supersonic_moe.jit.spec import KernelSpec


class ArgType(NamedTuple):
    """Type of one kernel parameter: its letter for `struct`, its size in bytes."""

    name: str
    code: str
    size: int


PTR = ArgType("PTR", "Q", 8)  # torch.Tensor on the current device, int address, or None for a null pointer
I32 = ArgType("I32", "i", 4)
U32 = ArgType("U32", "I", 4)
I64 = ArgType("I64", "q", 8)
F32 = ArgType("F32", "f", 4)
TENSOR_MAP = ArgType("TENSOR_MAP", "128s", 128)  # what jit.tma.tensor_map returns

Grid = tuple[int, int, int]
MAX_GRID = (2**31 - 1, 65535, 65535)
DEFAULT_SMEM_LIMIT = 48 * 1024  # static and dynamic together; above it, a kernel must be told its limit on each device


class Kernel:
    """One compiled configuration, for any device and thread; built and loaded at its first use."""

    def __init__(self, spec: KernelSpec, argtypes: tuple[ArgType, ...]) -> None:
        self.spec = spec
        self.argtypes = argtypes
        self._cubin: Cubin | None = None
        self._handle: Any = None
        self._load_lock = threading.Lock()
        self._threads = _ThreadSlots()
        self._pointers = tuple(index for index, kind in enumerate(argtypes) if kind is PTR)

    @property
    def cubin(self) -> Cubin:
        """The machine code; compiled or read from the cache here if it was not before. Needs no GPU."""
        if self._cubin is None:
            self._cubin = build(self.spec)
        return self._cubin

    def prepare(self) -> None:
        """Do all one-time work for the current device, so that the first launch is as short as the others."""
        self._slots(torch.cuda.current_device())

    def launch(self, grid: Grid, *args: Any, stream: torch.cuda.Stream | None = None) -> None:
        """Enqueue the kernel on `stream` (default: torch's current stream of the current device).

        A grid with a zero in it launches nothing, so callers need no special case for empty inputs. `grid` counts
        blocks, also with clusters. Tensors passed as PTR must be on the current device; their contents are not checked.
        """
        if 0 in grid:
            return
        device = torch.cuda.current_device()
        slots = self._threads.by_device.get(device) or self._slots(device)
        values = list(args)
        for index in self._pointers:
            value = values[index] if index < len(values) else None
            if isinstance(value, torch.Tensor):
                if value.get_device() != device:
                    raise LaunchError(
                        f"{self.spec}: argument {index} is a tensor on {value.device}, and the current device is "
                        f"cuda:{device}; move the tensor, or launch inside `with torch.cuda.device(tensor.device)`"
                    )
                values[index] = value.data_ptr()
            elif value is None and index < len(values):
                values[index] = 0
        try:
            slots.pack_into(slots.buffer, slots.offset, *values)
        except struct.error as error:
            raise LaunchError(
                f"{self.spec} takes ({', '.join(kind.name for kind in self.argtypes)}); the arguments "
                f"({', '.join(type(arg).__name__ for arg in args)}) do not fit: {error}"
            ) from error
        config = slots.config
        if grid != slots.grid:
            self._check_grid(grid)
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            slots.grid = grid
        raw_stream = _raw_stream(device) if stream is None else int(stream.cuda_stream)
        if raw_stream != slots.stream:
            config.hStream = raw_stream
            slots.stream = raw_stream
        (result,) = slots.enqueue(config, slots.function, slots.addresses, 0)
        if result != 0:
            raise LaunchError(
                f"launching {self.spec} failed: {error_text(result)}; grid {grid}, {self.spec.threads} threads, "
                f"{self.spec.smem_bytes} bytes of shared memory, cluster {self.spec.cluster}"
            )

    def _check_grid(self, grid: Grid) -> None:
        if any(not 0 < size <= limit for size, limit in zip(grid, MAX_GRID, strict=True)):
            raise LaunchError(f"{self.spec}: a grid has 1 to {MAX_GRID} blocks in x, y, z; got {grid}")
        if grid[0] % self.spec.cluster:
            raise LaunchError(
                f"{self.spec}: grid x must be a multiple of the cluster size {self.spec.cluster}, got {grid}"
            )

    def _slots(self, device: int) -> "_Slots":
        """The launch state of this thread on `device`, created at the first call."""
        with self._load_lock:
            if self._handle is None:
                make_context_current(device)
                self._handle = _load(self.cubin, self.spec, self.argtypes)
        static_bytes = self.cubin.report.kernel(self.spec.name).static_smem_bytes
        slots = _Slots(self._handle, self.spec, self.argtypes, device, static_bytes)
        self._threads.by_device[device] = slots
        return slots


class _ThreadSlots(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[int, _Slots] = {}


class _Slots:
    """Launch configuration and argument buffer of one kernel, thread and device."""

    def __init__(
        self, handle: Any, spec: KernelSpec, argtypes: tuple[ArgType, ...], device: int, static_bytes: int
    ) -> None:
        driver = binding()
        make_context_current(device)
        if spec.smem_bytes and spec.smem_bytes + static_bytes > DEFAULT_SMEM_LIMIT:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            ordinal = call(f"finding cuda:{device}", driver.cuDeviceGet, device)
            purpose = f"giving {spec} {spec.smem_bytes} bytes of shared memory on cuda:{device}"
            call(purpose, driver.cuKernelSetAttribute, attribute, spec.smem_bytes, handle, ordinal)
        self.config: Any = driver.CUlaunchConfig()
        self.config.blockDimX, self.config.blockDimY, self.config.blockDimZ = spec.threads, 1, 1
        self.config.sharedMemBytes = spec.smem_bytes
        attributes = _launch_attributes(driver, spec)
        self.config.attrs = attributes
        self.config.numAttrs = len(attributes)
        self.grid: Grid | None = None
        self.stream: int | None = None
        self.function: Any = driver.CUfunction(int(handle))  # the driver takes a CUkernel in its place
        self.enqueue: Any = driver.cuLaunchKernelEx

        layout, offsets = slot_layout(argtypes)
        self.pack_into = layout.pack_into
        self.buffer = ctypes.create_string_buffer(layout.size + 64)
        self.offset = -ctypes.addressof(self.buffer) % 64  # slots start at an aligned address
        base = ctypes.addressof(self.buffer) + self.offset
        self._table = (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))
        self.addresses = ctypes.addressof(self._table) if offsets else 0


_HERE = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """`torch.cuda.device(tensor.device)`; where that is current, nothing, at a tenth of the host time."""
    return _HERE if tensor.get_device() == torch.cuda.current_device() else torch.cuda.device(tensor.device)


def slot_layout(argtypes: tuple[ArgType, ...]) -> tuple[struct.Struct, list[int]]:
    """The `struct` that fills one slot for each argument, and the offsets of the slots: multiples of their size, or
    64."""
    code, size, offsets = "<", 0, []
    for kind in argtypes:
        padding = -size % min(kind.size, 64)
        offsets.append(size + padding)
        code += f"{padding}x{kind.code}" if padding else kind.code
        size += padding + kind.size
    return struct.Struct(code), offsets


def _launch_attributes(driver: Any, spec: KernelSpec) -> list[Any]:
    kinds = driver.CUlaunchAttributeID
    attributes = []
    if spec.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = spec.cluster, 1, 1
        attributes.append(attribute)
    if spec.cooperative:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        attributes.append(attribute)
    if spec.pdl:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    return attributes


def _load(cubin: Cubin, spec: KernelSpec, argtypes: tuple[ArgType, ...]) -> Any:
    """The context-free CUkernel of `spec`, its parameters checked against `argtypes`."""
    driver = binding()
    library = call(f"loading {spec}", driver.cuLibraryLoadData, cubin.image, [], [], 0, [], [], 0)
    handle = call(f"finding {spec.name} in its cubin", driver.cuLibraryGetKernel, library, spec.name.encode())
    sizes: list[int] = []
    while True:
        result, _, size = driver.cuKernelGetParamInfo(handle, len(sizes))
        if result != 0:
            break
        sizes.append(size)
    expected = [kind.size for kind in argtypes]
    if sizes != expected:
        raise LaunchError(
            f"{spec} has parameters of {sizes} bytes, and is declared with "
            f"({', '.join(kind.name for kind in argtypes)}) of {expected} bytes; correct the tuple of argument types"
        )
    return handle


def _raw_stream(device: int) -> int:
    """Address of torch's current stream; the private call costs a tenth of a `torch.cuda.current_stream` object."""
    raw: int = torch._C._cuda_getCurrentRawStream(device)
    return raw
