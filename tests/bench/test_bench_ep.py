"""``bench ep``: alone, and as under torchrun, where ranks must time the same calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import outcome, run, words
from ranks import run_ranks

from supersonic_moe import Fp8Recipe
from supersonic_moe.bench import ep_parts
from supersonic_moe.bench.ep_timeline import Exchange, timeline
from supersonic_moe.bench.report import OURS
from supersonic_moe.bench.spans import Marks
from supersonic_moe.kernels import registry
from supersonic_moe.parallel.collectives import Collectives
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


def test_two_ranks_take_the_same_decisions(tmp_path: Path) -> None:
    file = tmp_path / "ep.json"
    files = ["--json", str(file), "--png", str(tmp_path / "ep.png")]
    for exit_code, output in run_ranks(2, outcome, "bench", "ep", *QUICK, *files, backend=None):
        assert exit_code == 0, output
    assert (tmp_path / "ep.png").stat().st_size > 10_000
    rows = {row["metric"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["fwd_us"]["case"] == "T32_H32_I16_E4_K2_R2"
    # E 8 on 2 ranks, K 2: p = 1 - (4 3) / (8 7); 32 p copies of 2 H bytes 4 times, ids and scores, their gradients
    assert rows["sent_bytes"]["value"] == pytest.approx(32 * (1 - 12 / 56) * (4 * 2 * 32 + 8 * 2 + 4 * 2))


class Turns(Marks):
    """A clock that goes on by one with each look."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += 1
        return self.now

    def us(self, begin: int, end: int) -> float:
        return float(end - begin)


def test_a_timeline_has_the_exchanges_of_a_call_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collectives, "gather", lambda self, rows, places, empty, call, phase: rows)
    monkeypatch.setattr(Collectives, "exchange", lambda self, rows, call, phase, sent, received: rows)
    before, ranks = Collectives.gather, Collectives(None, None)  # type: ignore[arg-type]

    def call() -> None:
        ranks.gather(None, 4, 0, 1, "forward dispatch")  # type: ignore[arg-type]
        ranks.exchange(None, 1, "forward combine", None, None)  # type: ignore[arg-type]

    found = timeline(call, Turns())
    assert found.exchanges == [Exchange("forward dispatch", 1, 2), Exchange("forward combine", 3, 4)]
    assert found.end_us == 5 and Collectives.gather is before
