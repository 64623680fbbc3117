"""PTX of a kernel, and by which instructions it reads and writes memory that a parameter leads to. Needs no GPU.

    accesses(ptx(resolve(spec)), spec)      of each load and store: its instruction, and what its address is made of

An address is made of parameters, by their names: ``{"words", "rank"}`` is an entry of a table; ``*words`` stands for
what is read there, so ``{"*words", "rank"}`` is a word of a block that the table leads to, ``{"*words", "ids_at"}`` one
of the region that starts ``ids_at`` behind it. What else is read from memory is made of nothing. Control flow is left
out: an address has everything that it is made of on any way to the instruction.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from supersonic_moe.jit import nvrtc
from supersonic_moe.jit.signature import parse
from supersonic_moe.jit.spec import KernelSpec, Program, source_of

_MEMORY = ("ld.", "ldu.", "st.", "atom.", "red.", "cp.", "prefetch", "multimem.", "discard", "applypriority")
_WITHOUT_RESULT = ("st.", "red.", "bar", "bra", "setp", "cp.", "prefetch")
_INSTRUCTION = re.compile(r"^(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_REGISTER = re.compile(r"%(?:r|rd|rs|rb|f|fd|h)\d+\b")
_ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*-?\d+)?\s*\]")


class Access(NamedTuple):
    opcode: str
    made_of: frozenset[str]


def ptx(program: Program) -> str:
    """Raises where the program does not compile."""
    api, _ = nvrtc._load_nvrtc()
    texts = [text.encode() for text in program.headers.values()]
    names = [name.encode() for name in program.headers]
    _, made = api.nvrtcCreateProgram(program.source.encode(), b"kernel.cu", len(texts), texts, names)
    try:
        (result,) = api.nvrtcCompileProgram(made, len(program.options), [o.encode() for o in program.options])
        log = nvrtc._program_text(api, made, api.nvrtcGetProgramLogSize, api.nvrtcGetProgramLog)
        assert int(result) == 0, log
        return nvrtc._program_text(api, made, api.nvrtcGetPTXSize, api.nvrtcGetPTX)
    finally:
        api.nvrtcDestroyProgram(made)


def changed(program: Program, before: str, after: str) -> Program:
    """With another text in its source and headers, where it must have been."""
    texts = {name: text.replace(before, after) for name, text in program.headers.items()}
    made = replace(program, source=program.source.replace(before, after), headers=texts)
    assert made != program, f"nothing has {before!r}"
    return made


def accesses(text: str, spec: KernelSpec) -> list[Access]:
    """Those of the kernel of a spec, but for its parameters and what has no address in a register."""
    instructions = _instructions(text, spec.name)
    made_of = _made_of(instructions, spec)
    return [
        Access(opcode, frozenset(made_of[base]))
        for opcode, operands in instructions
        if opcode.startswith(_MEMORY) and not opcode.startswith("ld.param")
        for base in _ADDRESS.findall(operands)[:1]
    ]


def _instructions(text: str, kernel: str) -> list[tuple[str, str]]:
    """Opcode and operands."""
    found = re.search(rf"\.entry {kernel}\(.*?\n\{{\n(.*?)(?=\n\.visible |\Z)", text, re.DOTALL)
    assert found, f"no kernel {kernel}"
    code = re.sub(r"//[^\n]*", "", found[1])
    code = re.sub(r"^\s*(?:\$?\w+:|[{}])\s*$", "", code, flags=re.MULTILINE)  # labels, blocks of inline assembly
    lines = [match.groups() for part in code.split(";") if (match := _INSTRUCTION.match(part.strip()))]
    assert not any(opcode.startswith("call") for opcode, _ in lines), "a call, through which nothing is followed"
    return lines


def _made_of(lines: Sequence[tuple[str, str]], spec: KernelSpec) -> dict[str, set[str]]:
    """Of each register, until nothing is added any more: in a loop, it may come from behind."""
    parameters = parse(source_of(spec), spec.name).parameters
    tables = {parameter.name for parameter in parameters if parameter.declared.count("*") == 2}
    found: dict[str, set[str]] = defaultdict(set)
    steps = []
    for opcode, operands in lines:
        if opcode.startswith(_WITHOUT_RESULT):
            continue
        first, rest = _parted(operands)
        for target in _REGISTER.findall(first):
            if opcode.startswith("ld.param"):
                (index,) = re.findall(rf"\[{spec.name}_param_(\d+)", rest)
                found[target].add(parameters[int(index)].name)
            elif opcode.startswith(("ld", "atom")):
                steps.append((target, _ADDRESS.findall(rest)[:1], True))
            else:
                steps.append((target, _REGISTER.findall(rest), False))
    size = -1
    while size != (size := sum(map(len, found.values()))):
        for target, sources, read in steps:
            tags = {tag for source in sources for tag in found[source]}
            if read:
                inside = any(tag.startswith("*") for tag in tags)
                tags = set() if inside else {f"*{name}" for name in tags & tables}
            found[target] |= tags
    return found


def _parted(operands: str) -> tuple[str, str]:
    """The first operand, which may be several registers in braces, and the others."""
    end = max(operands.find("}"), 0) if operands.lstrip().startswith("{") else 0
    first, _, rest = operands[end:].partition(",")
    return operands[:end] + first, rest
