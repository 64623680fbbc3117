"""SASS, the machine code of a GPU, as text and as counts: what the disassembler in the Triton wheel says of a cubin.

Needs no GPU. One call takes half a second, nearly all of it the tool's start, so ask once for each cubin.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)")


def sass(cubin: bytes) -> str:
    """The text of cuobjdump; skips the test where the Triton wheel ships no such tool."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton wheel ships no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "--dump-sass", file.name], capture_output=True, check=True, text=True).stdout


def opcodes(text: str) -> dict[str, Counter[str]]:
    """How often each instruction, with its modifiers (HGMMA.64x256x16.F32.BF16), stands in each kernel of ``text``."""
    _, *sections = re.split(r"Function : (\w+)", text)
    return {name: Counter(_INSTRUCTION.findall(body)) for name, body in zip(sections[::2], sections[1::2], strict=True)}
