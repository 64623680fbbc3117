"""The committed table of what every CUDA kernel configuration compiles to, and what has moved since.

A line of ``tests/kernels/sm90/sass_table.json`` is a spec: registers of a thread, instructions without NOP, how many
of them are of kinds that tell what a kernel does (tensor cores, TMA, barriers, memory, branches). No number may
change by more than 1 %, so one below a hundred may not change at all, unless the change says why. Spills and stack are
not listed: they are zero (sass.py).

``make sass-table`` writes the table again, and beside it ``sass_digests.json``: for each spec a digest of all that its
row follows from. What still has its digest need not be compiled again, as in the kernel cache (jit/cache.py).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sass import Compiled, compiled, opcodes

from supersonic_moe.jit import KernelSpec, compile_all, nvrtc_version
from supersonic_moe.jit.nvrtc import nvrtc_build
from supersonic_moe.jit.spec import resolve
from supersonic_moe.kernels.sm90 import registered_specs

FILE = Path(__file__).parents[1] / "kernels" / "sm90" / "sass_table.json"
DIGESTS = FILE.with_name("sass_digests.json")
ONE_IN = 16
"""Of the kernels that still have their digest are compiled all the same, lest somebody edit the table by hand."""
TOLERANCE = 0.01
COUNTED = (
    *("HGMMA", "QGMMA", "WARPGROUP"),  # wgmma in bf16 and e4m3, and waiting for it
    *("UTMALDG", "UTMASTG", "UTMAREDG", "LDGSTS"),  # TMA loads, stores and additions; cp.async
    *("SYNCS", "BAR", "WARPSYNC", "ELECT"),  # mbarriers, named barriers, one lane of a warp
    *("LDG", "STG", "LDS", "STS", "LDSM", "STSM"),  # global and shared memory
    *("SHFL", "PRMT", "BRA"),
    *("MUFU", "F2FP", "FFMA", "FMUL"),  # exp and reciprocal, conversion, fp32
)
Row = dict[str, int]


def row(kernel: Compiled) -> Row:
    registers = kernel.cubin.report.kernel(kernel.spec.name).registers
    # Where setmaxnreg moves registers from one warpgroup to another, ptxas reports what all of them start with.
    limit = 64 * 1024 // kernel.spec.threads // 8 * 8
    assert registers <= limit and (registers == limit or "USETMAXREG" not in kernel.listing), kernel.spec
    families: Counter[str] = Counter()
    for opcode, count in opcodes(kernel.listing).items():
        families[opcode.split(".")[0]] += count
    total = families.total() - families["NOP"]
    counted = {family: families[family] for family in COUNTED if families[family]}
    return {"registers": registers, "instructions": total, **counted}


def digest(spec: KernelSpec) -> str:
    """Of what the compiler gets, of the compiler, and of what ``compiled`` and ``row`` ask of the result."""
    return resolve(spec).digest(nvrtc_build(), str(spec.threads), *spec.opcodes)[:16]


def to_compile(specs: Sequence[KernelSpec], digests: Mapping[str, str]) -> list[KernelSpec]:
    """Those that are not what they were when ``digests`` were written, and some of the others, chosen by digest."""
    now = {spec: digest(spec) for spec in specs}
    return [spec for spec in specs if digests.get(str(spec)) != now[spec] or int(now[spec], 16) % ONE_IN == 0]


def moved(got: Row, want: Row) -> list[str]:
    """What differs by more than the tolerance: "SHFL 16 -> 18 (+12.5 %)"."""
    changes = []
    for name in dict.fromkeys([*want, *got]):
        old, new = want.get(name, 0), got.get(name, 0)
        if abs(new - old) > TOLERANCE * old:
            changes.append(f"{name} {old} -> {new}" + (f" ({new / old - 1:+.1%})" if old else ""))
    return changes


def load() -> tuple[tuple[int, int], dict[str, Row]]:
    """The NVRTC version whose code the table describes, and its rows by the names of their specs."""
    table = json.loads(FILE.read_text())
    return tuple(table["nvrtc"]), table["specs"]


def load_digests() -> dict[str, str]:
    """By the names of the specs."""
    digests: dict[str, str] = json.loads(DIGESTS.read_text())
    return digests


def dump(nvrtc: Sequence[int], rows: Mapping[str, Row]) -> str:
    """The file's text: one line a spec, so that a diff shows what moved."""
    lines = [f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in rows.items()]
    return f'{{"nvrtc": {json.dumps(list(nvrtc))}, "specs": {{\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    specs = list({str(spec): spec for spec in registered_specs()}.values())
    failed = [result for result in compile_all(specs, lambda done, total, _: say(done, total)) if result.error]
    if failed:
        sys.exit("\n".join(f"{result.spec}: {result.error}" for result in failed))

    before = load()[1] if FILE.is_file() else {}
    rows = {str(kernel.spec): row(kernel) for kernel in compiled(*specs)}
    FILE.write_text(dump(nvrtc_version(), rows))
    DIGESTS.write_text(json.dumps({str(spec): digest(spec) for spec in specs}, indent=0) + "\n")
    for name in dict.fromkeys([*before, *rows]):
        if name not in rows or name not in before:
            print(f"{name}: {'gone' if name in before else 'new'}")
        elif changes := moved(rows[name], before[name]):
            print(f"{name}: {', '.join(changes)}")
    print(f"{FILE}: {len(rows)} specs")


def say(done: int, total: int) -> None:
    print(f"\rcompiled {done} of {total} specs", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
