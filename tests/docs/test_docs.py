"""The documents say what is true: snippets run, results are those of the files, and every name they use exists."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import supersonic_moe
from supersonic_moe.bench import readme
from supersonic_moe.bench.report import METRICS
from supersonic_moe.cli.app import app
from supersonic_moe.kernels import registry

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "supersonic_moe"
README = (ROOT / "README.md").read_text(encoding="utf-8")
KERNEL_TABLES = ROOT / "docs" / "kernels.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def section(title: str) -> str:
    """The text under a heading of the README, up to the next heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def first_cells(table: str) -> list[list[str]]:
    """The code spans in the first cell of each row."""
    return [code_spans(line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]


# ---- README ----------------------------------------------------------------------------------------------------------

SNIPPETS = [
    (match[2], README[: match.start(2)].count("\n")) for match in FENCE.finditer(README) if match[1] == "python"
]


def test_readme_has_snippets() -> None:
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize(("code", "lines_before"), SNIPPETS, ids=[f"line-{n + 1}" for _, n in SNIPPETS])
def test_snippet_runs(code: str, lines_before: int) -> None:
    exec(compile("\n" * lines_before + code, "README.md", "exec"), {"__name__": "snippet"})


def test_results_are_those_of_the_files() -> None:
    block = README.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()
    expected = readme.render(ROOT / readme.RESULTS)
    assert block == expected, "run `python -m supersonic_moe.bench.readme` and commit README.md"


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], set[str]]:
    """Path of every command -> its options."""
    if not hasattr(group, "commands"):
        return {path: {option for parameter in group.params for option in parameter.opts} | {"--help"}}
    return {k: v for name, command in group.commands.items() for k, v in commands(command, (*path, name)).items()}


def test_commands_are_those_of_the_program() -> None:
    known = commands(typer.main.get_command(app))
    lines = [line.partition(" #")[0] for match in FENCE.finditer(README) for line in match[2].splitlines()]
    named = set()
    for text in [*lines, *code_spans(README)]:
        call = re.match(r"(?:supersonic-moe|.*python -m supersonic_moe) (.*)", text)
        if call is None:
            continue
        words = call[1].split()
        path = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in known), None)
        if path is None:
            assert any(command[: len(words)] == tuple(words) for command in known), f"no such command: {text}"
            continue
        unknown = {word for word in words if word.startswith("--")} - known[path]
        assert not unknown, f"{text}: no option {unknown}"
        named.add(path)
    assert named == set(known)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    fenced = "\n".join(match[2] for match in FENCE.finditer(README))
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join([fenced, *code_spans(README)]), re.MULTILINE))
    assert named >= {"demo", "test", "test-gpu"}
    assert named <= targets


def environment_reads(path: Path) -> set[str]:
    """Names of the environment variables that a file reads, through `os.environ` or `os.getenv`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[key, *_]):
                names.append(key)
            case ast.Call(func=ast.Attribute(attr="getenv"), args=[key, *_]):
                names.append(key)
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=key):
                names.append(key)
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert len(names) == attributes.count("environ") + attributes.count("getenv"), (
        f"{path}: read variables by os.environ.get, os.environ[...] or os.getenv"
    )
    return {str(constants[key.id]) if isinstance(key, ast.Name) else ast.literal_eval(key) for key in names}


def test_environment_variables_are_those_that_are_read() -> None:
    read = set().union(*(environment_reads(path) for path in SOURCE.rglob("*.py")))
    text = section("Environment variables")
    assert {name for name in code_spans(text) if re.fullmatch(r"[A-Z][A-Z_]+", name)} == read
    ours = {name for name in read if name.startswith("SUPERSONIC_MOE_")}
    assert {name for cells in first_cells(text) for name in cells} == ours
    assert len(ours) <= 3


def test_every_public_name_is_listed() -> None:
    assert {name for cells in first_cells(section("Interface")) for name in cells} == set(supersonic_moe.__all__)


def test_every_dependency_is_justified() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["cuda13"]
    listed = [name for cells in first_cells(section("Install")) for name in cells]
    assert listed == [re.split(r"[^\w-]", requirement)[0] for requirement in wanted]


# ---- docs ------------------------------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    return [link for link in LINK.findall(FENCE.sub("", text)) if not re.match(r"https?:|mailto:", link)]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_resolve(document: Path) -> None:
    for link in links(document.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


def test_documents_link_each_other() -> None:
    assert {"docs/design.md", "docs/kernels.md", "docs/log.md", "CONTRIBUTING.md", "LICENSE"} <= set(links(README))


def test_every_kernel_has_a_row_with_its_test() -> None:
    rows = [links(line) for line in KERNEL_TABLES.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    tested = set()
    for found in filter(None, rows):
        paths = {(KERNEL_TABLES.parent / link).resolve() for link in found}
        assert any(path.is_relative_to(ROOT / "tests") for path in paths), f"a row without a test: {found}"
        tested |= paths
    folders = SOURCE / "kernels"
    files = {p for p in folders.rglob("*") if p.suffix in (".py", ".cu", ".cuh") and p.name != "__init__.py"}
    assert len(files) > 15
    assert not files - tested, "docs/kernels.md has no row for these"


def test_link_texts_name_the_files() -> None:
    text = KERNEL_TABLES.read_text(encoding="utf-8")
    named = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", text)
    assert len(named) > 40
    assert [name for name, link in named if not link.endswith(f"/{name}")] == []


def test_every_op_is_listed() -> None:
    defined = {
        op for path in SOURCE.rglob("*.py") for op in re.findall(r'"(supersonic_moe::\w+)"', path.read_text("utf-8"))
    }
    assert len(defined) >= 5
    assert {span for span in code_spans(KERNEL_TABLES.read_text("utf-8")) if "::" in span} == defined


def test_every_backend_function_is_described() -> None:
    pytest.importorskip("triton")
    functions = set(
        registry.kernels("sm90").experts.__all__
    )  # the others export the parts of what they compose as well
    fp8 = {name for name in functions if "_fp8" in name}
    assert functions <= set(registry.kernels("reference").experts.__all__)
    assert functions - fp8 <= set(registry.kernels("triton").experts.__all__)
    for document in ("kernels.md", "design.md"):
        assert functions <= set(code_spans((ROOT / "docs" / document).read_text(encoding="utf-8")))


# ---- the generator of the results block ------------------------------------------------------------------------------


def result_file(folder: Path, name: str = "layer-test", **changes: Any) -> None:
    def row(case: str, metric: str, value: float, peer: str, ratio: float | None) -> dict[str, Any]:
        return dict(case=case, metric=metric, value=value, unit="", peer=peer, peer_value=ratio, ratio=ratio)

    rows = [
        row(case, metric, value, peer, ratio)
        for case, us in (("T1", 2000.0), ("T2", 4000.0))
        for peer, speedup in (("loop", 2.0 if case == "T1" else 8.0), ("other", 1.5 if case == "T1" else None))
        for metric, value, ratio in (("fwd_bwd_us", us, speedup), ("mfu", 0.25, 9.0), ("watts", 700.0, None))
    ]
    content = dict(
        suite="layer", command="supersonic-moe bench layer", device="GPU", torch="2.11",
        commit="0123456789abcdef-dirty", date="2026-11-21T04:00:00+00:00", rows=rows,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content | changes))


def test_render_shows_values_ratios_and_where_they_come_from(tmp_path: Path) -> None:
    assert readme.render(tmp_path) == readme.NOTHING_YET
    result_file(tmp_path)
    origin, *table = [line for line in readme.render(tmp_path).splitlines() if line]
    assert origin == (
        "**layer-test** · GPU · torch 2.11 · commit `0123456789ab-dirty` · 2026-11-21 · `supersonic-moe bench layer`"
    )
    assert table[:-1] == [
        "| case | forward + backward, µs | MFU, % of 989 or 1979 TFLOP/s | vs loop | vs other |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `T1` | 2,000 | 25 | 2.00× | 1.50× |",
        "| `T2` | 4,000 | 25 | 8.00× | missing |",
        "| geometric mean |  |  | 4.00× | 1.50× (1 of 2) |",
    ]


def test_render_refuses_what_it_would_misread(tmp_path: Path) -> None:
    result_file(tmp_path, suite="bakery")
    with pytest.raises(ValueError, match=r"layer-test\.json is of suite 'bakery'.*SUITES"):
        readme.render(tmp_path)
    (tmp_path / "layer-test.json").write_text('{"usable": true}')
    with pytest.raises(ValueError, match=r"layer-test\.json must hold suite, command"):
        readme.render(tmp_path)


def test_update_replaces_the_block_and_nothing_else(tmp_path: Path) -> None:
    page, results = tmp_path / "README.md", tmp_path / "results"
    page.write_text(f"head\n{readme.BEGIN}\nold\n{readme.END}\ntail\n")
    result_file(results)
    assert readme.update(page, results)
    assert not readme.update(page, results)
    assert page.read_text() == f"head\n{readme.BEGIN}\n{readme.render(results)}\n{readme.END}\ntail\n"
    result_file(results, date="2027-01-01")
    assert readme.update(page, results) and "2027-01-01" in page.read_text()
    for broken in ("no markers", f"{readme.END}{readme.BEGIN}", f"{readme.BEGIN}{readme.BEGIN}{readme.END}"):
        page.write_text(broken)
        with pytest.raises(ValueError, match="each once"):
            readme.update(page, results)


def test_headlines_are_metrics_that_benchmarks_write() -> None:
    known = {metric.name: metric for metric in METRICS}
    for headline in readme.SUITES.values():
        assert all(known[name].label for name in headline.columns)
        assert headline.compared in headline.columns and known[headline.compared].better
