"""Training in FP8 beside BF16, tiny and on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import run

from supersonic_moe import Bf16Recipe, Fp8Recipe, MoE
from supersonic_moe.bench import train as suite
from supersonic_moe.bench.layer import OURS_BF16
from supersonic_moe.bench.report import OURS
from supersonic_moe.bench.train import Run, gap
from supersonic_moe.demo import data
from supersonic_moe.demo import train as demo
from supersonic_moe.demo.model import ModelConfig

TINY = demo.TrainConfig(
    model=ModelConfig(context=16, hidden=32, layers=1, heads=2, experts=4, experts_per_token=2, intermediate=16),
    dtype=torch.bfloat16,
    batch=4,
    learning_rate=1e-2,
)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.split(data.standard_library(), train_bytes=50_000, held_out_bytes=300)


def test_runs_share_weights_and_batches_and_differ_in_their_recipe(
    corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, bool, torch.Tensor]] = []
    forward = MoE.forward

    def spy(self: MoE, x: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append((self.recipe, self.training, x.detach().clone()))
        return forward(self, x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(MoE, "forward", spy)
    fp8 = Fp8Recipe(wgrad="fp8")
    runs = {}
    for recipe in (Bf16Recipe(), fp8):
        first = len(seen)
        runs[recipe] = suite.train(recipe, TINY, corpus, 4, 7, CPU)
        calls = [(r, training) for r, training, _ in seen[first:]]
        in_recipe = sum(r == recipe for r, _ in calls)
        assert {r for r, _ in calls[:in_recipe]} == {recipe}, "training and evaluation"
        at_the_end = [(Bf16Recipe(), False)] * (len(calls) - in_recipe)
        assert calls[in_recipe:] == at_the_end and bool(at_the_end) == (recipe is fp8), "judged in BF16 too"
        runs[recipe].first_input = seen[first][2]  # type: ignore[attr-defined]
    in_bf16, in_fp8 = runs[Bf16Recipe()], runs[fp8]
    assert torch.equal(in_bf16.first_input, in_fp8.first_input)  # type: ignore[attr-defined]
    assert list(in_bf16.held_out_bpb) == [1, 2, 3, 4] and len(in_bf16.train_bpb) == len(in_fp8.train_bpb) == 4
    assert in_bf16.train_bpb != in_fp8.train_bpb
    assert in_bf16.train_bpb == pytest.approx(in_fp8.train_bpb, rel=0.03)
    assert abs(gap(in_fp8, in_bf16)) < 0.03
    assert in_bf16.held_out_in_bf16 == in_bf16.held_out_bpb[4]
    assert in_fp8.held_out_in_bf16 not in (in_bf16.held_out_bpb[4], in_fp8.held_out_bpb[4])
    first = len(seen)
    suite.train(Bf16Recipe(), TINY, corpus, 1, 8, CPU)
    assert not torch.equal(seen[first][2], in_bf16.first_input)  # type: ignore[attr-defined]
    again = suite.train(fp8, TINY, corpus, 4, 7, CPU)
    assert again.train_bpb == in_fp8.train_bpb and again.held_out_bpb == in_fp8.held_out_bpb


def test_long_runs_are_judged_now_and_then_and_at_the_end(corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "evaluate", lambda model, text: model.eval().training or 2.0)
    run = suite.train(Bf16Recipe(), TINY, corpus, 13, 0, CPU)
    assert list(run.held_out_bpb) == [2, 4, 6, 8, 10, 12, 13]


def test_gap_and_cases_by_hand() -> None:
    bf16 = Run(Bf16Recipe(), [4.0] * 60 + [2.0] * 40, {50: 4.0, 100: 2.0})
    fp8 = Run(Fp8Recipe(), [4.0] * 60 + [2.2] * 40, {50: 4.0, 100: 2.01}, held_out_in_bf16=2.004)
    other_bf16 = Run(Bf16Recipe(), [4.0] * 100, {50: 5.0, 100: 4.0})
    other_fp8 = Run(Fp8Recipe(), [4.0] * 100, {50: 4.0, 100: 3.96}, held_out_in_bf16=4.0)
    assert gap(fp8, bf16) == pytest.approx(0.005)
    found = suite.cases([(fp8, bf16), (other_fp8, other_bf16)], TINY)
    name = "demo_1layers_T64_H32_I16_E4_K2_fp8"
    assert [case.case.removeprefix(name) for case in found] == ["/50steps", "/100steps", "/pair0", "/pair1", ""]
    middle, _, first, second, result = (case.metrics for case in found)
    assert middle[OURS_BF16]["held_out_bpb"] == 4.5 and middle[OURS]["held_out_bpb"] == 4.0
    of_first = {"held_out_bpb": 2.0, "train_bpb": pytest.approx((10 * 4 + 40 * 2) / 50)}
    assert first[OURS_BF16] == of_first and result[OURS_BF16]["train_bpb"] == pytest.approx((2.4 + 4.0) / 2)
    assert first[OURS]["gap"] == pytest.approx(0.005) and second[OURS]["gap"] == pytest.approx(-0.01)
    assert result[OURS]["gap"] == pytest.approx(-0.0025) and result[OURS]["steps"] == 100
    assert result[OURS]["gap_error"] == pytest.approx(0.0075)  # half of what the two gaps are apart
    assert result[OURS]["gap_in_bf16"] == pytest.approx(0.001)
    assert "gap_error" not in suite.cases([(fp8, bf16)], TINY)[-1].metrics[OURS], "one pair has no spread"


def test_command_prints_writes_and_draws(corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "default_config", lambda device: TINY)
    monkeypatch.setattr(demo, "corpus_for", lambda config: corpus)
    file, curve = tmp_path / "train-fp8.json", tmp_path / "train.png"
    options = ["--steps", "3", "--seeds", "2", "--batch", "3", "--device", "cpu"]
    result = run("bench", "train", *options, "--json", str(file), "--png", str(curve), columns=100)
    assert result.exit_code == 0, result.output
    assert "held-out bits per byte" in result.output and "above BF16, %" in result.output
    rows = json.loads(file.read_text())["rows"]
    assert {row["peer"] for row in rows} == {OURS_BF16} and len({row["case"] for row in rows}) == 3 + 2 + 1
    assert all("_T48_" in row["case"] for row in rows) and any(row["metric"] == "gap_error" for row in rows)
    assert curve.read_bytes().startswith(b"\x89PNG") and curve.stat().st_size > 10_000
