"""``bench ep``: alone, and as under torchrun, where ranks must time the same calls."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ep_bench
import pytest
import torch
import virtual_cases
from command_line import run, words
from ranks import end_groups, run_ranks

from supersonic_moe import Fp8Recipe
from supersonic_moe.bench import ep_parts
from supersonic_moe.bench.ep_timeline import Exchange, timeline
from supersonic_moe.bench.report import OURS
from supersonic_moe.bench.spans import Marks
from supersonic_moe.bench.suites.ep import Ep
from supersonic_moe.kernels import registry
from supersonic_moe.parallel.watch import PHASES, Activity
from supersonic_moe.perf_model import LayerShape

QUICK = ["--shape", "32,32,16,4,2", "--min-ms", "1", "--warm-ms", "1", "--device", "cpu"]


def test_one_rank_is_measured_against_the_plain_layer(tmp_path: Path) -> None:
    file = tmp_path / "ep.json"
    result = run("bench", "ep", *QUICK, "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = {row["metric"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"fwd_us", "fwd_bwd_us", "fwd_bwd_tflops", "host_us"} <= rows.keys() and "sent_bytes" not in rows
    row = rows["fwd_bwd_us"]
    assert row["case"] == "T32_H32_I16_E4_K2_R1" and row["peer"] == "one-gpu" and OURS not in row.values()
    assert row["ratio"] == pytest.approx(row["peer_value"] / row["value"], rel=1e-3)


def test_products_in_parts_are_compared_with_one_launch() -> None:
    """With kernels that launch no parts; the others are for a GPU."""
    shape = LayerShape(tokens=600, hidden=128, intermediate=128, experts=2, top_k=2)
    cpu, kernels = torch.device("cpu"), registry.fp8_kernels("reference")
    two, four = ep_parts.run_parts(shape, kernels, Fp8Recipe(), cpu, warm_ms=1, min_ms=1)
    assert two.case == f"{shape}_2-parts" and four.case == f"{shape}_4-parts"
    assert two.metrics[ep_parts.ONE_LAUNCH] == four.metrics[ep_parts.ONE_LAUNCH]
    assert two.metrics[OURS]["products_us"] > 0
    begin, end, there, _ = ep_parts._cut(torch.tensor([0, 1, 5]), 2)
    assert (begin.tolist(), end.tolist()) == ([[0, 0, 0], [0, 0, 2]], [[0, 0, 2], [0, 1, 5]])
    assert there.tolist() == [1, 1]


def test_an_fp8_wire_needs_an_fp8_layer() -> None:
    result = run("bench", "ep", *QUICK, "--wire", "fp8")
    assert result.exit_code == 2 and "wire fp8 is for an FP8 layer; got recipe bf16" in words(result)


def test_one_rank_has_no_others_to_choose() -> None:
    result = run("bench", "ep", *QUICK, "--remote", "0.5")
    assert result.exit_code == 2 and "Run it under torchrun" in words(result)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "x"}, "RANK, which torchrun sets, must be a whole number; got 'x'"),
        ({"WORLD_SIZE": "2"}, "several ranks are started by torchrun; got WORLD_SIZE=2 without it"),
    ],
    ids=["no number", "no torchrun"],
)
def test_what_another_launcher_left_in_the_environment_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run("bench", "ep", *QUICK)
    assert result.exit_code == 2 and said in words(result)


def test_two_ranks_take_the_same_decisions(tmp_path: Path) -> None:
    file = tmp_path / "ep.json"
    args = ["--shape", "8,32,16,2,1", "--json", str(file), "--png", str(tmp_path / "ep.png")]
    for exit_code, output, groups in run_ranks(2, ep_bench.measured, *QUICK, *args, backend=None):
        assert exit_code == 0, output
        assert groups == 1, "a second one would read in torchrun's store what the first one wrote there"
    assert (tmp_path / "ep.png").stat().st_size > 10_000
    found = [row for row in json.loads(file.read_text())["rows"] if row["case"] == "T32_H32_I16_E4_K2_R2"]
    rows = {row["metric"]: row for row in found}
    assert {row["metric"] for row in found if row["peer"] == "rows-by-hand"} >= {"fwd_us", "fwd_bwd_us", "host_us"}
    # E 8 on 2 ranks, K 2: p = 1 - (4 3) / (8 7); 32 p copies of 2 H bytes 4 times, ids and scores, their gradients
    assert rows["sent_bytes"]["value"] == pytest.approx(32 * (1 - 12 / 56) * (4 * 2 * 32 + 8 * 2 + 4 * 2))


@pytest.mark.multigpu
@pytest.mark.parametrize(
    ("recipe", "wire", "transport"), [("bf16", "exact", "gather"), ("fp8", "fp8", "gather"), ("bf16", "exact", "push")]
)
def test_two_gpus_measure_one_case_after_another(recipe: str, wire: str, transport: str) -> None:
    shapes = ["--shape", "2048,512,256,4,4", "--shape", "1024,512,256,4,4", "--min-ms", "1", "--warm-ms", "1"]
    args = (*shapes, "--recipe", recipe, "--wire", wire, "--transport", transport)
    for exit_code, output, _ in run_ranks(2, ep_bench.measured, *args, backend=None, gpu=True):
        assert exit_code == 0 and "T2048_" in output and "T1024_" in output, output


@pytest.mark.parametrize("remote", [None, 0.9])
def test_a_layer_written_by_hand_computes_the_same(remote: float | None) -> None:
    shape = LayerShape(tokens=40, hidden=32, intermediate=16, experts=3, top_k=2)
    for agrees, share, broken in run_ranks(2, ep_bench.by_hand, shape, remote):
        assert agrees is None, agrees
        assert share == pytest.approx(remote or 0.5, abs=0.12)
        assert broken is not None and "output" in broken, "a layer that is wrong on one rank is so on both"


def test_an_error_of_one_rank_or_of_all_ends_the_command_on_all() -> None:
    """At once, and no rank goes on to the next case."""
    failing = {"building": [1], "a call of ranks": [1], "a call of one": [1], "the timeline": [0, 1]}
    calls = [(where, ranks, *QUICK, "--shape", "48,32,16,4,2") for where, ranks in failing.items()]
    groups = end_groups(2, ep_bench.failing, calls, backend=None, timeout_s=60)
    for where, ranks in zip(failing, groups, strict=True):
        for rank, ended in enumerate(ranks):
            assert ended.exit_code == 0, (where, ended)
            exit_code, output = ended.result
            measured, _, named = output.partition("Written: nothing. Measured: 0 of 2 cases. Missing: T32_")
            assert exit_code == 1 and measured.count("No result: T32_") == 1 and "T48_" not in measured, (where, output)
            assert ("T48_" in named) == (rank == 0), "the rank that writes names what is missing"
            if where == "the timeline":
                assert re.search(r"StopIteration: no message \(ep_bench\.py:\d+\)", output), output
            elif where == "a call of one":
                said = "out of memory: no memory for this rank" if rank else "RuntimeError: another rank has failed"
                assert f"R2, fwd: one-gpu: {said}" in output, output


@pytest.mark.parametrize(
    ("ranks", "given", "scale"),
    [("1", {}, "fp32"), ("2", {}, "pow2"), ("2", {"wgrad": "bf16"}, "fp32"), ("2", {"wire": "exact"}, "fp32")],
)
def test_an_fp8_wire_takes_the_scales_that_it_needs(
    ranks: str, given: dict[str, Any], scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    suite = Ep(**{"device": "cpu", "recipe": "fp8", "wire": "fp8", **given})
    suite.cases()
    assert isinstance(suite.numerics, Fp8Recipe) and suite.numerics.scale == scale
    assert ("fp8 with scales of pow2" in suite.heading) == (scale == "pow2")


def test_an_fp8_wire_between_ranks_refuses_other_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    result = run("bench", "ep", *QUICK, "--recipe", "fp8", "--wire", "fp8", "--scale", "fp32")
    assert result.exit_code == 2
    assert "needs scales of pow2, or weight gradients in bf16; got scale fp32. Leave --scale out" in words(result)


class Turns(Marks):
    """A clock that goes on by one with each look."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += 1
        return self.now

    def us(self, begin: int, end: int) -> float:
        return float(end - begin)


def test_a_timeline_has_the_exchanges_of_a_call_in_order() -> None:
    class Exchanging:
        watch = SimpleNamespace(activity=None)

        def gather(self, call: int, phase: str) -> None:
            self.watch.activity = Activity(call, phase, False)

        exchange = gather

    ranks: Any = Exchanging()

    def call() -> None:
        ranks.gather(1, "forward dispatch")
        ranks.exchange(1, "forward combine")

    found = timeline(call, Turns(), ranks)
    assert found.exchanges == [Exchange("forward dispatch", 1, 2), Exchange("forward combine", 3, 4)]
    assert found.end_us == 5 and vars(ranks) == {}


@pytest.mark.parametrize(("in_parts", "transport"), [(False, "gather"), (True, "gather"), (False, "push")])
def test_a_timeline_has_every_exchange_of_copies(in_parts: bool, transport: str) -> None:
    """Whole: x and choices, sums; dO, dx and dscores. In parts: what starts one, each part, and what waits for all."""
    counts = {"forward dispatch": 2, "forward combine": 1, "backward dispatch": 1, "backward combine": 2}
    if in_parts:  # two ranks have one part each for another; a departure starts, sends and arrives; dscores are whole
        counts = {"forward dispatch": 3, "forward combine": 3, "backward dispatch": 2, "backward combine": 4}
    (found,) = run_ranks(1, virtual_cases.timelines, 2, in_parts, transport)
    for rank in found:
        assert Counter(exchange.phase for exchange in rank.exchanges) == counts
        for phase, begin, end in rank.exchanges:
            assert 0 < begin < end < rank.end_us, phase
        assert [phase for phase, _ in groupby(rank.exchanges, lambda exchange: exchange.phase)] == list(PHASES)
