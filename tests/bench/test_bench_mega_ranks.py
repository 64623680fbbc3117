"""``bench mega`` over several ranks, as under torchrun: two processes on a CPU, over gloo."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mega_bench
import pytest
import results_files
import torch
from command_line import run, words
from ranks import end_ranks, run_ranks

pytest.importorskip("triton")

from supersonic_moe.bench import mega_figure, mega_ranks, readme
from supersonic_moe.bench.infer import InferResult
from supersonic_moe.bench.mega_cases import DEEP_GEMM, DIRECT, SHAPES, at_most_us, cases_of, must, of_ranks
from supersonic_moe.bench.report import OURS

CASES = ["tiny-R2_T1_uniform", "tiny-R2_T19_uniform", "tiny-positive-R2_T7_uniform"]


def outputs(function: Any, *args: Any) -> list[str]:
    """What each of two ranks printed, where all was well."""
    found = run_ranks(2, function, *args, backend=None)
    assert [code for code, _ in found] == [0, 0], found
    return [" ".join(output.split()) for _, output in found]


def test_two_ranks_and_the_peer_compute_the_same(tmp_path: Path) -> None:
    """All contenders are checked against experts in one place. Rows are those of both ranks, on the fuller one."""
    file, chart = tmp_path / "mega.json", tmp_path / "mega.png"
    for output in outputs(mega_bench.with_the_peer, (0, 1), "--json", str(file), "--png", str(chart)):
        assert "missing direct: ranks do not reach each other's memory" in output  # which a CPU's never do
        assert "missing deep_gemm_fused" not in output and "over 2 ranks" in output
    rows = json.loads(file.read_text())["rows"]
    assert [*dict.fromkeys(row["case"] for row in rows)] == CASES
    found = {(row["metric"], row["peer"]): row for row in rows if row["case"] == CASES[1]}
    assert 57 <= found["rows", DEEP_GEMM]["value"] < 2 * 57, "two ranks have 57 rows each on average"
    assert 0 < found["calc_diff", DEEP_GEMM]["value"] < 1e-5 and 0 < found["worst_row", DEEP_GEMM]["value"] < 0.005
    assert 0 < found["calc_diff", DEEP_GEMM]["peer_value"] < 0.001
    assert found["replay_us", DEEP_GEMM]["peer_value"] > 0 and found["replay_us", DIRECT]["peer_value"] is None
    assert chart.stat().st_size > 10_000


@pytest.mark.parametrize(("there", "said"), [((), ""), ((0,), "rank 1: ")])
def test_a_peer_that_a_rank_lacks_is_missing_on_all(there: tuple[int, ...], said: str) -> None:
    for output in outputs(mega_bench.with_the_peer, there):
        assert output.count(f"missing deep_gemm_fused: {said}ModuleNotFoundError: No module named 'deep_gemm'") == 3


def test_a_wrong_result_of_one_rank_has_no_time_and_other_cases_follow() -> None:
    for code, output in run_ranks(2, mega_bench.wrong_on, 1, "--peers", "none", backend=None):
        said = " ".join(output.split())
        assert code == 1 and said.count("No result") == 3, said
        assert all(f"No result: {case}: rank 1: ArithmeticError: wrong result" in said for case in CASES), said


def test_errors_are_those_of_the_rank_that_is_farthest_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that were timed and of those that were not; no number where a rank has none."""
    runner = mega_ranks.Runner(torch.device("cpu"), warm_ms=0, min_ms=0, peers=[])
    result = InferResult("c", {OURS: {"rows": 3.0}}, untimed={DEEP_GEMM: {"calc_diff": 0.02, "worst_row": 0.5}})
    other = {OURS: {"rows": 4.0}}, {DEEP_GEMM: {"calc_diff": math.nan, "worst_row": 0.4}}
    monkeypatch.setattr(runner, "_host", object())
    monkeypatch.setattr(mega_ranks, "told_by_all", lambda own, *_: [own, other])
    runner._take_largest(result)
    assert result.metrics == {OURS: {"rows": 4.0}}
    errors = result.untimed[DEEP_GEMM]
    assert math.isnan(errors["calc_diff"]) and errors["worst_row"] == 0.5


@pytest.mark.parametrize("where", ["the peer", "a check"])
def test_nobody_waits_for_ever_for_a_rank_that_is_stuck(where: str) -> None:
    """It prints where it is. Who waits for it in a call of the peer does, too; else it says whom it has waited for."""
    waits, stuck = end_ranks(2, mega_bench.stuck_on, 1, where, backend=None, timeout_s=40)
    assert stuck.exit_code == 1 and "Timeout" in stuck.stderr and "_stay" in stuck.stderr, stuck
    if where == "the peer":
        assert (waits.exit_code == 1 and "mega_bench.py" in waits.stderr) or waits.result[0] == 1, waits
    else:
        said = " ".join(waits.result[1].split())
        assert f"No result: {CASES[0]}: RuntimeError: another rank has ended, or has not come within 2 s." in said
        assert waits.result[0] == 1 and CASES[1] not in said.partition("Written: nothing. ")[0]


def test_a_case_is_the_share_of_a_rank() -> None:
    second = of_ranks(cases_of(SHAPES["pro"])[-1], 4, 2)
    assert str(second) == "pro-positive-R4_T1024_uniform"
    assert (second.shape.local, second.shape.rule.num_experts, second.offset) == (48, 192, 96)
    assert [at_most_us("flash-R2", t) for t in (16, 8192, 17)] == [235, 2480, None]
    assert at_most_us("flash-R4", 16) is None
    assert [must(t, 2) for t in (16, 256, 512, 1024, 8192)] == [1.1, 1.1, 1.25, 1.45, 1.45]


def test_a_timeline_is_of_one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    result = run("bench", "mega", "--device", "cpu", "--timeline", str(tmp_path / "t.png"))
    assert result.exit_code == 2 and "a timeline is of one rank; got 2. Leave --timeline out" in words(result)


def result_of(name: str, tokens: int, us: float, direct_us: float | None, peer_us: float) -> InferResult:
    case = of_ranks(cases_of(SHAPES[name], (tokens,))[0], 2, 0)
    times = {OURS: us, DIRECT: direct_us, DEEP_GEMM: peer_us}
    more = {"of_floor": 0.5, "host_us": 20.0, "calc_diff": 1e-5, "worst_row": 0.01}
    return InferResult(str(case), {c: {"replay_us": t, **more} for c, t in times.items() if t}, of=case)


def test_the_better_of_our_two_ways_is_held_against_the_bars() -> None:
    results = [result_of("flash", 16, 260, 220, 340), result_of("flash", 1024, 450, None, 680)]
    table = mega_figure.bars(results)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["direct µs"] == ["220", "-"]
    assert columns["at most µs"] == ["[green]235[/]", "[red]425[/]"]
    assert columns["ratio"] == ["1.55x", "1.51x"] and columns["must"] == ["[green]1.10x[/]", "[green]1.45x[/]"]
    left, right = mega_figure.draw(results, "title").axes
    assert list(left.lines[0].get_ydata()) == pytest.approx([340 / 220, 680 / 450])
    assert list(left.lines[1].get_ydata()) == [1.1, 1.45] and len(right.lines) == 3


def test_the_page_has_two_gpus_once_they_were_measured(tmp_path: Path) -> None:
    serving = next(page for page in readme.PAGES if page.block == "serving").text
    before = serving(tmp_path)
    path = tmp_path / readme.RESULTS / "mega-2gpu.json"
    results = [
        result_of("flash", 16, 260, 220, 340),
        result_of("flash", 1024, 430, None, 680),
        result_of("pro", 512, 800, 900, 990),
    ]
    results_files.write(path, "mega", results)
    text = serving(tmp_path)
    assert text.startswith(before) and "2 ranks, µs" not in before
    assert "| `flash-R2` | 16 | 260 | 220 | 235 | 50% | 340 | 1.55× |" in text
    assert "| `flash-R2` | 1024 | 430 | – | 425 | 50% | 680 | 1.58× |" in text
    assert "| `pro-R2` | 512 | 800 | 900 | 865 | 50% | 990 | 1.24× |" in text
    assert "no longer than it may in 2 of 3 rows" in text and "1.45× beyond, it reaches the goal in 2 of 3." in text


@pytest.mark.multigpu
def test_two_gpus_measure_both_ways_in_graphs(tmp_path: Path) -> None:
    """Two sizes: one that direct calls take, one that they do not."""
    file = tmp_path / "mega.json"
    options = ["--shape", "flash", "--tokens", "64", "--tokens", "512", "--min-ms", "1", "--warm-ms", "1"]
    ranks = {"backend": None, "gpu": True, "timeout_s": 300}
    for code, output in run_ranks(2, mega_bench.on_gpus, *options, "--json", str(file), **ranks):
        assert code == 0 and "missing direct" not in output, output
    rows = json.loads(file.read_text())["rows"]
    found = {row["case"]: row["peer_value"] for row in rows if (row["metric"], row["peer"]) == ("replay_us", DIRECT)}
    assert found["flash-R2_T64_uniform"] > 0 and "flash-R2_T512_uniform" not in found
