"""The parameters of a kernel, read from its CUDA C++ text, and the Python function that is made of them.

    extern "C" __global__ void scale(const __grid_constant__ TensorMap map_x, float* out, const i32 rows, const u8* as)

becomes a function ``launch(grid, *, map_x, out, rows, as_, stream=None)`` whose body packs the four values into the
argument slots that the driver copies. So there is one list of parameters, in the .cu file; a name that is missing,
unknown or given twice is Python's own TypeError, which names the whole signature; and a launch costs no loop over
parameters. A name that is a word of Python gets an underscore: ``as_``.

    C++ type                       takes
    TensorMap                      what ``jit.tma.tensor_map`` returns
    any pointer                    a tensor on the current device, an address, or None for a null pointer
    i32, u32, i64, u64, int        an int that fits
    float                          a float or an int
"""

import functools
import keyword
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from supersonic_moe.jit.driver import LaunchError
from supersonic_moe.jit.spec import SpecError


class Kind(NamedTuple):
    """How the value of a parameter is stored: its letter for ``struct``, its bytes, and what Python passes."""

    code: str
    size: int
    takes: str


TENSOR_MAP = Kind("128s", 128, "a TensorMap")
POINTER = Kind("Q", 8, "a tensor, an address or None")
FLOAT = Kind("f", 4, "a float")
SCALARS = {
    "i32": Kind("i", 4, "an int of 32 bits"),
    "int": Kind("i", 4, "an int of 32 bits"),
    "u32": Kind("I", 4, "an unsigned int of 32 bits"),
    "i64": Kind("q", 8, "an int of 64 bits"),
    "u64": Kind("Q", 8, "an unsigned int of 64 bits"),
    "float": FLOAT,
    "TensorMap": TENSOR_MAP,
}
_QUALIFIERS = {"const", "__grid_constant__", "__restrict__"}
SLOT_ALIGNMENT = 64  # of a tensor map; everything else is aligned to its size


class Parameter(NamedTuple):
    name: str
    declared: str
    """Its type in the text, without qualifiers."""
    kind: Kind

    @property
    def keyword(self) -> str:
        """Its name in Python."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


class Signature(NamedTuple):
    kernel: str
    parameters: tuple[Parameter, ...]

    def __str__(self) -> str:
        return f"{self.kernel}({', '.join(f'{p.declared} {p.name}' for p in self.parameters)})"

    @property
    def sizes(self) -> list[int]:
        return [parameter.kind.size for parameter in self.parameters]

    def slots(self) -> tuple[struct.Struct, list[int]]:
        """The ``struct`` that fills one slot for each parameter, and the offsets of the slots."""
        code, size, offsets = "<", 0, []
        for _, _, kind in self.parameters:
            padding = -size % min(kind.size, SLOT_ALIGNMENT)
            offsets.append(size + padding)
            code += f"{padding}x{kind.code}" if padding else kind.code
            size += padding + kind.size
        return struct.Struct(code), offsets


def parse(text: str, kernel: str) -> Signature:
    """The signature of the ``extern "C" __global__`` function ``kernel`` in a .cu text."""
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    found = re.search(rf'extern\s+"C"\s+__global__\s[^;{{}}]*?\b{re.escape(kernel)}\s*\(([^()]*)\)\s*\{{', plain)
    if found is None:
        raise SpecError(f'the source has no extern "C" __global__ function {kernel}(...) with a body')
    declarations = [declaration for declaration in found[1].split(",") if declaration.strip()]
    return Signature(kernel, tuple(_parameter(declaration, kernel) for declaration in declarations))


def _parameter(declaration: str, kernel: str) -> Parameter:
    *words, name = [word for word in re.findall(r"\w+|\*", declaration) if word not in _QUALIFIERS]
    declared = " ".join(words).replace(" *", "*")
    kind = POINTER if declared.endswith("*") else SCALARS.get(declared)
    if kind is None or name == "stream":
        raise SpecError(
            f"{kernel}: a parameter is a pointer or one of {', '.join(SCALARS)}, and is not called stream; got "
            f"'{' '.join(declaration.split())}'"
        )
    return Parameter(name, declared, kind)


# ---- the launch function ---------------------------------------------------------------------------------------------


def launch_function(signature: Signature, threads: Any, make_slots: Callable[[int], Any]) -> Callable[..., None]:
    """``launch(grid, *, <parameters>, stream=None)``.

    ``threads.by_device[device]`` has this thread's argument slots for a device; ``make_slots(device)`` makes them at
    the first launch; their ``enqueue(grid, stream)`` launches what they hold. Tensors on the current device, None,
    plain ints and floats are packed as they come; then it is tried with addresses among the pointers; whatever else is
    passed is looked at one by one. (``struct`` alone would take a tensor of one element for a number, and wait for the
    device to read it.)
    """
    names = [p.keyword for p in signature.parameters]
    pointers = [p.keyword for p in signature.parameters if p.kind is POINTER]
    floats = [p.keyword for p in signature.parameters if p.kind is FLOAT]
    ints = [p.keyword for p in signature.parameters if p.kind not in (TENSOR_MAP, POINTER, FLOAT)]
    of_one_type = [
        " is ".join([f"type({name})" for name in numbers] + [python_type])
        for numbers, python_type in ((ints, "int"), (floats, "float"))
        if numbers
    ]

    def pack(known: str, address: str) -> str:
        """``known``: whether a pointer's value is one that ``address`` turns into a number."""
        conditions = [f"({known.format(name)})" for name in pointers] + of_one_type
        packed = ", ".join(address.format(name) if name in pointers else name for name in names)
        return f"""
        if not ({" and ".join(conditions) or True}):
            raise _PackError
        _slots.pack_into(_slots.buffer, _slots.offset, {packed})"""

    tensors = pack("{0} is None or {0}.get_device() == _device", "0 if {0} is None else {0}.data_ptr()")
    addresses = pack(
        "{0} is None or type({0}) is int or {0}.get_device() == _device",
        "0 if {0} is None else {0} if type({0}) is int else {0}.data_ptr()",
    )
    text = f"""
def launch(_grid, /, *, {"".join(f"{name}, " for name in names)}stream=None):
    if 0 in _grid:
        return
    _device = _cuda.current_device()
    _slots = _threads.by_device.get(_device) or _make_slots(_device)
    try:{tensors}
    except (AttributeError, _PackError):
        _pack_addresses(_device, _slots, {", ".join(names)})
    _slots.enqueue(_grid, stream)

def _pack_addresses({", ".join(["_device", "_slots", *names])}):
    try:{addresses}
    except (AttributeError, _PackError):
        _slots.pack_into(_slots.buffer, _slots.offset, *_converted(_device, [{", ".join(names)}]))
"""

    scope: dict[str, Any] = {
        "_threads": threads,
        "_make_slots": make_slots,
        "_converted": functools.partial(_converted, signature),
        "_cuda": torch.cuda,
        "_PackError": struct.error,
    }
    exec(compile(text, f"<launch of {signature.kernel}>", "exec"), scope)
    function: Callable[..., None] = scope["launch"]
    function.__qualname__ = str(signature)  # what Python's complaints about arguments begin with
    return function


def _converted(signature: Signature, device: int, values: list[Any]) -> list[Any]:
    """What ``struct`` packs for each value; LaunchError if one does not fit its parameter."""
    found = []
    for (name, _, kind), value in zip(signature.parameters, values, strict=True):
        if kind is POINTER and isinstance(value, torch.Tensor):
            if value.get_device() != device:
                raise LaunchError(
                    f"{signature}: {name} is a tensor on {value.device}, and the current device is cuda:{device}; move "
                    "the tensor, or launch inside `with torch.cuda.device(tensor.device)`"
                )
            value = value.data_ptr()
        elif kind is POINTER and value is None:
            value = 0
        if not _fits(kind, value):
            raise LaunchError(f"{signature}: {name} takes {kind.takes}; got {_described(value)}")
        found.append(value)
    return found


def _fits(kind: Kind, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return False
    try:
        struct.pack("<" + kind.code, value)
    except struct.error:
        return False
    return True


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"the {type(value).__name__} {value}" if isinstance(value, int | float) else f"a {type(value).__name__}"
