"""The demo: its text and split, the n-gram bar it has to clear, and a short run from end to end."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from supersonic_moe.demo import data, report, train
from supersonic_moe.demo.model import ByteTransformer, ModelConfig

TINY = train.TrainConfig(
    model=ModelConfig(context=32, hidden=32, layers=2, heads=2, experts=4, experts_per_token=2, intermediate=32),
    batch=8,
    learning_rate=1e-2,
    sample_bytes=24,
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.split(data.standard_library(), train_bytes=200_000, held_out_bytes=20_000)


def test_split_is_by_file_deterministic_and_disjoint(corpus: data.Corpus) -> None:
    again = data.split(reversed(data.standard_library()), train_bytes=200_000, held_out_bytes=20_000)
    assert again.train_files == corpus.train_files and again.held_out_files == corpus.held_out_files
    assert torch.equal(again.train, corpus.train) and torch.equal(again.held_out, corpus.held_out)
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert len(corpus.train) == 200_000 and len(corpus.held_out) == 20_000

    everything = data.split(data.standard_library(), train_bytes=1 << 40, held_out_bytes=1 << 40)
    held_out, learnt = (t.numpy().tobytes().split(b"\0") for t in (everything.held_out, everything.train))
    assert not set(held_out) & set(learnt), "a file's content is on both sides"
    assert 0.02 < len(everything.held_out) / len(everything.train) < 0.2


def test_split_says_what_to_do_without_sources() -> None:
    with pytest.raises(ValueError, match=r"the train side got none from .*use a Python that has its sources"):
        data.split([], train_bytes=1, held_out_bytes=1)


def test_ngram_scores_match_a_naive_count() -> None:
    learnt, judged, weight = b"abracadabra alakazam", b"cabal arab", 4.0

    def unigram(byte: int) -> float:
        return (learnt.count(byte) + 1) / (len(learnt) + 256)

    pairs = Counter(itertools.pairwise(learnt))
    firsts = Counter(learnt[:-1])
    steps = list(itertools.pairwise(judged))
    by_pair = [(pairs[a, b] + weight * unigram(b)) / (firsts[a] + weight) for a, b in steps]
    as_tensor = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (learnt, judged)]
    assert data.bigram_bits_per_byte(*as_tensor, weight) == pytest.approx(
        -sum(map(math.log2, by_pair)) / len(steps), rel=1e-12
    )
    assert data.unigram_bits_per_byte(*as_tensor) == pytest.approx(
        -sum(math.log2(unigram(b)) for _, b in steps) / len(steps), rel=1e-12
    )


def test_evaluate_scores_every_byte_once() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(TINY.model)
    with torch.no_grad():
        model.embedding.weight.zero_()  # logits 0: exactly 8 bits for each byte, whatever the windows
    text = train.whole_windows(torch.randint(256, (333,), dtype=torch.uint8), TINY.model.context)
    assert len(text) == 321
    assert train.evaluate(model, text) == pytest.approx(8.0, abs=1e-5)

    model = ByteTransformer(TINY.model).eval()
    window = text[: TINY.model.context + 1].long()[None]
    logits_BLV, _ = model(window[:, :-1])
    whole = torch.nn.functional.cross_entropy(logits_BLV[0], window[0, 1:]).item() / math.log(2)
    assert train.evaluate(model, text[: TINY.model.context + 1]) == pytest.approx(whole, rel=1e-5)


def test_the_prompt_is_whole_lines_up_to_the_cue() -> None:
    def prompt(text: bytes, length: int) -> bytes:
        return train.held_out_prompt(torch.frombuffer(bytearray(text), dtype=torch.uint8), length, cue=b"def f(")

    assert prompt(b"a = 1\nbb = 22\nclass C:\n  def f(x): pass\n", 19) == b"class C:\n  def f("
    assert prompt(b"one line without a break before def f(x)", 12) == b"efore def f("
    assert prompt(b"nothing of the kind", 7) == b"nothing"


def test_attention_is_causal_and_positions_are_relative() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(TINY.model).eval()
    text_BL = torch.randint(256, (1, 24))
    changed_BL = text_BL.clone()
    changed_BL[0, -1] = (changed_BL[0, -1] + 1) % 256
    torch.testing.assert_close(model(text_BL)[0][:, :-1], model(changed_BL)[0][:, :-1])


def test_a_short_run_learns_and_repeats(corpus: data.Corpus, tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    first = train.run(
        steps=60, device="cpu", out=tmp_path / "new" / "folder", config=TINY, corpus=corpus, console=console
    )

    assert first.steps == 60 and len(first.train_bpb) == 60
    assert first.train_bpb[0] > 6.5 and sum(first.train_bpb[-10:]) / 10 < first.train_bpb[0] - 2
    assert first.held_out_bpb < first.unigram_bpb + 0.5 and first.bigram_bpb < first.unigram_bpb
    assert first.tokens_per_s > 0 and first.mfu is None
    assert [path.name for path in first.paths] == ["loss.png", "expert_load.png"]
    for path in first.paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    for words in ("held out", "bigram", f"{first.held_out_bpb:.3f}", "tokens/s", "loss.png", "experts "):
        assert words in screen.getvalue()

    again = train.run(steps=60, device="cpu", out=tmp_path, config=TINY, corpus=corpus, console=console)
    assert again.train_bpb == first.train_bpb and again.sample == first.sample
    assert again.held_out_bpb == first.held_out_bpb


def test_one_step_claims_no_speed(corpus: data.Corpus, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    train.run(steps=1, device="cpu", out=tmp_path, config=TINY, corpus=corpus, console=console)
    last = console.file.getvalue().splitlines()[-2]  # type: ignore[attr-defined]
    assert last.startswith("1 step · ") and "/s" not in last and "s in all" in last


def test_time_is_a_budget_and_the_live_display_runs(corpus: data.Corpus, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    result = train.run(seconds=1.0, device="cpu", out=tmp_path, config=TINY, corpus=corpus, console=console)
    assert 1 <= result.steps < 10_000
    assert "tokens/s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_learning_rate_warms_up_then_decays() -> None:
    rates = [train.learning_rate(TINY, step / 100) for step in range(101)]
    assert rates[0] == 0 and max(rates) == pytest.approx(TINY.learning_rate, rel=0.01)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.02 * TINY.learning_rate)


def test_master_weights_keep_what_bf16_would_lose() -> None:
    layer = torch.nn.Linear(4, 4, bias=False).bfloat16()
    config = train.TrainConfig(TINY.model, weight_decay=0.0, learning_rate=1e-5)
    optimizer = train.MasterAdamW(layer, config)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        optimizer.masters[0].fill_(1.0)
    for _ in range(400):  # each update is 1e-5, bf16 resolves 2^-8 below 1
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step(config.learning_rate)
    assert optimizer.masters[0].mean().item() == pytest.approx(1 - 400e-5, rel=1e-4)
    assert layer.weight.float().mean().item() == pytest.approx(1 - 400e-5, abs=2**-8)
    assert layer.weight.float().max().item() < 1.0


def test_smoothed_begins_and_ends_with_the_values_and_takes_their_mean_between() -> None:
    falling = [8.0 - 0.01 * step for step in range(400)]
    assert report.smoothing_window(400) == 11
    assert report.smoothed(falling) == pytest.approx(falling)  # a mean over later steps too does not lag behind
    jump = [8.0] + [2.0] * 399
    smooth = report.smoothed(jump)
    assert (smooth[0], smooth[1], smooth[5], smooth[6]) == pytest.approx((8.0, 4.0, 2 + 6 / 11, 2.0))
    assert report.smoothed([3.0, 1.0]) == [3.0, 1.0] and report.smoothed([]) == []


@pytest.mark.parametrize(("steps", "lines"), [(400, 5), (30, 4)])
def test_every_line_of_the_loss_chart_is_in_its_legend(
    steps: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    report.plot_loss(tmp_path / "loss.png", [3.0] * steps, 2.5, 3.5, 4.8)
    (axes,) = drawn[0].axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(axes.lines) == len(legend) == lines and legend[0] == "training batches, each step"
    assert ("training batches, mean of 11 steps" in legend) == (steps == 400)


def test_load_bars_read_half_height_at_a_fair_share() -> None:
    assert report.load_bars(torch.tensor([5, 5, 5, 5])) == "▅▅▅▅"
    assert report.load_bars(torch.tensor([20, 0, 0, 0])) == "█▁▁▁"
    assert report.load_bars(torch.tensor([0, 0])) == "▁▁"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "steps must be positive; got 0"), ({"seconds": -1.0}, "seconds must be positive")],
)
def test_a_budget_must_be_positive(arguments: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(out=tmp_path, **arguments)  # type: ignore[arg-type]
