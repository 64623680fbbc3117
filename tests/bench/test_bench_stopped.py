"""A benchmark that ends before its last case: what it leaves and says, and who refuses its file."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import stopped_bench
from command_line import run
from ranks import run_ranks

from supersonic_moe.bench import kernel_figure, readme, report
from supersonic_moe.cli.bench import Rest

HEAD = ["suite", "command", "device", "torch", "commit", "date"]


def cups(folder: Path, end: str = "") -> tuple[int, str, dict[str, Any]]:
    """Exit code and output of ``bench cups``, and its file."""
    file = folder / "cups.json"
    given = ["--end", end] if end else []
    exit_code, output = stopped_bench.ended(folder, "bench", "cups", "--commit", "abc", "--json", str(file), *given)
    assert [path.name for path in folder.iterdir() if path.suffix == ".part"] == [], output
    return exit_code, output, json.loads(file.read_text())


def left_by_a_stop(folder: Path) -> Path:
    content = {**dict.fromkeys(HEAD, "x"), "missing_cases": ["lungo", "latte"], "rows": []}
    file = folder / "benchmarks" / "results" / "layer-bf16.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content | {"suite": "layer"}))
    return file


SENTENCE = "is of a run without a result for lungo, latte. Measure it again: x"


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_whole_run_has_no_word_of_cases_that_are_missing(tmp_path: Path) -> None:
    exit_code, output, content = cups(tmp_path)
    assert exit_code == 0 and list(content) == [*HEAD, "rows"], output
    assert [row["case"] for row in content["rows"]] == list(stopped_bench.CASES)
    assert f"Wrote {tmp_path / 'cups.json'}" in output and "Missing" not in output
    assert [line.count("left, about") for line in output.splitlines() if " s" in line and "left" in line] == [1]


@pytest.mark.parametrize(
    ("end", "exit_code", "stopped"),
    [
        ("KeyboardInterrupt", 130, "Stopped by Ctrl-C. "),
        ("SIGINT", 130, "Stopped by Ctrl-C. "),
        ("SIGTERM", 143, "Stopped by SIGTERM. "),
        ("two signals", 130, "Stopped by Ctrl-C. "),
        ("a call that does not end", 143, "Stopped by SIGTERM. "),
        ("the last case", 1, ""),
        ("SIGKILL", -signal.SIGKILL, None),
        ("an error", 1, None),
    ],
)
def test_whatever_ends_it_leaves_the_cases_before(
    end: str, exit_code: int, stopped: str | None, tmp_path: Path
) -> None:
    found, output, content = cups(tmp_path, end)
    assert found == exit_code and list(content) == [*HEAD, "missing_cases", "rows"], output
    assert content["missing_cases"] == ["lungo", "latte"]
    assert [row["case"] for row in content["rows"]] == ["espresso"]
    assert ("Traceback" in output) == (end == "an error")
    said = f"Written: {tmp_path / 'cups.json'}. Measured: 1 of 3 cases. Missing: lungo, latte."
    assert (said in output) == (stopped is not None)
    if stopped is not None:
        assert f"{stopped}{said}" in output.splitlines()


def test_a_stop_while_a_case_is_written_does_not_lose_it(tmp_path: Path) -> None:
    exit_code, output, content = cups(tmp_path, "while it is written")
    assert exit_code == 130 and "Measured: 2 of 3 cases. Missing: latte." in output
    assert [row["case"] for row in content["rows"]] == ["espresso", "lungo"] and content["missing_cases"] == ["latte"]


def test_a_case_without_a_result_is_named_when_all_others_have_one(tmp_path: Path) -> None:
    exit_code, output, content = cups(tmp_path, "no result")
    assert exit_code == 1 and "No result: no water" in output and "Measured: 2 of 3 cases. Missing: lungo." in output
    assert [row["case"] for row in content["rows"]] == ["espresso", "latte"]
    assert content["missing_cases"] == ["lungo"]


def test_without_a_file_it_says_that_nothing_is_written(tmp_path: Path) -> None:
    exit_code, output = stopped_bench.ended(tmp_path, "bench", "cups", "--end", "SIGTERM")
    assert exit_code == 143
    assert "Stopped by SIGTERM. Written: nothing. Measured: 1 of 3 cases. Missing: lungo, latte." in output


def test_of_several_ranks_the_first_one_writes_and_tells(tmp_path: Path) -> None:
    file = tmp_path / "cups.json"
    args = "--json", str(file), "--end", "KeyboardInterrupt"
    first, second = run_ranks(2, stopped_bench.of_rank, *args, backend=None)
    assert first[0] == second[0] == 130
    content = json.loads(file.read_text())
    assert content["commit"] == "of rank 0" and content["missing_cases"] == ["lungo", "latte"]
    assert "Written: " in first[1] and "Written: " not in second[1]


# ---- who reads it ----------------------------------------------------------------------------------------------------


def test_check_refuses_a_part_of_a_run(tmp_path: Path) -> None:
    file = left_by_a_stop(tmp_path)
    for fresh, committed in ((file, tmp_path), (tmp_path / file.name, file.parent)):
        other = tmp_path / file.name
        other.write_text(json.dumps({**dict.fromkeys(HEAD, "x"), "suite": "layer", "rows": []}))
        result = run("bench", "check", str(fresh), "--committed", str(committed), columns=400)
        assert result.exit_code == 1 and result.output == f"{file} {SENTENCE}\n"


def test_pages_refuse_a_part_of_a_run_and_none_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_a_stop(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    blocks: dict[Path, str] = {}
    for page in readme.PAGES:
        blocks[page.path] = blocks.get(page.path, "") + f"<!-- {page.block}:begin -->\n<!-- {page.block}:end -->\n"
    for path, text in blocks.items():
        path.write_text(text)
    with pytest.raises(SystemExit) as refused:
        readme.main()
    assert refused.value.code == f"benchmarks/results/layer-bf16.json {SENTENCE}"
    assert {path: path.read_text() for path in blocks} == blocks


def test_the_figure_of_kernels_refuses_a_part_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, figure = left_by_a_stop(tmp_path), tmp_path / "figure.png"
    monkeypatch.setattr("sys.argv", ["kernel_figure", str(file), str(figure)])
    with pytest.raises(SystemExit) as refused:
        kernel_figure.main()
    assert refused.value.code == f"{file} {SENTENCE}" and not figure.exists()


# ---- files and times -------------------------------------------------------------------------------------------------


def test_a_write_that_ends_early_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **options: Any) -> int:
        with self.open("w") as stream:
            stream.write(text[:2])
        raise OSError("No space left on device")

    file = tmp_path / "cups.json"
    report.write_json(file, {"old": 1})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        report.write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}


def test_links_are_followed_and_pipes_stay_pipes(tmp_path: Path) -> None:
    link, target, pipe = (tmp_path / name for name in ("link", "target", "pipe"))
    link.symlink_to(target)
    report.write_text(link, "text")
    assert link.is_symlink() and target.read_text() == "text"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        report.write_text(pipe, "text")
        assert os.read(reader, 9) == b"text" and stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(reader)


def test_the_rest_takes_as_long_as_cases_since_the_first() -> None:
    times = iter([300.0, 310.0, 330.0, 340.0])
    rest = Rest(4, lambda: next(times))
    assert [rest.after_a_case() for _ in range(4)] == [
        "",
        "; 2 cases left, about 20 s",
        "; 1 case left, about 15 s",
        "",
    ]
    times = iter([0.0, 100.0])
    rest = Rest(8, lambda: next(times))
    assert [rest.after_a_case() for _ in range(2)] == ["", "; 6 cases left, about 10 min"]
