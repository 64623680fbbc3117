"""``bench transformers`` on a CPU: every contender is measured on the same tensors, and who computes something else is
not compared.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run, words
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from supersonic_moe.bench import report, timing, transformers
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.shapes import CPU_HUGGING_FACE_MODELS, HUGGING_FACE_MODELS
from supersonic_moe.bench.suites.transformers import Transformers
from supersonic_moe.bench.timing import graph_us
from supersonic_moe.bench.transformers import SWIGLU, Settings, TransformersCase, liger_experts_forward, run_case
from supersonic_moe.bench.transformers import _model as build

QUICK = {"device": torch.device("cpu"), "dtype": torch.float32, "warm_ms": 0.1, "min_ms": 0.1}
QWEN, GPT_OSS = CPU_HUGGING_FACE_MODELS


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Experts backends by name; those that a test adds are forgotten."""
    known = dict(ALL_EXPERTS_FUNCTIONS)
    monkeypatch.setattr(type(ALL_EXPERTS_FUNCTIONS), "_global_mapping", known)
    return known


@pytest.mark.parametrize("what", ["layers", "model"])
@pytest.mark.parametrize(("mode", "metric"), [("train", "fwd_bwd_us"), ("decode", "infer_us")])
def test_every_contender_is_measured(what: str, mode: str, metric: str) -> None:
    settings = Settings(**QUICK, peers=("eager", "grouped_mm", "batched_mm", "liger", "nobody"))
    result = run_case(TransformersCase(QWEN, what, mode, 8), settings)
    assert result.case == f"qwen3-tiny/{what}/{mode}_T8"
    assert set(result.metrics) == {OURS, "eager", "grouped_mm", "batched_mm"}
    assert all(metrics[metric] > 0 for metrics in result.metrics.values())
    assert set(result.missing) == {"liger", "nobody"} and "nobody" in result.missing["nobody"]
    assert ("fwd_bwd_tflops" in result.metrics[OURS]) == (what == "layers" and mode == "train")


def test_another_gate_meets_a_swiglu_of_equal_flops() -> None:
    result = run_case(TransformersCase(GPT_OSS, "layers", "train", 8), Settings(**QUICK, peers=(), pairs=6))
    assert set(result.metrics) == {OURS, SWIGLU} and set(result.pairs) == {("fwd_bwd_us", SWIGLU)}
    with pytest.raises(NotImplementedError, match="SwiGLU without biases"):
        liger_experts_forward(build(GPT_OSS, Settings(**QUICK)).model.layers[0].mlp.experts, *[torch.zeros(1)] * 3)


def test_who_computes_something_else_is_not_compared(backends: dict[str, Any]) -> None:
    def halved(experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return 0.5 * ALL_EXPERTS_FUNCTIONS["supersonic"](experts, 1e3 * x, ids, scores)

    backends["halved"] = halved
    result = run_case(TransformersCase(QWEN, "layers", "decode", 4), Settings(**QUICK, peers=("halved",)))
    assert "computes something else" in result.missing["halved"] and "halved" not in result.metrics


def test_as_a_command(tmp_path: Path) -> None:
    file = tmp_path / "transformers.json"
    quick = ["--device", "cpu", "--min-ms", "0", "--warm-ms", "0", "--models", "qwen3-tiny", "--what", "layers"]
    result = run("bench", "transformers", *quick, "--peers", "grouped_mm", "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert {(row["case"], row["peer"]) for row in rows if row["metric"] == "infer_us"} == {
        ("qwen3-tiny/layers/decode_T4", "grouped_mm")
    }
    wrong = run("bench", "transformers", *quick, "--peers", "grouped_mm,nobody")
    assert wrong.exit_code == 2 and "peers are eager,grouped_mm,batched_mm,liger or none; got nobody" in words(wrong)
    wrong = run("bench", "transformers", "--device", "cpu", "--models", "qwen9")
    assert wrong.exit_code == 2 and "a model on cpu is one of qwen3-tiny, gpt-oss-tiny; got 'qwen9'" in words(wrong)


def test_a_run_that_stops_leaves_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped_at_decode(case: TransformersCase, *_: object) -> CaseResult:
        if case.mode == "decode":
            raise KeyboardInterrupt
        return CaseResult(str(case), {OURS: {"fwd_bwd_us": 1.0}})

    monkeypatch.setattr(transformers, "run_case", stopped_at_decode)
    file = tmp_path / "transformers.json"
    result = run("bench", "transformers", "--device", "cpu", "--what", "layers", "--json", str(file))
    content = json.loads(file.read_text())
    trained, decoded = ([f"{model}/layers/{mode}" for model in (QWEN, GPT_OSS)] for mode in ("train_T64", "decode_T4"))
    assert [row["case"] for row in content["rows"]] == trained and content["missing_cases"] == decoded
    assert result.exit_code == 130 and f"Measured: 2 of 4 cases. Missing: {', '.join(decoded)}." in words(result)


def test_who_ran_out_of_memory_is_not_tried_with_more_tokens(backends: dict[str, Any]) -> None:
    tried: list[int] = []

    def greedy(experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        tried.append(len(x))
        if len(x) >= 8 and torch.is_grad_enabled():  # the forward of the check fits, a step of training does not
            raise torch.OutOfMemoryError("tried to allocate 103 GiB. Details")
        return ALL_EXPERTS_FUNCTIONS["supersonic"](experts, x, ids, scores)

    backends["greedy"] = greedy
    settings = Settings(**QUICK, peers=("greedy",))
    results = {
        (mode, tokens): run_case(TransformersCase(QWEN, "layers", mode, tokens), settings)
        for mode, tokens in (("train", 8), ("train", 16), ("train", 4), ("decode", 16))
    }
    assert results["train", 8].missing == {"greedy": "out of memory: tried to allocate 103 GiB"}
    assert results["train", 16].missing == {"greedy": "out of memory at T 8 already"}
    assert not results["train", 4].missing and not results["decode", 16].missing
    assert list(dict.fromkeys(tried)) == [8, 4, 16]


def test_who_is_far_slower_gets_one_call_that_the_row_owns_up_to(
    backends: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleepy(experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        time.sleep(0.2)
        return ALL_EXPERTS_FUNCTIONS["supersonic"](experts, x, ids, scores)

    calls: list[int] = []
    backends["sleepy"] = sleepy
    monkeypatch.setattr(timing, "LONG_CALL_US", 0.1e6)  # grouped_mm may wait 20 ms for a core on a busy machine
    result = run_case(TransformersCase(QWEN, "layers", "decode", 4), Settings(**QUICK, peers=("sleepy", "grouped_mm")))
    assert result.few_calls == {("infer_us", "sleepy"): 1}
    assert len(calls) == 2 * (1 + 2), "two layers: the check, a probe of two calls"
    rows = {row.peer: row for row in report.rows(result) if row.metric == "infer_us"}
    assert rows["sleepy"].calls == 1 and rows["grouped_mm"].calls is None
    assert rows["sleepy"].peer_value >= 2 * 0.2e6


def test_models_of_decode_are_built_once_and_training_has_the_memory_to_itself() -> None:
    settings = Settings(**QUICK, peers=())
    for model in (QWEN, GPT_OSS):
        run_case(TransformersCase(model, "layers", "decode", 4), settings)
    qwen, gpt_oss = settings.models.values()
    run_case(TransformersCase(QWEN, "model", "decode", 4), settings)
    assert [*settings.models.values()] == [qwen, gpt_oss]
    run_case(TransformersCase(QWEN, "layers", "train", 4), settings)
    assert [*settings.models.values()] == [qwen]


def test_what_tells_most_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Transformers(device="cpu")
    monkeypatch.setitem(vars(suite), "where", torch.device("cuda"))
    names = [str(case) for case in suite.cases()]
    models = [model.name for model in HUGGING_FACE_MODELS]
    decode = [f"{model}/{{}}/decode_T{count}" for model in models for count in (1, 8, 64)]
    assert names[:5] == [f"{model}/layers/train_T2048" for model in models]
    assert names[5:35] == [case.format(what) for what in ("layers", "model") for case in decode]
    assert names[35:40] == [f"{model}/model/train_T2048" for model in models]
    assert names[40:44] == [f"qwen3-30b-a3b/{kind}" for kind in ALSO_TRAINED]
    assert len(set(names)) == len(names) == 60


ALSO_TRAINED = ("layers/train_T512", "layers/train_T8192", "model/train_T512", "model/train_T8192")


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_not_captured_and_harms_nothing() -> None:
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"):
        graph_us(lambda: x.sum().item(), 1.0, warm_ms=0.1, min_ms=0.1)
    torch.randn(4, device="cuda")  # a failed capture breaks it
    assert graph_us(lambda: x + 1, 1.0, warm_ms=0.1, min_ms=0.1) > 0


@pytest.mark.parametrize("model", HUGGING_FACE_MODELS, ids=str)
def test_configs_of_real_models_have_two_layers_of_such_experts(model) -> None:
    """Built without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(model.model_type, **model.config))
    experts = [module for module in built.modules() if hasattr(module, "is_concatenated")]
    hidden, width, count, top_k = model.sizes
    assert len(experts) == 2 and built.config.num_experts_per_tok == top_k
    for module in experts:
        assert module.has_gate == model.gated
        sizes = sorted(module.down_proj.shape)
        assert sizes == sorted((count, hidden, width))
