"""Load a cubin and launch its kernel through the CUDA driver, at a few microseconds of host time.

    kernel = kernel_of(spec)
    kernel.launch((132, 1, 1), map_x=tensor_map(x_TH, box=(128, 64)), out=out_TH, tokens=num_tokens)

Arguments have the names of the parameters in the .cu file (`jit/signature.py`). The work of a launch is split by how
often its inputs change. Once per process: read the parameters, build the cubin, load it as a `CUlibrary`, whose kernel
handle belongs to no context and therefore serves every GPU. Once per thread and device: the launch attributes (cluster,
cooperative, programmatic dependent launch), the shared-memory limit, and an argument buffer with one slot for each
parameter and the array of slot addresses that the driver wants. Per launch: one `struct.pack_into` fills all slots,
grid and stream are set if they differ from last time, and `cuLaunchKernelEx` copies the slots before it returns, so the
next launch may overwrite them. Buffers belong to a thread because the binding releases the GIL during the call.

Importing this module needs no driver; the first launch does.
"""

import ctypes
import logging
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from supersonic_moe.jit import signature, tape
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import Cubin
from supersonic_moe.jit.driver import LaunchError, binding, call, error_text, make_context_current
from supersonic_moe.jit.signature import POINTER, SLOT_ALIGNMENT, TENSOR_MAP, Signature
from supersonic_moe.jit.spec import KernelSpec, source_of
from supersonic_moe.private_api import raw_stream

log = logging.getLogger("supersonic_moe.jit")

Grid = tuple[int, int, int]
MAX_GRID = (2**31 - 1, 65535, 65535)
DEFAULT_SMEM_LIMIT = 48 * 1024  # static and dynamic together; above it, a kernel must be told its limit on each device


class Kernel:
    """One compiled configuration, for any device and thread; built and loaded at its first use.

    `launch(grid, *, <the parameters by name>, stream=None)` enqueues it on `stream` (default: torch's current stream of
    the current device). A grid with a zero in it launches nothing, so callers need no special case for empty inputs.
    `grid` counts blocks, also with clusters. Tensors must be on the current device; their contents are not checked.

    Raises LaunchError for a value that its parameter cannot take and whatever the driver refuses, TypeError for a name
    that is missing or unknown.
    """

    def __init__(self, spec: KernelSpec, cubin: Cubin | None = None, parameters: Signature | None = None) -> None:
        """`cubin` and `parameters`: of a kernel that is there already, and that nothing here could compile."""
        self.spec = spec
        self.signature = parameters or signature.parse(source_of(spec), spec.name)
        self._cubin = cubin
        self._handle: Any = None
        self._load_lock = threading.Lock()
        self._threads = _ThreadSlots()
        self.launch = signature.launch_function(self.signature, self._threads, self._slots)

    @property
    def cubin(self) -> Cubin:
        """The machine code; compiled or read from the cache here if it was not before. Needs no GPU."""
        if self._cubin is None:
            self._cubin = build(self.spec)
        return self._cubin

    def _slots(self, device: int) -> "_Slots":
        """The launch state of this thread on `device`, created at the first call."""
        slots = self._threads.by_device[device] = self.new_slots(device)
        return slots

    def new_slots(self, device: int) -> "_Slots":
        """A launch state of its own, for `jit/replay.py`."""
        with self._load_lock:
            if self._handle is None:
                make_context_current(device)
                self._handle = self._loaded()
        static_bytes = self.cubin.report.kernel(self.spec.name).static_smem_bytes
        return _Slots(self._handle, self.spec, self.signature, device, static_bytes)

    def _loaded(self) -> Any:
        """The loaded kernel. A driver older than the compiler of the package's own cubins refuses them; this machine's
        compiler fits its driver."""
        try:
            return _load(self.cubin, self.spec, self.signature)
        except LaunchError as error:
            if self.cubin.origin != "shipped":
                raise
            log.info("compiling %s, because the driver does not take the package's cubin: %s", self.spec, error)
            self._cubin = build(self.spec, shipped=False)
            return _load(self._cubin, self.spec, self.signature)


_kernels: dict[KernelSpec, Kernel] = {}
_kernels_lock = threading.Lock()


def kernel_of(spec: KernelSpec) -> Kernel:
    """The one kernel of `spec` in this process, however many threads ask for it at once.

    Two would be two libraries, and the driver may wait for everything on the GPU before it loads the second: for ever
    where ranks are threads, and the first kernel already waits there for the rank that loads. Callers keep what they
    get (`functools.cache`), since looking up a spec costs more than a launch may.
    """
    with _kernels_lock:
        if spec not in _kernels:
            _kernels[spec] = Kernel(spec)
        return _kernels[spec]


class _ThreadSlots(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[int, _Slots] = {}


class _Slots:
    """Launch configuration and argument buffer of one kernel, thread and device."""

    def __init__(self, handle: Any, spec: KernelSpec, signature: Signature, device: int, static_bytes: int) -> None:
        driver = binding()
        make_context_current(device)
        if spec.smem_bytes and spec.smem_bytes + static_bytes > DEFAULT_SMEM_LIMIT:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            ordinal = call(f"finding cuda:{device}", driver.cuDeviceGet, device)
            purpose = f"giving {spec} {spec.smem_bytes} bytes of shared memory on cuda:{device}"
            call(purpose, driver.cuKernelSetAttribute, attribute, spec.smem_bytes, handle, ordinal)
        self._config: Any = driver.CUlaunchConfig()
        self._config.blockDimX, self._config.blockDimY, self._config.blockDimZ = spec.threads, 1, 1
        self._config.sharedMemBytes = spec.smem_bytes
        attributes = _launch_attributes(driver, spec)
        self._config.attrs = attributes
        self._config.numAttrs = len(attributes)
        self._spec, self._device = spec, device
        self._made_of = handle, spec, signature, device, static_bytes
        self._grid: Grid | None = None
        self._stream: int | None = None
        self._function: Any = driver.CUfunction(int(handle))  # the driver takes a CUkernel in its place
        self._launch: Any = driver.cuLaunchKernelEx

        layout, offsets = signature.slots()
        self.pack_into = layout.pack_into
        self.buffer = ctypes.create_string_buffer(layout.size + SLOT_ALIGNMENT)
        self.offset = -ctypes.addressof(self.buffer) % SLOT_ALIGNMENT
        base = ctypes.addressof(self.buffer) + self.offset
        self._table = (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))
        self._addresses = ctypes.addressof(self._table) if offsets else 0

    def enqueue(self, grid: Grid, stream: torch.cuda.Stream | None) -> None:
        """Launch with what the slots hold."""
        if tape.state.recorder is not None:
            self._record(tape.state.recorder, grid, stream)
        config = self._config
        if grid != self._grid:
            self._set_grid(grid)
        where = raw_stream(self._device) if stream is None else int(stream.cuda_stream)
        if where != self._stream:
            config.hStream = where
            self._stream = where
        (result,) = self._launch(config, self._function, self._addresses, 0)
        if result != 0:
            raise self._failure(result)

    def again(self, _: object) -> None:
        """Launch with what the slots hold and the grid of last time on the current stream: a step of a tape."""
        where = raw_stream(self._device)
        if where != self._stream:
            self._config.hStream = where
            self._stream = where
        (result,) = self._launch(self._config, self._function, self._addresses, 0)
        if result != 0:
            raise self._failure(result)

    def _failure(self, result: Any) -> LaunchError:
        return LaunchError(
            f"launching {self._spec} failed: {error_text(result)}; grid {self._grid}, {self._spec.threads} threads, "
            f"{self._spec.smem_bytes} bytes of shared memory, cluster {self._spec.cluster}"
        )

    def _record(self, recorder: tape.Recorder, grid: Grid, stream: torch.cuda.Stream | None) -> None:
        twin = _Slots(*self._made_of)
        signature = self._made_of[2]
        layout, offsets = signature.slots()
        layout.pack_into(twin.buffer, twin.offset, *layout.unpack_from(self.buffer, self.offset))
        raw = memoryview(twin.buffer).cast("B")  # takes 128 bytes at once; a ctypes array would one by one
        words = (ctypes.c_uint64 * (layout.size // 8)).from_buffer(twin.buffer, twin.offset)
        for parameter, offset in zip(signature.parameters, offsets, strict=True):
            if parameter.kind is POINTER:
                recorder.place(words, offset // 8, words[offset // 8])
            elif parameter.kind is TENSOR_MAP:
                recorder.place_map(raw, slice(twin.offset + offset, twin.offset + offset + 128))
        if stream is not None:
            recorder.refuse()
        twin._set_grid(grid)
        recorder.launched(twin.again)

    def _set_grid(self, grid: Grid) -> None:
        if any(not 0 < size <= limit for size, limit in zip(grid, MAX_GRID, strict=True)):
            raise LaunchError(f"{self._spec}: a grid has 1 to {MAX_GRID} blocks in x, y, z; got {grid}")
        if grid[0] % self._spec.cluster:
            raise LaunchError(
                f"{self._spec}: grid x must be a multiple of the cluster size {self._spec.cluster}, got {grid}"
            )
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = grid
        self._grid = grid


class Launch(NamedTuple):
    """A launch that has its arguments."""

    kernel: Kernel
    grid: Grid
    arguments: dict[str, Any]

    def run(self) -> None:
        self.kernel.launch(self.grid, **self.arguments)


_HERE = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """`torch.cuda.device(tensor.device)`; where that is current, nothing, at a tenth of the host time."""
    return _HERE if tensor.get_device() == torch.cuda.current_device() else torch.cuda.device(tensor.device)


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


def _load(cubin: Cubin, spec: KernelSpec, signature: Signature) -> Any:
    """The context-free CUkernel of `spec`, its parameters checked against `signature`."""
    driver = binding()
    library = call(f"loading {spec}", driver.cuLibraryLoadData, cubin.image, [], [], 0, [], [], 0)
    handle = call(f"finding {spec.name} in its cubin", driver.cuLibraryGetKernel, library, spec.name.encode())
    sizes: list[int] = []
    while True:
        result, _, size = driver.cuKernelGetParamInfo(handle, len(sizes))
        if result == driver.CUresult.CUDA_ERROR_INVALID_VALUE:
            break  # there is no such parameter
        if result != 0:  # as after a kernel that failed: then nothing works any more
            raise LaunchError(f"asking {spec} for its parameters failed: {error_text(result)}")
        sizes.append(size)
    if sizes != signature.sizes:
        raise LaunchError(
            f"{spec} was compiled with parameters of {sizes} bytes, and its source says {signature} of "
            f"{signature.sizes} bytes; a type that jit/signature.py reads must not be redefined"
        )
    return handle
