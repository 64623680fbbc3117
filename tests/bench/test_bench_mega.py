"""The mega suite without a GPU: its cases, floors and bars, a run on a CPU, and the peer's pipeline on a stand-in."""

from __future__ import annotations

import itertools
import json
import sys
from math import nan
from pathlib import Path

import deep_gemm_stand_in
import pytest
import results_files
import torch
from command_line import run, words

pytest.importorskip("triton")

from supersonic_moe.bench import (
    infer,
    infer_peers,
    mega,
    mega_cases,
    mega_figure,
    mega_timeline,
    readme,
    report,
)
from supersonic_moe.bench.infer import InferResult
from supersonic_moe.bench.infer_cases import InferCase, random_experts, workload
from supersonic_moe.bench.infer_parts import Call
from supersonic_moe.bench.mega_cases import DEEP_GEMM, DIRECT, OPERATOR, SHAPES, cases_of, must
from supersonic_moe.bench.mega_timeline import spans_of
from supersonic_moe.bench.report import OURS
from supersonic_moe.bench.timing import NoResultError

CPU = torch.device("cpu")
TINY = mega_cases.CPU_CASES[0].shape
QUICK = ["--device", "cpu", "--min-ms", "0", "--warm-ms", "0"]


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "HOST_CALLS", 1)
    monkeypatch.setattr(infer, "EAGER_CALLS", 1)


def work(tokens: int) -> infer.Workload:
    return workload(InferCase(TINY, tokens), random_experts(TINY, CPU), CPU)


def test_cases_are_those_of_the_published_tables_and_one_of_one_sign() -> None:
    names = [str(case) for shape in SHAPES.values() for case in cases_of(shape)]
    assert len(names) == len(set(names)) == 4 * 8
    assert names[:2] == ["flash_T16_uniform", "flash_T64_uniform"] and names[7] == "flash-positive_T1024_uniform"
    assert [(s.hidden, s.inter, s.local, s.rule.top_k) for s in SHAPES.values()] == [
        (4096, 2048, 32, 6), (7168, 3072, 48, 6), (4096, 2048, 32, 8), (6144, 2048, 48, 8)
    ]  # fmt: skip
    assert [must(t) for t in mega_cases.TOKENS] == [1.1] * 3 + [1.25] * 2 + [1.35] * 2


def test_a_floor_is_memory_for_few_rows_and_products_for_many() -> None:
    flash = SHAPES["flash"]
    moved, us = flash.floor(16, 30, 96)
    assert moved == 30 * flash.expert_bytes + 16 * (3 * 4096 + 4 * 32 + 8 * 6)
    assert us == pytest.approx(moved / 4.26e6)
    assert flash.floor(8192, 32, 8192 * 6)[1] == pytest.approx(1979, rel=1e-3)  # 2.474 TFLOP at 1250 TFLOP/s


def test_a_run_on_a_cpu_writes_its_file_and_its_figure(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("mega.json", "mega.png", "timeline.png")]
    options = ["--commit", "c", "--json", files[0], "--png", files[1], "--timeline", files[2]]
    result = run("bench", "mega", *QUICK, *options)
    assert result.exit_code == 0, result.output
    assert "CUDA-graph replays" not in result.output  # there are none
    rows = json.loads(Path(files[0]).read_text())["rows"]
    assert [*dict.fromkeys(row["case"] for row in rows)] == [
        "tiny_T1_uniform", "tiny_T19_uniform", "tiny-positive_T7_uniform"
    ]  # fmt: skip
    found = {row["metric"]: row for row in rows if row["case"] == "tiny_T19_uniform"}
    assert {"hits", "rows", "replay_us", "host_us", "floor_us", "of_floor", "worst_row"} <= set(found)
    assert found["rows"]["value"] == 57 and found["replay_us"]["peer"] == OPERATOR
    assert 0 < found["calc_diff"]["value"] < 1e-5 and 0 < found["worst_row"]["value"] < 0.005  # a rounding to bf16
    assert all(Path(file).stat().st_size > 10_000 for file in files[1:])


def test_unknown_options_are_refused() -> None:
    for option, given, said in (
        ("--shape", "small", "a shape is one of flash, pro"),
        ("--tokens", "0", "tokens must be at least 1; got 0"),
        ("--tokens", "5", "a CPU runs three tiny cases of its own. Leave --shape and --tokens out"),
        ("--peers", "nobody", "peers are moe_fp8_topk,direct,deep_gemm_fused or none"),
    ):
        result = run("bench", "mega", *QUICK, option, given)
        assert result.exit_code == 2 and said in words(result)


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_peer_computes_the_same(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm_stand_in.module())
    monkeypatch.setattr(infer_peers, "_group", lambda: None)
    made = work(tokens)
    expected, checked = infer.reference(made, requantize=True)
    got = mega.deep_gemm(made)()[checked].float()
    assert mega.calc_diff(got, expected) <= mega.PEER_DIFFERENCE
    for build in (mega.ours, mega.operator):
        got = build(made)()[checked].float()
        assert mega.calc_diff(got, expected) <= 1e-5 and mega.worst_row(got, expected) <= 0.005


def test_errors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is off is timed up to its limit, and beyond shown with its errors alone; ours is held to a tighter
    limit, in each row.
    """
    runner = mega.Runner(CPU, warm_ms=0, min_ms=0, peers=[])

    def off(factor: float, rows: slice) -> Call:
        def build(made: infer.Workload) -> Call:
            def call() -> torch.Tensor:
                out = mega.ours(made)()
                out[rows] *= factor
                return out

            return call

        return build

    everywhere = slice(None)
    near = off(1.1, everywhere)
    contenders = {OURS: mega.ours, "near": near, "far": off(1.3, everywhere), DIRECT: near, "odd": off(nan, everywhere)}
    monkeypatch.setattr(runner, "_contenders", lambda: contenders)
    result = runner.run(InferCase(TINY, 9), lambda _: None)
    assert result.metrics["near"]["calc_diff"] == pytest.approx(0.0045, rel=0.1)
    assert result.metrics["near"]["worst_row"] == pytest.approx(0.1, rel=0.1)
    assert "its calc_diff is 0.03" in result.missing["far"]
    assert "its calc_diff is 0.0045" in result.missing[DIRECT]  # the other way of ours
    assert "its calc_diff is nan" in result.missing["odd"]
    rows = {(row.metric, row.peer): row for row in report.rows(result)}
    far = [rows[metric, "far"].peer_value for metric in ("calc_diff", "worst_row", "replay_us")]
    assert far == [pytest.approx(0.033, rel=0.1), pytest.approx(0.3, rel=0.1), None]
    assert rows["calc_diff", "odd"].peer_value is None  # no number of JSON
    for wrong, said in ((off(1.1, everywhere), "calc_diff is"), (off(1.05, slice(4, 5)), "a row is off by")):
        contenders[OURS] = wrong
        with pytest.raises(NoResultError, match=said):
            runner.run(InferCase(TINY, 9), lambda _: None)


def test_positive_data_has_no_sign() -> None:
    case = mega_cases.CPU_CASES[-1]
    made = mega.Runner(CPU, warm_ms=0, min_ms=0, peers=[]).workload_of(case)
    for tensor in (made.x, made.x_scale, *made.experts):
        assert (tensor.float() >= 0).all() and tensor.float().abs().sum() > 0
    assert (mega.ours(made)().float() > 0).all()


def result_of(shape: mega_cases.MegaShape, tokens: int, us: float, peer_us: float) -> InferResult:
    case = InferCase(shape, tokens)
    errors = {"calc_diff": 1e-5, "worst_row": 0.01, "host_us": 20.0}
    metrics = {
        OURS: {"replay_us": us, "of_floor": 100 / us, **errors},
        OPERATOR: {"replay_us": us, "of_floor": 100 / us, **errors, "host_us": 19.5},
        DEEP_GEMM: {"replay_us": peer_us, "of_floor": 100 / peer_us, **errors},
    }
    return InferResult(str(case), metrics, of=case)


def test_the_table_and_the_figure_hold_cases_against_their_bars() -> None:
    flash = SHAPES["flash"]
    positive = cases_of(flash)[-1].shape
    results = [result_of(flash, 16, 200, 230), result_of(flash, 8192, 2000, 2400), result_of(positive, 1024, 400, 500)]
    results[2].untimed[DEEP_GEMM] = results[2].metrics.pop(DEEP_GEMM) | {"calc_diff": 0.02}
    table = mega_figure.bars(results)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["ratio"] == ["1.15x", "1.20x", "-"] and columns["calc_diff, peer"][2] == "1e-05, 0.02"
    assert columns["must"] == ["[green]1.10x[/]", "[red]1.35x[/]", "-"]
    assert columns["host over operator, µs"] == ["+0.5"] * 3
    left, right = mega_figure.draw(results, "title").axes
    ratios, bars = left.lines
    assert list(ratios.get_xdata()) == [16, 8192] and list(ratios.get_ydata()) == pytest.approx([1.15, 1.2])
    assert list(bars.get_ydata()) == [1.1, 1.35] and len(right.lines) == 2


def test_a_timeline_has_the_calls_of_torch_in_order() -> None:
    ran = spans_of(lambda: torch.ones(64).cumsum(0).sort(), CPU)
    assert [span.name for span in ran] == ["aten::ones", "aten::cumsum", "aten::sort"]
    assert ran[0].begin_us == 0 and all(a.end_us <= b.begin_us < b.end_us for a, b in itertools.pairwise(ran))
    axis = mega_timeline.draw([("one", ran), ("two", ran[:1])], "title").axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [span.name for span in ran]
    bars = [patch for patch in axis.patches if patch.get_width() > 0]
    assert len(bars) == 4 and bars[3].get_width() == pytest.approx(ran[0].end_us)


def serving(root: Path) -> str:
    return next(page for page in readme.PAGES if page.block == "serving").text(root)


def test_the_page_says_what_was_measured_and_what_is_a_model(tmp_path: Path) -> None:
    """With a file made by hand: one case of two, and the errors of data of one sign."""
    path = tmp_path / readme.RESULTS / "mega-world1.json"
    assert "Not measured" in serving(tmp_path) and "×" not in serving(tmp_path)
    positive = cases_of(SHAPES["flash"])[-1].shape
    results = [result_of(SHAPES["flash"], 64, 200, 250), result_of(positive, 1024, 400, 500)]
    results[1].untimed[DEEP_GEMM] = {"calc_diff": 0.02, "worst_row": 0.07}
    results[1].missing[DEEP_GEMM] = "wrong result"
    del results[1].metrics[DEEP_GEMM]
    results_files.write(path, "mega", results)
    path.with_name("mega-world1-timeline.png").touch()
    text = serving(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| `flash` | 64 |"))
    travel = [64 * (ranks - 1) * (3 * 4096 + 128 + 48) / 346e9 * 1e6 for ranks in (4, 8)]
    model = [f"{200 + 100 + us:,.0f}" for us in travel]
    assert line == f"| `flash` | 64 | 251 | 296 | 351 | 200 | 50% | 1.25× | {model[0]} | {model[1]} |"
    assert "| `pro` | 64 | 821 | 908 | 980 | – | – | – | + 112 | + 128 |" in text
    assert "| `pro` | 8192 | 10123 | – | 8926 | –" in text
    assert "| `flash-positive_T1024_uniform` | 1e-05 | 0.02 | 0.01 | 0.07 |" in text
    ahead = "DeepGEMM's kernel takes less time than ours in"
    reached = "1.10× up to 256 tokens, 1.25× up to 1024 and 1.35× beyond, is reached in"
    assert f"The goal beside DeepGEMM on one rank, {reached} 1 of 1 rows. {ahead} 0 of 1." in text
    assert (
        "The model of 8 ranks takes longer than the published fused call in 1 of 1 rows, and longer than the faster "
        "way of DeepEP in 1."
    ) in text.splitlines()
    results_files.write(path, "mega", [result_of(SHAPES["flash"], 64, 240, 250), result_of(SHAPES["flash"], 16, 9, 8)])
    missed = f"not by `flash` at 16 (0.89×); `flash` at 64 (1.04×). {ahead} 1 of 2."
    assert f"{reached} 0 of 2 rows, {missed}" in serving(tmp_path)
    assert "](../benchmarks/results/mega-world1-timeline.png)" in text and "Not measured" not in text
