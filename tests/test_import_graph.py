"""Imports go down only (docs/design.md, section 2): no module imports from a layer above its own, and none imports, by
whatever detour, what imports it. Every import statement counts: those inside functions and under ``TYPE_CHECKING`` too,
and names passed to ``import_module``. That a module runs the ``__init__`` of the packages it lies in does not count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import supersonic_moe

SOURCE = Path(supersonic_moe.__file__).parent

LAYERS = (
    "private_api",
    "checks",
    "config",
    "quantization.block_format",
    "autocast",
    "autograd",
    "jit",
    "ops",
    "kernels.interface",
    "kernels.alignment",
    "kernels.compose",
    "kernels.reference",
    "kernels.triton",
    "kernels.sm90",
    "kernels.registry",
    "kernels",
    "quantization.weight_cache",
    "quantization",
    "routing",
    "training",
    "inference",
    "grouped",
    "passed",
    "functional",
    "parallel.watch",
    "parallel.collectives",
    "parallel.symmetric",
    "parallel.copies",
    "parallel.push",
    "parallel.few_rows",
    "parallel.traffic",
    "parallel.transport",
    "parallel.overflow",
    "parallel.departures",
    "parallel.trip",
    "parallel.channel",
    "parallel.ranges",
    "parallel.beside",
    "parallel.exact_wire",
    "parallel.fp8_wire",
    "parallel.expert_parallel",
    "parallel.shard",
    "parallel.mega",
    "parallel.mega_deep_gemm",
    "parallel",
    "parts",
    "moe",
    "integrations",
    "integrations.transformers",
    "supersonic_moe",  # the public names
    "perf_model",
    "demo",
    "bench",
    "cli",
    "__main__",
)
"""From the ground up. An entry stands for a module or package and all in it that has no entry of its own."""

Graph = dict[str, set[str]]
"""Module -> the modules it imports, all of one package."""


def import_graph(package: Path) -> Graph:
    """The imports of a package from itself. Names leave out the package, which is called by its own name."""
    files = {_name(path, package): path for path in package.rglob("*.py")}
    found = {name: set(_imports(path, package, set(files))) - {name} for name, path in files.items()}
    return {_short(name): set(map(_short, targets)) for name, targets in found.items()}


def cycle(graph: Graph) -> list[str]:
    """Modules that import each other in a ring, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(graph: Graph, layers: Sequence[str]) -> list[str]:
    """What breaks the order of ``layers``, and modules that have no layer."""
    height = {name: _layer(name, layers) for name in graph}
    homeless = [f"{name} has no layer" for name in sorted(graph) if height[name] < 0]
    return homeless + [
        f"{name} imports {target}"
        for name in sorted(graph)
        for target in sorted(graph[name])
        if 0 <= height[name] < height[target]
    ]


def _layer(name: str, layers: Sequence[str]) -> int:
    """The index of the longest entry that is the module or a package around it; -1 if there is none."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((layers.index(prefix) for prefix in prefixes if prefix in layers), -1)


def _imports(path: Path, package: Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name in modules)
            case ast.ImportFrom(module=module, names=names, level=level):
                parts = path.relative_to(package.parent).parts
                base = ".".join(filter(None, (*parts[: len(parts) - level], module) if level else (module,)))
                targets = (f"{base}.{alias.name}" for alias in names)
                yield from (target for name in targets if (target := name if name in modules else base) in modules)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield from {name} & modules


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _short(name: str) -> str:
    return name.partition(".")[2] or name


def test_imports_go_down_and_never_in_a_circle() -> None:
    graph = import_graph(SOURCE)
    assert {"kernels.interface", "training.arguments"} <= graph["training.bf16"], "the imports are not found"
    assert not cycle(graph)
    assert not upward(graph, LAYERS)


HOUSE = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.roof import chimney\n",
    "ground.py": "import os\n",
    "walls/__init__.py": "",
    "walls/brick.py": "from house import ground\nfrom . import mortar\n",
    "walls/mortar.py": "import house.ground\n",
    "roof.py": "from house.walls.brick import ground\nfrom .walls import mortar\nchimney = 1\n",
}
FLOORS = ("ground", "walls.mortar", "walls", "roof", "house")
PLANTED = {
    "at the top": ("ground.py", "from house import roof", "ground imports roof"),
    "relative": ("walls/mortar.py", "from ..roof import chimney", "walls.mortar imports roof"),
    "in a function": ("ground.py", "def f():\n    import house.walls.brick", "ground imports walls.brick"),
    "for types": ("ground.py", "if TYPE_CHECKING:\n    from house.roof import x", "ground imports roof"),
    "public name": ("walls/brick.py", "from house import chimney", "walls.brick imports house"),
    "by name": ("ground.py", "importlib.import_module('house.walls')", "ground imports walls"),
    "inside a package": ("walls/mortar.py", "from .brick import x", "walls.mortar imports walls.brick"),
    "new": ("shed.py", "", "shed has no layer"),
}


def build(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "house"


def test_a_sound_house_passes(tmp_path: Path) -> None:
    graph = import_graph(build(tmp_path, HOUSE))
    assert graph == {
        "house": {"roof"},
        "ground": set(),
        "walls": set(),
        "walls.brick": {"ground", "walls.mortar"},
        "walls.mortar": {"ground"},
        "roof": {"walls.brick", "walls.mortar"},
    }
    assert not cycle(graph) and not upward(graph, FLOORS)


@pytest.mark.parametrize(("file", "line", "finding"), PLANTED.values(), ids=PLANTED)
def test_an_import_that_goes_up_is_found(tmp_path: Path, file: str, line: str, finding: str) -> None:
    graph = import_graph(build(tmp_path, HOUSE | {file: f"{HOUSE.get(file, '')}{line}\n"}))
    assert upward(graph, FLOORS) == [finding]


def test_a_circle_is_found(tmp_path: Path) -> None:
    graph = import_graph(build(tmp_path, HOUSE | {"walls/mortar.py": "def f():\n    from .brick import ground\n"}))
    ring = cycle(graph)
    assert ring[0] == ring[-1] and set(ring) == {"walls.brick", "walls.mortar"}


@pytest.mark.parametrize(
    ("imports", "too_heavy"),
    [
        ("from supersonic_moe import MoE, topk_experts, inference", ("torch._dynamo", "torch._inductor", "sympy")),
        ("from supersonic_moe.integrations import mlp_node", ("torch._dynamo", "torch._inductor", "sympy")),
        ("from supersonic_moe import parallel", ("torch._dynamo", "torch._inductor")),  # DTensor imports sympy
    ],
)
def test_nothing_imports_the_compiler_before_it_is_used(imports: str, too_heavy: tuple[str, ...]) -> None:
    """Which takes torch two seconds, sympy among it. A recorded call (the second of a kind) does not, either."""
    program = (
        f"import sys, torch, importlib.util; {imports}\n"
        "if importlib.util.find_spec('triton'): import supersonic_moe.kernels.triton\n"
        "from supersonic_moe.jit.tape import Recorder\n"
        "with Recorder([]) as recorder:\n    torch.empty(1)\n"
        f"print(len(recorder.made), [name for name in {too_heavy} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1 []"
