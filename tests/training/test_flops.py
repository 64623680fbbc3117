"""``FlopCounterMode`` counts what ``perf_model`` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inference_oracle import make_case
from torch.utils.flop_counter import FlopCounterMode

import supersonic_moe as sm
from supersonic_moe.inference import SharedExpert, moe_fp8_ds_routed, moe_fp8_topk
from supersonic_moe.perf_model import LayerShape, Step, fp8_steps, layer_flops, layer_steps

SHAPE = LayerShape(tokens=24, hidden=128, intermediate=256, experts=4, top_k=2)


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


def layer(activation: str, recipe: sm.Fp8Recipe | None = None) -> tuple[sm.MoE, torch.Tensor]:
    moe = sm.MoE(SHAPE.experts, SHAPE.top_k, SHAPE.hidden, SHAPE.intermediate, activation, False, 0.1, recipe=recipe)
    return moe.bfloat16(), torch.randn(SHAPE.tokens, SHAPE.hidden).bfloat16().requires_grad_()


RECIPES = [
    None,
    sm.Fp8Recipe(),
    sm.Fp8Recipe(wgrad="bf16", save_preactivation="recompute"),
    sm.Fp8Recipe(keep_transposed=False),
]


@pytest.mark.parametrize("activation", ["swiglu", "relu_sq"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_layer_counts_the_flops_of_its_steps(activation: str, recipe: sm.Fp8Recipe | None) -> None:
    gated = activation == "swiglu"
    steps = fp8_steps(SHAPE, recipe, gated=gated) if recipe else layer_steps(SHAPE, gated=gated)

    def expected(phase: str, kept: Callable[[Step], bool] = lambda step: True) -> int:
        return sum(step.flops for step in steps if step.phase == phase and kept(step))

    moe, x = layer(activation, recipe)
    forward, (out, _) = counted(lambda: moe(x))
    backward, _ = counted(lambda: out.sum().backward())
    assert (forward, backward) == (expected("forward"), expected("backward"))

    moe.c_fc.requires_grad_(False)
    backward, _ = counted(lambda: moe(x)[0].sum().backward())
    assert backward == expected("forward") + expected("backward", lambda step: step.key != "7")


def test_functions_count_the_flops_of_the_experts_alone() -> None:
    moe, x = layer("swiglu")
    ids, scores = torch.randint(SHAPE.experts, (SHAPE.tokens, SHAPE.top_k)), torch.rand(SHAPE.tokens, SHAPE.top_k)
    weights = moe.c_fc.weight, moe.c_proj.weight
    forward, out = counted(lambda: sm.topk_experts(x, ids, scores, *weights))
    backward, _ = counted(lambda: out.sum().backward())
    assert (forward, forward + backward) == layer_flops(SHAPE, gated=True)
    plan, flat = sm.plan_from_deepep(ids - 1, scores, torch.bincount(ids.flatten(), minlength=4)[1:])
    forward, _ = counted(lambda: sm.experts_from_plan(x, flat, plan, *(w[1:] for w in weights)))
    assert forward == layer_flops(SHAPE, gated=True, rows=plan.capacity)[0], "known counts size the buffers"


def test_inference_operators_count_what_falls_to_a_rank_on_average() -> None:
    case = make_case(tokens=20, hidden=256, inter=128, local=4, choices=3, num_experts=16, order="gate_up")
    weights = case.w13, case.w2, case.w13_scale, case.w2_scale
    shared = SharedExpert(*(w[0] for w in weights))
    row = 6 * 256 * 128

    def topk(**options: Any) -> int:
        operands = case.x, *weights, case.weights, case.ids
        return counted(lambda: moe_fp8_topk(*operands, x_scale=case.x_scale, gate_up_order="gate_up", **options))[0]

    assert topk() == 60 * row
    assert topk(num_experts=16, local_expert_offset=8) == 15 * row
    assert topk(expert_map=torch.arange(8).int(), shared_expert=shared) == (30 + 20) * row
    operands = case.x, case.x_scale.t(), case.w13, case.w13_scale, case.w2, case.w2_scale, 0, 1.0
    rule = {"n_group": 4, "topk_group": 2, "top_k": 4}
    assert counted(lambda: moe_fp8_ds_routed(torch.randn(20, 16), None, *operands, **rule))[0] == 20 * row
