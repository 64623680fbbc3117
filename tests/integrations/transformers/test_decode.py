"""Forwards with few rows in eval mode under ``no_grad``: which take the kernels of decode, and that these compute what
the library's own forward does. On a CPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_graphs import Graphs
from oracle import rel_fro
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from transformers_experts import CHOICES, HIDDEN, TOKENS, WIDTH, decorated_classes, inputs, random_experts

import supersonic_moe.integrations.transformers  # noqa: F401  registers our names
from supersonic_moe.inference import decode
from supersonic_moe.integrations.transformers.gates import gate_of
from supersonic_moe.training.arguments import Static

pytest.importorskip("triton")
CLASSES = decorated_classes()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A CPU counts as a GPU."""
    if device.type == "cpu":
        monkeypatch.setattr(decode, "_on_gpu", lambda *_: True)


@pytest.fixture
def calls(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each forward that takes the kernels."""
    seen, run = [], decode.run

    def counted(operands: decode.Operands, gate: Any) -> Tensor:
        seen.append(operands.x.shape[0])
        return run(operands, gate)

    monkeypatch.setattr(decode, "run", counted)
    return seen


def made(name: str, device: torch.device) -> tuple[Any, Callable[..., Tensor]]:
    """A module in bf16 and eval mode, and a forward of it in another dtype and by another backend."""
    module = random_experts(CLASSES[name], torch.bfloat16).to(device).eval()
    x, ids, scores = (t.detach().to(device) for t in inputs(module, torch.bfloat16))

    def forward(implementation: str = "supersonic", dtype: torch.dtype = torch.bfloat16) -> Tensor:
        module.config._experts_implementation = implementation
        out: Tensor = module(x.to(dtype), ids, scores.to(dtype))
        return out

    return module, forward


DECODED = (
    "DeepseekV4Experts",
    "Gemma4TextExperts",
    "GptOssExperts",
    "MiniMaxM3VLExperts",
    "NemotronHExperts",
    "Qwen3MoeExperts",
)


@pytest.mark.parametrize("name", DECODED)
def test_it_computes_what_the_library_does(name: str, calls: list[int], device: torch.device) -> None:
    module, forward = made(name, device)
    with torch.no_grad():
        ours = forward()
        module.double()
        exact = forward("eager", torch.float64)
    assert calls == [TOKENS]
    assert ours.dtype is torch.bfloat16
    assert rel_fro(ours.cpu(), exact.cpu()) < 8e-3  # two roundings; the interpreter truncates to bf16


def test_fp8_from_bf16_weights_is_not_worth_quantizing_them(calls: list[int], device: torch.device) -> None:
    _, forward = made("Qwen3MoeExperts", device)
    with torch.no_grad():
        assert torch.equal(forward("supersonic"), forward("supersonic_fp8"))
    assert calls == [TOKENS, TOKENS]


def in_training(module: nn.Module) -> None:
    module.train()


def many_rows(module: nn.Module) -> None:
    module.gate_up_proj = nn.Parameter(module.gate_up_proj[:4])
    module.down_proj = nn.Parameter(module.down_proj[:4])


def in_fp32(module: nn.Module) -> None:
    module.float()


def of_many_forms(module: nn.Module) -> None:
    """Gate and up of a pair far apart, in weights whose rows are not contiguous."""
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.mT.contiguous().mT)


@pytest.mark.parametrize("change", [in_training, many_rows, in_fp32, of_many_forms])
def test_other_forwards_take_the_ways_of_the_layer(change: Any, calls: list[int], device: torch.device) -> None:
    module, forward = made("Qwen3MoeExperts", device)
    change(module)
    with torch.no_grad():
        forward()
    assert calls == []


def test_recorded_forwards_take_the_ways_of_the_layer(calls: list[int], device: torch.device) -> None:
    _, forward = made("Qwen3MoeExperts", device)
    assert forward().requires_grad and calls == []


def test_flops_are_those_of_the_layer(calls: list[int], device: torch.device) -> None:
    """Under a dispatch mode, which sees the op."""
    module, _ = made("Qwen3MoeExperts", device)
    x, ids, scores = (t.detach().to(device) for t in inputs(module, torch.bfloat16))
    operands = decode.Operands(x, ids, scores, module.gate_up_proj, None, module.down_proj, None)
    gate = gate_of(module)
    assert gate is not None and decode.suits(operands, gate)
    with torch.no_grad():
        plain = decode.run(operands, gate)
        with FlopCounterMode(display=False) as counted:
            assert torch.equal(decode.run(operands, gate), plain)
    assert counted.get_total_flops() == 6 * TOKENS * CHOICES * HIDDEN * WIDTH


def test_opcheck(calls: list[int], device: torch.device) -> None:
    module, _ = made("GptOssExperts", device)
    x, ids, scores = (t.detach().to(device) for t in inputs(module, torch.bfloat16))
    w1, w2 = (w.detach().mT for w in (module.gate_up_proj, module.down_proj))
    operands = decode.Operands(
        x, ids, scores, w1, module.gate_up_proj_bias.detach(), w2, module.down_proj_bias.detach()
    )
    gate = gate_of(module)
    assert gate is not None and decode.suits(operands, gate)
    static = Static.of(gate.activation, gate.layout, "auto")
    opcheck(torch.ops.supersonic_moe.decode.default, tuple(decode._CALL.flat(operands, static)))


def test_compiled_forwards_take_the_same_way_in_one_graph(on_gpu: None, device: torch.device) -> None:
    torch._dynamo.reset()
    module, _ = made("GptOssExperts", device)
    module.limit, module.alpha = 7.0, 1.702  # those of the library's model
    module.config._experts_implementation = "supersonic"
    x, ids, scores = (t.detach().to(device) for t in inputs(module, torch.bfloat16))
    graphs = Graphs()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    with torch.no_grad():
        for tokens in (13, 7, 10):
            given = [t[:tokens].clone() for t in (x, ids, scores)]
            assert torch.equal(compiled(*given), module(*given))
    (graph,) = graphs
    assert "supersonic_moe.decode" in graph.code


def test_an_exported_program_takes_any_number_of_tokens(on_gpu: None, device: torch.device) -> None:
    module, forward = made("Qwen3MoeExperts", device)
    module.config._experts_implementation = "supersonic"
    x, ids, scores = (t.detach().to(device) for t in inputs(module, torch.bfloat16))
    tokens = torch.export.Dim("tokens", min=2, max=65536)
    with torch.no_grad():
        program = torch.export.export(module, (x, ids, scores), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}))
        module.train()  # takes the layer's way
        assert torch.equal(program.module()(x, ids, scores), forward())
    assert "supersonic_moe.decode" not in program.graph_module.code
