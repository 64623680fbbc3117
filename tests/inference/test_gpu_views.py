"""Operands of the inference operators anywhere in larger buffers: the results of operands that start at whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inference_oracle import make_case
from torch import Tensor
from views import PLAIN, Place, lay

from supersonic_moe.inference import moe_fp8_ds_routed, moe_fp8_topk

pytestmark = pytest.mark.gpu

EXPERTS = 64
Operands = dict[str, Tensor]


def ds_routed(made: Operands, **options: Any) -> Tensor:
    return moe_fp8_ds_routed(
        made["logits"], made["bias"], made["x"], made["x_scale"].t(), made["w13"], made["w13_scale"], made["w2"],
        made["w2_scale"], 16, 2.5, gate_up_order="up_gate", **options,
    )  # fmt: skip


def topk(made: Operands, **options: Any) -> Tensor:
    return moe_fp8_topk(
        made["x"], made["w13"], made["w2"], made["w13_scale"], made["w2_scale"], made["weights"], made["ids"],
        x_scale=made["x_scale"], local_expert_offset=16, num_experts=EXPERTS, gate_up_order="up_gate", **options,
    )  # fmt: skip


@pytest.mark.parametrize("operator", [ds_routed, topk])
@pytest.mark.parametrize("tokens", [3, 130, 900])
def test_same_results_wherever_operands_lie(tokens: int, operator: Any) -> None:
    case = make_case("contest", tokens=tokens, choices=8, num_experts=EXPERTS, hidden=512, inter=256, local=8)
    made = {name: getattr(case, name).cuda() for name in ("x", "x_scale", "w13", "w13_scale", "w2", "w2_scale")}
    made |= {"weights": case.weights.cuda(), "ids": case.ids.cuda()}
    made |= {"logits": torch.randn(tokens, EXPERTS).cuda(), "bias": (0.1 * torch.randn(1, EXPERTS)).bfloat16().cuda()}

    def run(places: dict[str, Place], out: Tensor | None = None) -> Tensor:
        laid = {name: lay(t, places.get(name, PLAIN)) for name, t in made.items()}
        return operator(laid | {"bias": laid["bias"][0]}, out=out)

    want = run({})
    for front in (1, 4, 8):
        codes = {name: (front, 0, False) for name in ("w13", "w2", "w13_scale", "w2_scale", "bias")}
        rows = {name: (front, front, False) for name in ("x", "x_scale", "logits", "weights", "ids")}
        out = lay(torch.zeros_like(want), (front, 0, False))
        assert run(codes | rows, out) is out and torch.equal(out, want), front
    assert torch.equal(run({"bias": (0, 3, True)}), want), "every so many elements"
