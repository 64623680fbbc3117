"""The documents say what is true: snippets run, results are those of the files, and every name they use exists."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import re
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import supersonic_moe
from supersonic_moe.bench import infer_page, readme, report
from supersonic_moe.bench.report import METRICS, CaseResult
from supersonic_moe.bench.timing import Paired
from supersonic_moe.cli import reference
from supersonic_moe.cli.app import app
from supersonic_moe.kernels.interface import CAPABILITIES, functions_of

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "supersonic_moe"
KERNEL_TABLES = ROOT / "docs" / "kernels.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
README, GUIDE, FEATURES, CLI = (TEXTS[name] for name in ("README.md", "guide.md", "features.md", "cli.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def section(text: str, title: str) -> str:
    """The text under a heading of a document, up to the next heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def first_cells(table: str) -> list[list[str]]:
    """The code spans in the first cell of each row."""
    return [code_spans(line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]


# ---- what the pages for users say ------------------------------------------------------------------------------------

SNIPPETS = [
    pytest.param(name, text, match, id=f"{name}-{text[: match.start(2)].count(chr(10)) + 1}")
    for name, text in TEXTS.items()
    for match in FENCE.finditer(text)
    if match[1] == "python"
]


def test_pages_have_snippets() -> None:
    assert len(SNIPPETS) >= 8


@pytest.mark.parametrize(("name", "text", "match"), SNIPPETS)
def test_snippet_runs(name: str, text: str, match: re.Match[str]) -> None:
    lines_before = text[: match.start(2)].count("\n")
    module = {"__name__": "snippet", "__file__": str(ROOT / name)}
    exec(compile("\n" * lines_before + match[2], name, "exec"), module)


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.path.name)
def test_results_are_those_of_the_files(page: readme.Page) -> None:
    found = readme.block(ROOT / page.path, page.block)
    assert found == page.text(ROOT), "run `python -m supersonic_moe.bench.readme` and commit the pages"


def test_options_are_those_of_the_program() -> None:
    found = readme.block(ROOT / reference.PAGE, reference.BLOCK)
    assert found == reference.reference(), "run `python -m supersonic_moe.cli.reference` and commit docs/cli.md"


def test_readme_is_one_screenful_of_pages() -> None:
    assert len(README.splitlines()) <= 220
    assert not re.search(r"!\[[^\]]*\]\((?!https)", README), "PyPI shows no image of the repository"


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], set[str]]:
    """Path of every command -> its options."""
    if not hasattr(group, "commands"):
        return {path: {option for parameter in group.params for option in parameter.opts} | {"--help"}}
    return {k: v for name, command in group.commands.items() for k, v in commands(command, (*path, name)).items()}


def test_commands_are_those_of_the_program() -> None:
    known = commands(typer.main.get_command(app))
    named = set()
    for name in (
        "README.md",
        "guide.md",
        "features.md",
        "cli.md",
        "troubleshooting.md",
        "results.md",
        "CONTRIBUTING.md",
    ):
        lines = [line.partition(" #")[0] for match in FENCE.finditer(TEXTS[name]) for line in match[2].splitlines()]
        for text in [*lines, *code_spans(TEXTS[name])]:
            call = re.match(r"(?:supersonic-moe|.*python3? -m supersonic_moe) (.*)", text)
            if call is None:
                continue
            words = call[1].split()
            path = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in known), None)
            if path is None:
                assert any(command[: len(words)] == tuple(words) for command in known), f"{name}: no command {text}"
                continue
            unknown = {word for word in words if word.startswith("--")} - known[path]
            assert not unknown, f"{name}: {text}: no option {unknown}"
            named.add(path)
    assert named == set(known)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = "\n".join([README, TEXTS["CONTRIBUTING.md"]])
    fenced = "\n".join(match[2] for match in FENCE.finditer(text))
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join([fenced, *code_spans(text)]), re.MULTILINE))
    assert named >= {"demo", "test", "test-gpu", "docs"}
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
    text = section(CLI, "Environment variables")
    assert {name for name in code_spans(text) if re.fullmatch(r"[A-Z][A-Z_]+", name)} == read
    ours = {name for name in read if name.startswith("SUPERSONIC_MOE_")}
    assert {name for cells in first_cells(text) for name in cells} == ours
    assert len(ours) <= 3


def test_every_public_name_is_listed() -> None:
    assert {name for cells in first_cells(section(GUIDE, "Interface")) for name in cells} == set(supersonic_moe.__all__)


def test_every_dependency_is_justified() -> None:
    extras = PROJECT["optional-dependencies"]
    for_users = [extras[name] for name in extras if name not in ("test", "test-cpu", "lint", "dev")]
    wanted = {
        re.split(r"[^\w-]", requirement)[0] for extra in (PROJECT["dependencies"], *for_users) for requirement in extra
    }
    listed = [name for cells in first_cells(section(FEATURES, "What it needs")) for name in cells]
    assert sorted(listed) == sorted(wanted)


# ---- one source of the version, and other habits ---------------------------------------------------------------------


def test_the_version_is_written_once() -> None:
    assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
    try:
        installed = importlib.metadata.distribution("supersonic-moe")
    except importlib.metadata.PackageNotFoundError:
        return  # the tests run from a checkout
    if installed.locate_file("supersonic_moe/__init__.py") == SOURCE / "__init__.py":
        assert installed.version == supersonic_moe.__version__


def test_the_changelog_has_this_version_or_is_about_to() -> None:
    changelog = TEXTS["CHANGELOG.md"]
    headings = re.findall(r"^## \[(.*?)\]", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert supersonic_moe.__version__ in headings or f"What will be {supersonic_moe.__version__}" in changelog


def test_commit_hooks_run_the_tools_of_make_lint() -> None:
    yaml = pytest.importorskip("yaml")
    (source,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert source["repo"] == "local", "a hook that brings its own version disagrees with `make lint` one day"
    tools = {hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in source["hooks"]}
    linted = re.findall(
        r"^\t@\$\(VENV\)/bin/((?:ruff|mypy)[a-z ]*)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE
    )
    assert tools == {line.strip() for line in linted}


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
    pages = {str(path.relative_to(ROOT)) for path in DOCUMENTS} - {"README.md"}
    linked = {link.partition("#")[0] for link in links(README)}
    for page in ("docs/design.md", "docs/kernels.md", "docs/results.md", "docs/guide.md"):  # pages of a second row
        linked |= {f"docs/{link.partition('#')[0]}" for link in links(TEXTS[Path(page).name])}
    assert pages | {"LICENSE"} <= linked, f"no way leads to {pages - linked}"


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


def test_tests_that_are_named_are_in_the_files_that_are_named() -> None:
    named = [
        (document, name, document.parent / target)
        for document, text in zip(DOCUMENTS, TEXTS.values(), strict=True)
        for name, target in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", text)
    ]
    assert len(named) > 20
    missing = [(str(d), name) for d, name, path in named if f"def {name}(" not in path.read_text(encoding="utf-8")]
    assert missing == []


def test_every_op_is_listed() -> None:
    for module in ("grouped", "moe", "inference"):
        importlib.import_module(f"supersonic_moe.{module}")
    defined = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("supersonic_moe::")}
    assert len(defined) >= 5
    assert {span for span in code_spans(TEXTS["kernels.md"]) if "::" in span} == defined


def test_every_backend_function_is_described() -> None:
    pytest.importorskip("triton")
    functions = {name for protocol in CAPABILITIES.values() for name in functions_of(protocol)}
    assert len(functions) > 20
    for document in ("kernels.md", "design.md"):
        assert functions <= set(code_spans(TEXTS[document]))


# ---- the generator of the results ------------------------------------------------------------------------------------


def row(case: str, metric: str, value: float, peer: str | None = None, ratio: float | None = None) -> dict[str, Any]:
    return dict(case=case, metric=metric, value=value, unit="", peer=peer, peer_value=ratio, ratio=ratio)


def result_file(folder: Path, name: str = "layer-test", **changes: Any) -> None:
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


def test_results_show_values_ratios_and_where_they_come_from(tmp_path: Path) -> None:
    folder, page = tmp_path / "benchmarks", tmp_path / "docs" / "results.md"
    folder.mkdir()
    assert readme.results(folder, page) == readme.NOTHING_YET
    result_file(folder)
    title, origin, *table = [line for line in readme.results(folder, page).splitlines() if line]
    assert title == "### layer-test"
    assert origin == (
        "GPU, torch 2.11, commit `0123456789ab-dirty`, 2026-11-21. Measured by `supersonic-moe bench layer`."
    )
    assert table[:-1] == [
        "| case | forward + backward, µs | MFU, % of 989 or 1979 TFLOP/s | vs loop | vs other |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `T1` | 2,000 | 25 | 2.00× | 1.50× |",
        "| `T2` | 4,000 | 25 | 8.00× | missing |",
        "| geometric mean |  |  | 4.00× | 1.50× (1 of 2) |",
    ]
    (folder / "layer-test.png").touch()
    assert "](../benchmarks/layer-test.png)" in readme.results(folder, page)


def test_cases_without_the_compared_metric_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    whole = row("T1", "fwd_bwd_us", 2000.0, "one-gpu", 0.5)
    parts = [row("T1_2-parts", metric, 400.0, "one-launch", 0.75) for metric in ("products_us", "fwd_spread")]
    result_file(tmp_path, suite="ep", rows=[whole, *parts])
    lines = [line for line in readme.results(tmp_path, tmp_path / "results.md").splitlines() if line][2:]
    assert lines == [
        "| case | forward + backward, µs | vs one-gpu |",
        "| --- | ---: | ---: |",
        "| `T1` | 2,000 | 0.50× |",
        "| case | FP8 products, µs | vs one-launch |",
        "| --- | ---: | ---: |",
        "| `T1_2-parts` | 400 | 0.75× |",
        "*vs*: forward + backward, µs (where a table lacks it: FP8 products, µs) of that peer over ours, "
        "in the same run.",
    ]


def test_inference_names_the_fastest_of_the_others(tmp_path: Path) -> None:
    assert readme.inference(tmp_path) == infer_page.NOT_RUN
    made = [
        CaseResult("T1", {"ours": {"hits": 4, "floor_us": 40.0, "replay_us": 50.0}, "a": {"replay_us": 75.0},
                          "b": {"replay_us": 60.0}}, {"c": "not installed"}),
        CaseResult("T2", {"ours": {"replay_us": 100.0, "eager_us": 100.0}, "a": {"replay_us": 101.0},
                          "b": {"replay_us": 300.0, "eager_us": 400.0}}),
        CaseResult("T3", {"ours": {"replay_us": 100.0}, "a": {"replay_us": 90.0}, "b": {"replay_us": 95.0}}),
        CaseResult("T4", {"ours": {"replay_us": 100.0}}, {"a": "I is 192", "b": "I is 192"}),
        CaseResult("fit", {"ours": {"fixed_us": 12.0, "hit_us": 10.5}, "a": {"fixed_us": 30.0, "hit_us": 10.75}}),
    ]  # fmt: skip
    rows = [asdict(row) for result in made for row in report.rows(result)]
    result_file(tmp_path, "infer-ds", suite="infer", rows=rows)
    text = readme.inference(tmp_path)
    mean = (1.2 * 1.01 * 0.9) ** (1 / 3)
    assert (
        "In a CUDA graph, ours takes less time than every other in 2 of 3 cases (1 of them by less than 2 %), "
        f"the geometric mean over the fastest of the others is {mean:.2f}×. Ahead of ours: a at `T3` (0.900×)."
    ) in text.splitlines()
    assert "Eager, ours takes less time than every other in 1 of 1 cases" in text
    both = [f"{(1.5 * 1.01 * 0.9) ** (1 / 3):.2f}", f"{(1.2 * 3 * 0.95) ** (1 / 3):.2f}"]
    assert f"| a | {both[0]}× (3 of 4) | 0.90 to 1.50 | missing | – |" in text
    assert f"| b | {both[1]}× (3 of 4) | 0.95 to 3.00 | 4.00× | 4.00 to 4.00 |" in text
    assert "| `T1` | 4 | – | 40 | 50 | – | – | – | b | 1.20× |" in text
    assert "| `T4` | – | – | – | 100 | – | – | – | – | – |" in text
    assert "| `fit` | 12.0 + 10.50 × hits | a: 30.0 + 10.75 |" in text


def test_backends_of_transformers_are_compared_and_who_is_ahead_is_named(tmp_path: Path) -> None:
    assert readme.transformers(tmp_path) == readme.NO_TRANSFORMERS
    ours, theirs = {"infer_us": 50.0, "graph_us": 20.0}, {"infer_us": 45.0, "graph_us": 30.0}
    decode = CaseResult("m/layers/decode_T8", {"ours": ours, "b": theirs, "c": {"infer_us": 100.0}})
    train = [
        CaseResult(at, {"ours": {"fwd_bwd_us": 9e3}, "ours-FP8": {"fwd_bwd_us": 8e3}}, {"c": "no"})
        for at in ("m/model/train_T2048", "n/model/train_T512", "m/model/train_T512", "m/model/train_T8192")
    ]
    for name, results in (("layers", [decode]), ("model", train)):
        rows = [asdict(row) for result in results for row in report.rows(result)]
        result_file(tmp_path, f"transformers-{name}", suite="transformers", rows=rows)
    text = readme.transformers(tmp_path)
    assert "| model | ours, µs | vs b | vs c | in a graph: ours, µs | vs b |" in text
    assert "| m, T 8 | 50 | 0.90× | 2.00× | 20 | 1.50× |" in text
    steps = [line for line in text.splitlines() if line.endswith("| 9,000 | 0.89× |")]
    assert [line.split(" | ")[0] for line in steps] == ["| m, T 512", "| m, T 2048", "| m, T 8192", "| n, T 512"]
    assert text.endswith("Ahead of ours: b at `m/layers/decode_T8` (0.90×).")


def test_pairs_decide_who_is_ahead_in_training(tmp_path: Path) -> None:
    at = "m/layers/train_T512"
    once = CaseResult(at, {"ours": {"fwd_bwd_us": 100.0}, "b": {"fwd_bwd_us": 99.0}})
    often = CaseResult(at, {"ours": {"fwd_bwd_us": 102.0}, "b": {"fwd_bwd_us": 103.0}})
    often.pairs["fwd_bwd_us", "b"] = Paired(1.011, 1.002, 1.02)
    decode = CaseResult("m/layers/decode_T1", {"ours": {"infer_us": 50.0}, "b": {"infer_us": 60.0}})
    decode.pairs["infer_us", "b"] = Paired(1.2, 1.1, 1.3)  # few slices are enough for an interval
    for name, results in (("pairs", [often, decode]), ("layers", [once])):
        rows = [asdict(row) for result in results for row in report.rows(result)]
        result_file(tmp_path, f"transformers-{name}", suite="transformers", rows=rows)
    text = readme.transformers(tmp_path)
    assert "| m, T 512 | 100 | 0.99× |" in text
    assert f"| `{at}` | 102 | 1.011 (1.002–1.020) |" in text
    assert "| m, T 1 | 50 | 1.20× |" in text and "`m/layers/decode_T1`" not in text
    assert text.endswith("No other backend is ahead of ours in any case.")


def test_results_refuse_what_they_would_misread(tmp_path: Path) -> None:
    result_file(tmp_path, suite="bakery")
    with pytest.raises(ValueError, match=r"layer-test\.json is of suite 'bakery'.*SUITES"):
        readme.results(tmp_path, tmp_path)
    (tmp_path / "layer-test.json").write_text('{"usable": true}')
    with pytest.raises(ValueError, match=r"layer-test\.json must hold suite, command"):
        readme.results(tmp_path, tmp_path)


def test_the_headline_joins_both_precisions_and_compares_within_a_run_only(tmp_path: Path) -> None:
    assert readme.headline(tmp_path) == readme.NOTHING_YET
    slow = [row("T1", "fwd_bwd_us", 3000, "grouped_mm", 1.5), row("T1", "fwd_bwd_tflops", 600, "grouped_mm", 1.5)]
    other = [row("T1", "fwd_bwd_us", 3000, "torch_loop", 9.9)]
    fast = [row("T1_fp8", "fwd_bwd_us", 2000, "ours-BF16", 1.6), row("T1_fp8", "fwd_bwd_tflops", 900, "ours-BF16", 1.6)]
    result_file(tmp_path, "layer-bf16", rows=[*slow, *other])
    result_file(tmp_path, "layer-fp8", rows=fast, date="2026-11-22T04:00:00+00:00")
    plain = [row("ref_up", "us", 1.0, "deep_gemm", 2.0), row("pro_l1", "us", 1.0, "deep_gemm", 0.5)]
    added = [row("ref_dw1_accumulate", "us", 1.0, "deep_gemm", 9.0), row("ref_up", "us", 1.0, "torch_grouped_mm", 9.0)]
    result_file(tmp_path, "gemm-bf16", suite="gemm", rows=[*plain, *added])
    head, _, line, _, sources = readme.headline(tmp_path).splitlines()
    assert head == "| layer | BF16, µs | TFLOP/s | vs torch | FP8, µs | TFLOP/s | vs our BF16 |"
    assert line == "| T1 | 3,000 | 600 | 1.50× | 2,000 | 900 | 1.60× |"
    assert "2026-11-21" in sources and "2026-11-22" in sources
    assert sources.endswith(
        "Grouped GEMMs alone against DeepGEMM, geometric mean within one run: 1.00× in BF16 (2 shapes, commit "
        "`0123456789ab-dirty`, 2026-11-21)."
    )
    replays = [row("T1", "replay_us", 50.0, peer, ratio) for peer, ratio in (("a", 1.5), ("b", 1.25))]
    result_file(tmp_path, "infer-ds", suite="infer", rows=replays)
    assert "in 1 of 1 cases of DeepSeek-V3's experts (geometric mean 1.25×)" in readme.headline(tmp_path)


def test_put_replaces_the_block_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- a:begin -->\nold\n<!-- a:end -->\n<!-- b:begin -->\n<!-- b:end -->\ntail\n")
    assert readme.put(page, "a", "new\nlines")
    assert not readme.put(page, "a", "new\nlines")
    assert page.read_text() == (
        "head\n<!-- a:begin -->\nnew\nlines\n<!-- a:end -->\n<!-- b:begin -->\n<!-- b:end -->\ntail\n"
    )
    assert readme.block(page, "a") == "new\nlines"
    begin, end = "<!-- a:begin -->", "<!-- a:end -->"
    for broken in ("no markers", f"{end}{begin}", f"{begin}{begin}{end}"):
        page.write_text(broken)
        with pytest.raises(ValueError, match="each once"):
            readme.put(page, "a", "new")


def test_headlines_are_metrics_that_benchmarks_write() -> None:
    known = {metric.name: metric for metric in METRICS}
    for shown in readme.SUITES.values():
        assert all(known[name].label for name in shown.columns)
        assert shown.compared in shown.columns and known[shown.compared].better
