"""``bench transformers`` on a CPU: every contender is measured on the same tensors, and who computes something else is
not compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import run, words
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from supersonic_moe.bench import transformers
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.shapes import CPU_HUGGING_FACE_MODELS, HUGGING_FACE_MODELS
from supersonic_moe.bench.timing import graph_us
from supersonic_moe.bench.transformers import SWIGLU, Settings, TransformersCase, liger_experts_forward, run_case
from supersonic_moe.bench.transformers import _model as build

QUICK = {"device": torch.device("cpu"), "dtype": torch.float32, "warm_ms": 0.1, "min_ms": 0.1}
QWEN, GPT_OSS = CPU_HUGGING_FACE_MODELS


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
    result = run_case(TransformersCase(GPT_OSS, "layers", "train", 8), Settings(**QUICK, peers=()))
    assert set(result.metrics) == {OURS, SWIGLU}
    with pytest.raises(NotImplementedError, match="SwiGLU without biases"):
        liger_experts_forward(build(GPT_OSS, Settings(**QUICK)).model.layers[0].mlp.experts, *[torch.zeros(1)] * 3)


def test_who_computes_something_else_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(experts: nn.Module, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return 0.5 * ALL_EXPERTS_FUNCTIONS["supersonic"](experts, 1e3 * x, ids, scores)

    monkeypatch.setattr(type(ALL_EXPERTS_FUNCTIONS), "_global_mapping", {**ALL_EXPERTS_FUNCTIONS, "halved": halved})
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
    wrong = run("bench", "transformers", "--device", "cpu", "--models", "qwen9")
    assert wrong.exit_code == 2 and "a model is one of qwen3-tiny, gpt-oss-tiny; got 'qwen9'" in words(wrong)


def test_a_run_that_stops_leaves_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped_at_decode(case: TransformersCase, *_: object) -> CaseResult:
        if case.mode == "decode":
            raise KeyboardInterrupt
        return CaseResult(str(case), {OURS: {"fwd_bwd_us": 1.0}})

    monkeypatch.setattr(transformers, "run_case", stopped_at_decode)
    file = tmp_path / "transformers.json"
    run("bench", "transformers", "--device", "cpu", "--what", "layers", "--json", str(file))
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["qwen3-tiny/layers/train_T64"]


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
