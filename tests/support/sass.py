"""SASS, the machine code of a GPU, as text and as counts: what the disassembler in the Triton wheel says of cubins.

Needs no GPU. The disassembler takes half a second to start and a tenth of one for a kernel, so give it many cubins in
one call: it gets the code of all their kernels in one piece.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from supersonic_moe.jit import KernelSpec
from supersonic_moe.jit.build import build
from supersonic_moe.jit.cache import Cubin

_INSTRUCTION_BYTES = 16
_INSTRUCTION = re.compile(r"^ *(/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ )?([\w.]+).*)", re.MULTILINE)


class Compiled(NamedTuple):
    spec: KernelSpec
    cubin: Cubin
    listings: dict[str, str]
    """The instructions of each kernel in the cubin, one a line."""

    @property
    def listing(self) -> str:
        """Of the kernel that the spec names."""
        return self.listings[self.spec.name]


def compiled(*specs: KernelSpec) -> list[Compiled]:
    """Each kernel, of which no function spills or has a stack, and which has every instruction that it is about."""
    cubins = [build(spec) for spec in specs]
    kernels = [Compiled(*kernel) for kernel in zip(specs, cubins, listings(c.image for c in cubins), strict=True)]
    faults = {str(kernel.spec): found for kernel in kernels if (found := _faults(kernel))}
    assert not faults, faults
    return kernels


def _faults(kernel: Compiled) -> list[str]:
    found = list(kernel.cubin.report.remarks)
    for r in kernel.cubin.report.kernels:
        if r.spill_store_bytes or r.spill_load_bytes or r.stack_bytes:
            found.append(f"{r.name} spills or has a stack: {r}")
    there = opcodes(kernel.listing)
    missing = [wanted for wanted in kernel.spec.opcodes if not any(opcode.startswith(wanted) for opcode in there)]
    return found + ([f"its SASS has no {missing}"] if missing else [])


def opcodes(listing: str) -> Counter[str]:
    """How often each instruction, with its modifiers (HGMMA.64x256x16.F32.BF16), stands there."""
    return Counter(opcode for _, opcode in _INSTRUCTION.findall(listing))


def listings(cubins: Iterable[bytes]) -> list[dict[str, str]]:
    """Of each cubin, the instructions of each kernel; skips the test where the Triton wheel has no disassembler."""
    codes = [_code(cubin) for cubin in cubins]
    whole = b"".join(code for kernels in codes for code in kernels.values())
    lines = iter([line for line, _ in _INSTRUCTION.findall(_disassembled(whole))])
    found = [
        {name: "\n".join(next(lines) for _ in range(len(code) // _INSTRUCTION_BYTES)) for name, code in kernels.items()}
        for kernels in codes
    ]
    assert next(lines, None) is None
    return found


def _code(cubin: bytes) -> dict[str, bytes]:
    """The machine code of each kernel: the sections .text.<kernel> of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, start, length in sections:
        at = sections[names][4] + name
        title = cubin[at : cubin.index(b"\0", at)].decode()
        if title.startswith(".text."):
            found[title.removeprefix(".text.")] = cubin[start : start + length]
    return found


def _disassembled(code: bytes) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.is_file():
        pytest.skip("this triton wheel ships no nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(code)
        file.flush()
        command = [tool, "--binary", "SM90a", file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
