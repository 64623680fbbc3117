"""Whole models, one a family, against the library's own experts: logits, loss, the gradient of every parameter, greedy
generation, BF16, gradient checkpointing, PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_graphs import Graphs
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers_models import FAMILIES, model_of, tokens, with_gradients
from transformers_precision import assert_no_further, errors_of_training, far_apart, generated

from supersonic_moe.integrations.transformers import served
from supersonic_moe.kernels import registry


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_that_of_its_own_experts(family: str) -> None:
    model, ids = model_of(family), tokens()
    report = served(model)
    assert report and all(layer.served and "fused layer" in layer.by for layer in report), str(report)
    ours, eager = with_gradients(model, "supersonic", ids), with_gradients(model, "eager", ids)
    assert far_apart(ours, eager, 2e-5) == {}
    experts = [name for name in eager if "experts." in name]
    assert experts and all(eager[name].norm() > 0 for name in experts)

    generated = []
    for implementation in ("supersonic", "eager"):
        model.set_experts_implementation(implementation)
        generated.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*generated)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_and_gradients_are_no_further_from_fp32_than_the_librarys(family: str) -> None:
    errors = errors_of_training(family, torch.bfloat16, tokens(), torch.device("cpu"))
    assert_no_further(errors, torch.bfloat16)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradient_checkpointing_gives_the_same_bits(family: str, reentrant: bool) -> None:
    model, ids = model_of(family).train(), tokens()
    plain = with_gradients(model, "supersonic", ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = with_gradients(model, "supersonic", ids)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_compiles_in_one_graph_for_every_length(family: str) -> None:
    """Two layers with the same float constants, which the compiler makes inputs of a graph unless they are literals."""
    torch._dynamo.reset()
    model, graphs = model_of(family), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for length in (11, 7, 9):
        ids, found = tokens(2, length), []
        for call in (compiled, model):
            model.zero_grad()
            loss = call(ids, labels=ids, use_cache=False).loss
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            found.append({"loss": loss.detach(), **gradients})
        assert far_apart(*found, 1e-5) == {}
    assert len(graphs) == 1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_lora_on_experts(family: str) -> None:
    """PEFT builds W + B A at every reading of a weight: right, not yet fast."""
    peft = pytest.importorskip("peft")
    names = ["up_proj", "down_proj"] if family == "nemotron_h" else ["gate_up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[f"experts.{name}" for name in names])
    model = peft.get_peft_model(model_of(family), config)
    assert len(served(model)) > 0 and all(layer.served for layer in served(model))  # inside PEFT's wrappers
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then A gets no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    found: list[dict[str, Any]] = []
    for implementation in ("supersonic", "eager"):
        found.append(with_gradients_of_adapters(model, implementation, tokens()))
    assert any("lora_A" in name for name in found[0])
    assert far_apart(*found, 2e-5) == {}


def with_gradients_of_adapters(model: Any, implementation: str, ids: Tensor) -> dict[str, Tensor]:
    model.get_base_model().set_experts_implementation(implementation)
    model.zero_grad()
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora" in name for name in gradients)
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), **gradients}


def test_weights_that_wait_on_disk(tmp_path: Path) -> None:
    """``device_map``: accelerate's hooks bring a layer's weights for the time of its forward."""
    pytest.importorskip("accelerate")
    model, ids = model_of("qwen3_moe"), tokens()
    model.save_pretrained(tmp_path / "model")
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map={**where, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offloaded",
        experts_implementation="supersonic",
    )
    assert offloaded.model.layers[1].mlp.experts.down_proj.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, model(ids).logits)


def test_weights_that_wait_between_forwards() -> None:
    """``accelerate.cpu_offload``: copies of their own in each forward, those of generation too."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = model_of("gpt_oss"), tokens()
    with torch.no_grad():
        wanted = model(ids).logits
    said, _ = generated(model, ids, 4)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        assert experts.down_proj.device.type == "meta"
        assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(generated(model, ids, 4)[0], said)


def test_the_report_names_experts_that_are_not_called_so() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "kv_channels": 8, "num_hidden_layers": 1, "vocab_size": 64}
    model = AutoModel.from_config(AutoConfig.for_model("jetmoe", num_key_value_heads=2, **sizes))
    assert [(layer.experts, layer.served) for layer in served(model)] == [("JetMoeMoE", False), ("JetMoeMoA", False)]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        served("a name")  # type: ignore[arg-type]


def test_the_report_names_what_fp8_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    model.set_experts_implementation("supersonic_fp8")
    assert [layer.why for layer in served(model.bfloat16())] == ["", ""]
    (line, _) = served(model.float())
    with pytest.raises(TypeError, match="needs bfloat16"):
        model(tokens())
    assert line.why == "under torch.autocast to bfloat16 only, for its weights are float32"

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("Fp8Recipe cannot run on cuda:0")

    monkeypatch.setattr(registry, "choose_fp8", refuses)
    (line, _) = served(model)
    assert not line.served and "nothing, it is refused; Fp8Recipe cannot run" in str(line)


def test_the_report_names_who_asks_no_backend() -> None:
    model = model_of("qwen3_moe")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    first.__class__ = type("Mine", (type(first),), {"forward": lambda self, x, *_: 0 * x})
    second.forward = lambda x, *_: 0 * x
    assert [(line.experts, line.served) for line in served(model)] == [("Mine", False), (type(second).__name__, False)]
    assert "its forward was replaced" in str(served(model)[1])


def test_the_report_names_weights_that_nothing_multiplies() -> None:
    model = model_of("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    line = served(model)[0]
    assert not line.served and "must be floating; got int8" in line.why and "for down_proj of" in line.why
    with pytest.raises(TypeError, match="must be floating; got int8"):
        model(tokens())


def test_the_report_names_what_is_not_served() -> None:
    (line, _), ids = served(model_of("llama4_text", num_hidden_layers=2, interleave_moe_layer_step=1)), tokens()
    assert not line.served and line.experts == "Llama4TextExperts"
    assert "does not let a backend compute Llama4TextExperts" in str(line)
    model = model_of("mixtral")
    model.set_experts_implementation("grouped_mm")
    assert [layer.served for layer in served(model)] == [False, False]
    assert "the library's 'grouped_mm'; call model.set_experts_implementation('supersonic')" in str(served(model))
    model.set_experts_implementation("supersonic")
    assert [layer.by for layer in served(model)] == ["the fused layer on backend 'reference', swiglu"] * 2
    model.set_experts_implementation("supersonic_fp8")
    assert [layer.by for layer in served(model)] == ["the fused layer in FP8 on backend 'reference', swiglu"] * 2
    model.set_experts_implementation("supersonic")
    unknown = model_of("mixtral", hidden_act="mish")
    assert "two grouped products" in str(served(unknown)[0]) and served(unknown)[0].served
    assert str(served(torch.nn.Linear(2, 2))) == "no layer of experts"
    assert model(ids).logits.isfinite().all()
