"""Whole models of Transformers on a GPU: logits and gradients in BF16 and fp16, generation, a step in a CUDA graph,
weights that wait on the host, the compiler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_graphs import Graphs
from cuda_graphs import in_graph
from oracle import rel_fro
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers_models import FAMILIES, VOCABULARY, model_of, tokens
from transformers_precision import assert_no_further, errors_of_generation, errors_of_training, far_apart, generated

from supersonic_moe.inference import decode

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_no_further_from_fp32_than_the_librarys(family: str, dtype: torch.dtype) -> None:
    assert_no_further(errors_of_training(family, dtype, tokens(4, 32), CUDA), dtype)


# ---- generation ------------------------------------------------------------------------------------------------------

GENERATED = ("qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v4", "gpt_oss", "nemotron_h", "gemma4_text")


@pytest.mark.parametrize("family", GENERATED)
def test_generation_is_that_of_fp32_on_the_cpu(family: str) -> None:
    model: Any = model_of(family)
    model.set_experts_implementation("eager")
    wanted, _ = generated(model, tokens(), 6)
    model.to(CUDA).set_experts_implementation("supersonic")
    found, _ = generated(model, tokens().to(CUDA), 6)
    assert torch.equal(found.cpu(), wanted)


@DTYPES
@pytest.mark.parametrize("family", GENERATED)
def test_generation_is_no_further_from_fp32_than_the_librarys(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run = [], decode.run

    def counted(operands: decode.Operands, gate: Any) -> Tensor:
        calls.append(operands.x.shape[0])
        return run(operands, gate)

    monkeypatch.setattr(decode, "run", counted)
    errors = errors_of_generation(family, dtype, tokens(), CUDA, 6)
    assert calls.count(2) >= 5  # steps of two sequences by one token each
    assert errors["supersonic"]["logits"] < 1.3 * errors["eager"]["logits"], errors


@DTYPES
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_step_of_a_model_replays_in_a_cuda_graph(family: str, dtype: torch.dtype) -> None:
    model, ids = model_of(family, dtype).to(CUDA), tokens(4, 1).to(CUDA)
    own_token = torch.zeros(4, 1, 1, 1, dtype=dtype, device=CUDA)  # a mask that is added: nobody asks the GPU about it

    def call() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids, attention_mask=own_token, use_cache=False).logits
        return logits

    before = call()
    graph, out = in_graph(call)
    for _ in range(2):
        ids.copy_(torch.randint(3, VOCABULARY, ids.shape))
        graph.replay()
        assert rel_fro(out, call()) < 1e-2 < rel_fro(out, before)


# ---- around it -------------------------------------------------------------------------------------------------------


def test_weights_that_wait_on_the_host(tmp_path: Path) -> None:
    """``device_map``: accelerate's hooks bring a layer's weights for the time of its forward, to other addresses."""
    pytest.importorskip("accelerate")
    model, ids = model_of("qwen3_moe", torch.bfloat16), tokens().to(CUDA)
    model.save_pretrained(tmp_path)
    where: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), 0
    )
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        device_map={**where, "model.layers.1": "cpu"},
        experts_implementation="supersonic",
    )
    experts = offloaded.model.layers[1].mlp.experts
    model, taken = model.to(CUDA), []
    seen: list[tuple[Any, Tensor]] = []
    hook = experts.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    with torch.no_grad():
        for given in (ids, ids[:1, :1], ids[:1, 1:2], ids, ids[:, :5]):
            assert experts.down_proj.device.type == "meta"
            gap = rel_fro(offloaded(given).logits, model(given).logits)  # cuBLAS chooses by addresses
            assert gap < 2e-2
            arguments, out = seen.pop()
            assert torch.equal(model.model.layers[1].mlp.experts(*arguments), out)
            taken.append(torch.empty(1 << 16, device=CUDA))  # the next copies lie elsewhere
    hook.remove()


def test_a_model_compiles_in_one_graph_for_every_length_but_1() -> None:
    """Forward and backward; torch takes a size of 1 for a constant."""
    torch._dynamo.reset()
    model, graphs = model_of("qwen3_moe", torch.bfloat16).to(CUDA), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for length in (13, 7, 10, 1, 9, 1):
        ids, found = tokens(1, length).to(CUDA), []
        for call in (compiled, model):
            model.zero_grad()
            logits = call(ids, use_cache=False).logits
            logits.float().square().mean().backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            found.append({"logits": logits.detach(), **gradients})
        assert far_apart(*found, 2e-2) == {}
        counts.append(len(graphs))
    assert counts == [1, 1, 1, 2, 2, 2]
