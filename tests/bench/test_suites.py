"""Suites as commands: their help, `bench all`, and that committed files could be measured again by their commands."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from command_line import run, words

import supersonic_moe
from supersonic_moe.bench import bar_chart, options, readme
from supersonic_moe.bench.layer import LayerConfig
from supersonic_moe.bench.layer_peers import PEERS
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.suite import Progress, Suite
from supersonic_moe.bench.suites import SUITES
from supersonic_moe.bench.timing import NoResultError
from supersonic_moe.cli import bench
from supersonic_moe.cli.app import app
from supersonic_moe.config.activation import ActivationType
from supersonic_moe.config.router import as_router

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))
    if not hasattr(group, "commands"):
        yield path, group


COMMANDS = dict(commands(typer.main.get_command(app)))


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_names_options_that_exist(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    known = {option for parameter in command.params for option in parameter.opts}
    texts = [command.help, *(parameter.help or "" for parameter in command.params)]
    assert set(itertools.chain.from_iterable(re.findall(r"--[a-z][a-z0-9-]*", text) for text in texts)) <= known


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("backend", list(supersonic_moe.KernelBackendMoE.__members__)),
        ("peers", list(PEERS)),
        ("activation", [activation.value for activation in ActivationType]),
        ("dtype", list(options.DTYPES)),
        ("router", None),
    ],
)
def test_help_lists_the_choices(option: str, choices: list[str] | None) -> None:
    if choices is None:
        with pytest.raises(ValueError, match="choose one of") as refused:
            as_router("dice")
        choices = str(refused.value).partition("choose one of ")[2].partition(", or pass")[0].split(", ")
    (text,) = (parameter.help for parameter in COMMANDS["bench", "layer"].params if parameter.name == option)
    assert [choice for choice in choices if not re.search(rf"\b{choice}\b", text)] == []


def test_each_suite_is_a_command_with_its_own_options_first() -> None:
    assert [path[1] for path in COMMANDS if path[0] == "bench"] == [*(kind.name for kind in SUITES), "all", "check"]
    for kind in SUITES:
        names = [parameter.name for parameter in COMMANDS["bench", kind.name].params]
        assert names[-3:] == ["device", "json", "commit"] and names[0] in vars(kind)
        assert all(kind(**differing).heading for differing in kind.files.values())


# ---- committed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_commands_of_committed_files_still_parse(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "execute", lambda suite, console: seen.append(suite) or True)
    content = readme.read(file)  # refuses a part of a run
    result = run(*shlex.split(content["command"])[1:])
    assert result.exit_code == 0, result.output
    (suite,) = seen
    assert suite.name == content["suite"] and suite.json == Path(file.name)


# ---- all -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Kettle(Suite[int, CaseResult]):
    """How long water takes to boil."""

    name = "kettle"
    files: ClassVar = {"kettle-full": {}, "kettle-empty": {"cups": 0}}

    cups: int = 2

    heading = "Water"
    method = "A watched pot."

    def cases(self) -> Sequence[int]:
        if not self.cups:
            raise ValueError("a kettle needs water; got none. Fill it.")
        return range(self.cups)

    def run(self, case: int, progress: Progress) -> CaseResult:
        progress("boiling")
        return CaseResult(f"cup{case}", {OURS: {"us": 180e6 + case}})


@dataclass(frozen=True, kw_only=True)
class Broken(Kettle):
    name = "broken"
    files: ClassVar = {"broken": {}}

    def run(self, case: int, progress: Progress) -> CaseResult:
        if case == 1:
            raise NoResultError("no power")
        return super().run(case, progress)


@pytest.mark.parametrize("kinds", [(Kettle,), (Kettle, Broken)], ids=["all is well", "a case without a result"])
def test_all_runs_every_suite_that_it_can(
    kinds: tuple[type[Kettle], ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SUITES", kinds)
    result = run("bench", "all", "--device", "cpu", "--commit", "abc", "--out", str(tmp_path / "new" / "results"))
    assert result.exit_code == len(kinds) - 1
    assert "skipped kettle-empty: a kettle needs water; got none. Fill it." in result.output
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "new" / "results").iterdir()}
    cups = {name: [row["case"] for row in content["rows"]] for name, content in files.items()}
    assert cups == {"kettle-full": ["cup0", "cup1"], **({"broken": ["cup0"]} if Broken in kinds else {})}
    assert {(content["suite"], content["commit"]) for content in files.values()} == {
        (kind.name, "abc") for kind in kinds
    }
    assert ("No result: no power" in result.output) == (Broken in kinds)


def test_a_case_says_what_it_spent_its_time_on() -> None:
    times = iter([0.0, 0.5, 8.5, 8.6, 12.5])
    stages = bench.Stages(lambda: next(times))
    for doing in ("building", "checking", "timing"):
        stages.begin(doing)
    stages.end()
    assert str(stages) == "12.5 s (building 8.0, timing 3.9)"


def test_all_does_not_skip_everything_for_a_wrong_device() -> None:
    result = run("bench", "all", "--device", "tpu")
    assert result.exit_code == 2 and "a device is cpu, cuda or cuda:N; got 'tpu'" in words(result)


def test_a_file_that_could_not_be_written_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(LayerConfig, "check", lambda self: pytest.fail("it started"))
    for option in ("--json", "--png"):
        result = run("bench", "layer", option, str(tmp_path / "file" / "layer"))
        assert result.exit_code == 2 and f"'{option}': cannot write to" in words(result)


# ---- bars ------------------------------------------------------------------------------------------------------------


def test_bars_have_whole_numbers_and_every_line_is_in_the_legend() -> None:
    slow, fast = {"tflops": 4.26}, {"tflops": 1051.4}
    results = [CaseResult("T1", {OURS: fast, "loop": slow}), CaseResult("T2", {OURS: fast}, {"loop": "out of memory"})]
    panels = [bar_chart.Panel("one", "tflops", results), bar_chart.Panel("other", "tflops", results[:1])]
    figure = bar_chart.draw(panels, "title", {"dense FP8 product": 1284.0, "dense BF16 product": 680.0})
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["1,051", "1,051", "4.3", "missing"]
    assert [text.get_text() for text in right.texts] == ["1,051", "4.3"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        OURS, "loop", "dense FP8 product: 1,284 TFLOP/s", "dense BF16 product: 680 TFLOP/s",
    ]  # fmt: skip
    assert len(left.lines) == len(right.lines) == 2
