"""Tensor maps: the 128-byte descriptors from which TMA instructions take a tensor's address, shape, strides and tile.

    map_x = tensor_map(x_TH, box=(128, 64))      # tiles of 128 rows x 64 bf16 = 128 bytes, 128-byte swizzle
    kernel.launch(grid, map_x=map_x, ...)        # kernel side: const __grid_constant__ TensorMap map_x
    tma_load(tile, &map_x, barrier, column, row) # device coordinates count innermost first

`shape`, `strides` and `box` are written as in PyTorch, outermost first, in elements. A descriptor depends on nothing
but the arguments, the address included, so it is encoded once and then found in a bounded least-recently-used cache.
Each rule of the hardware is checked here with a sentence, because the driver answers all of them with
CUDA_ERROR_INVALID_VALUE.
"""

import ctypes
import functools
from typing import Any, NewType

import torch
from torch import Tensor

from supersonic_moe.jit import tape
from supersonic_moe.jit.driver import LaunchError, binding, error_text, make_context_current

TensorMap = NewType("TensorMap", bytes)
CACHED_MAPS = 4096

_DTYPES = {
    torch.bfloat16: "BFLOAT16",
    torch.float32: "FLOAT32",
    torch.int32: "INT32",
    torch.uint8: "UINT8",
    torch.int8: "UINT8",
    torch.float8_e4m3fn: "UINT8",
}
_SWIZZLES = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}
_L2_PROMOTIONS = {0: "NONE", 64: "L2_64B", 128: "L2_128B", 256: "L2_256B"}
_ALIGNMENT = 64  # of the descriptor itself


class TensorMapError(LaunchError, ValueError):
    """A tensor or tile that the TMA engine cannot address."""


def tensor_map(
    tensor: Tensor | int,
    box: tuple[int, ...],
    *,
    swizzle: int = 128,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
    l2_promotion: int = 256,
) -> TensorMap:
    """The descriptor for tiles of `box` elements of `tensor`.

    Args:
        tensor: a tensor of rank 1 to 5, or a device address, which then needs `dtype`, `shape` and `strides`; for a
            tensor these three default to its own.
        box: tile size; at most 256 in each dimension.
        swizzle: bytes of a swizzled line in shared memory: 128, 64, 32, or 0 for rows packed as they are. wgmma
            operands want 128.
        l2_promotion: bytes that an L2 miss fetches: 256, 128, 64, or 0 for just the sectors asked for.

    Elements outside the tensor are loaded as zeros.
    """
    if isinstance(tensor, Tensor):
        address = tensor.data_ptr()
        dtype = tensor.dtype if dtype is None else dtype
        shape = tensor.shape if shape is None else shape
        strides = tensor.stride() if strides is None else strides
    else:
        address = tensor
        if dtype is None or shape is None or strides is None:
            raise TensorMapError("a tensor map of a plain address needs dtype, shape and strides")
    made = _cached(address, dtype, shape, strides, box, swizzle, l2_promotion)
    recorder = tape.state.recorder
    if recorder is not None:
        tiles = dtype, shape, strides, box, swizzle, l2_promotion
        recorder.maps[made] = address, lambda elsewhere: _cached(elsewhere, *tiles)
    return made


@functools.lru_cache(maxsize=CACHED_MAPS)
def _cached(*tiles: Any) -> TensorMap:
    """``tiles``: the arguments of :func:`check`."""
    check(*tiles)
    address, dtype, shape, strides, box, swizzle, l2_promotion = tiles
    driver = binding()
    make_context_current(torch.cuda.current_device())
    rank = len(shape)
    outer_bytes = [_stride_bytes(dtype, shape, strides, axis) for axis in range(rank - 2, -1, -1)]
    storage = ctypes.create_string_buffer(128 + _ALIGNMENT)
    offset = -ctypes.addressof(storage) % _ALIGNMENT
    result = _encode_tiled()(
        ctypes.addressof(storage) + offset,
        int(getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_DTYPES[dtype]}")),
        rank,
        address,
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*outer_bytes),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{_SWIZZLES[swizzle]}")),
        int(getattr(driver.CUtensorMapL2promotion, f"CU_TENSOR_MAP_L2_PROMOTION_{_L2_PROMOTIONS[l2_promotion]}")),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    if result != 0:
        raise TensorMapError(
            f"the driver rejects a tensor map: {error_text(result)}; address {address:#x}, {dtype}, shape {shape}, "
            f"strides {strides}, box {box}, swizzle {swizzle}"
        )
    return TensorMap(storage.raw[offset : offset + 128])


def check(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    l2_promotion: int,
) -> None:
    """Raise TensorMapError with the rule, the value and the fix for whatever TMA cannot take."""
    rank = len(shape)
    if not 1 <= rank <= 5 or len(strides) != rank or len(box) != rank:
        raise TensorMapError(
            f"TMA takes 1 to 5 dimensions, with one stride and one box size for each; got shape {shape}, strides "
            f"{strides}, box {box}"
        )
    if dtype not in _DTYPES:
        raise TensorMapError(f"no tensor map for {dtype}; supported: {', '.join(str(known) for known in _DTYPES)}")
    if swizzle not in _SWIZZLES:
        raise TensorMapError(f"swizzle must be one of {sorted(_SWIZZLES)} bytes, got {swizzle}")
    if l2_promotion not in _L2_PROMOTIONS:
        raise TensorMapError(f"l2_promotion must be one of {sorted(_L2_PROMOTIONS)} bytes, got {l2_promotion}")
    if any(not 1 <= size <= 2**32 for size in shape):
        raise TensorMapError(
            f"each dimension must have 1 to 2**32 elements, got shape {shape}; skip the launch when empty"
        )
    if address == 0 or address % 16:
        raise TensorMapError(
            f"TMA reads from addresses that are multiples of 16 bytes, got {address:#x}; a slice of a larger tensor "
            "must start at such an element, or be cloned"
        )
    if strides[-1] != 1 and shape[-1] > 1:
        raise TensorMapError(
            f"the last dimension must be contiguous (stride 1), got strides {strides}; use .contiguous()"
        )
    for axis in range(rank - 1):
        stride = _stride_bytes(dtype, shape, strides, axis)
        if stride % 16 or not 0 <= stride < 2**40:
            raise TensorMapError(
                f"strides must be multiples of 16 bytes below 2**40, and dimension {axis} of shape {shape} has stride "
                f"{stride} bytes; pad the row length to a multiple of {16 // dtype.itemsize} elements"
            )
    if any(not 1 <= size <= 256 for size in box):
        raise TensorMapError(f"each side of the box must be 1 to 256 elements, got {box}")
    inner_bytes = box[-1] * dtype.itemsize
    if inner_bytes % 16:
        raise TensorMapError(
            f"a row of the box must be a multiple of 16 bytes, got {box[-1]} elements of {dtype} = {inner_bytes} bytes"
        )
    if swizzle and inner_bytes > swizzle:
        raise TensorMapError(
            f"with swizzle {swizzle} a row of the box has at most {swizzle} bytes, got {box[-1]} elements of {dtype} = "
            f"{inner_bytes}; load several boxes of {swizzle // dtype.itemsize} elements"
        )


def _stride_bytes(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> int:
    """Bytes from one index of `axis` to the next; any legal value for an axis of size 1, whose stride is never used."""
    return strides[axis] * dtype.itemsize if shape[axis] > 1 else 16


@functools.lru_cache(maxsize=1)
def _encode_tiled() -> Any:
    """cuTensorMapEncodeTiled through ctypes: it must write to memory aligned to 64 bytes, which the binding's own
    CUtensorMap object does not guarantee."""
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    words, halves = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, words, words, halves, halves,
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function
