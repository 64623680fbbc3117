"""What is refused, and that the sentence says the constraint and what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inference_oracle import make_case

from supersonic_moe.inference import SharedExpert, moe_fp8_ds_routed, moe_fp8_topk, workspace_bytes

F8 = torch.float8_e4m3fn


def topk_arguments() -> dict[str, Any]:
    case = make_case(tokens=4, order="gate_up")
    return {
        "x": case.x, "w13": case.w13, "w2": case.w2, "w13_scale": case.w13_scale, "w2_scale": case.w2_scale,
        "topk_weights": case.weights, "topk_ids": case.ids, "x_scale": case.x_scale, "gate_up_order": "gate_up",
    }  # fmt: skip


def routed_arguments() -> dict[str, Any]:
    case = make_case(tokens=4)
    return {
        "routing_logits": torch.randn(4, 16), "routing_bias": torch.zeros(16), "hidden_states": case.x,
        "hidden_states_scale": case.x_scale.t(), "gemm1_weights": case.w13, "gemm1_scale": case.w13_scale,
        "gemm2_weights": case.w2, "gemm2_scale": case.w2_scale, "local_expert_offset": 0, "routed_scaling_factor": 1.0,
        "n_group": 4, "topk_group": 2, "top_k": 4,
    }  # fmt: skip


def zeros(*shape: int, dtype: torch.dtype = F8) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float32).to(dtype)


TOPK = [
    ({"x": zeros(4, 256, dtype=torch.float16)}, TypeError, "x must be bfloat16 or float8_e4m3fn; got float16"),
    ({"x": zeros(4, 128)}, ValueError, "x must have hidden size 256"),
    ({"x": zeros(4, 256, dtype=torch.bfloat16)}, ValueError, "x_scale belongs to float8_e4m3fn x"),
    ({"x_scale": None}, ValueError, "float8_e4m3fn x needs x_scale"),
    ({"x_scale": torch.ones(2, 4)}, ValueError, r"x_scale must have shape \(4, 2\)"),
    ({"x_scale": torch.ones(4, 2).half()}, TypeError, "x_scale must be float32"),
    ({"x_scale_layout": "rows"}, ValueError, "x_scale_layout must be 'token_major'"),
    ({"w13": zeros(5, 256, 256, dtype=torch.bfloat16)}, TypeError, "w13 must be float8_e4m3fn"),
    ({"w13": zeros(5, 320, 256)}, ValueError, r"w13 must have 2 I \(second dimension\) 256"),
    ({"w13": zeros(5, 256, 192), "w2": zeros(5, 192, 128)}, ValueError, "H of w13 must be a multiple of 128; got 192"),
    ({"w13": zeros(5, 192, 256), "w2": zeros(5, 256, 96)}, ValueError, "I of w2 must be a multiple of 64; got 96"),
    ({"w13": zeros(5, 256, 512)[:, :, ::2]}, ValueError, "w13 must have contiguous rows"),
    ({"w2": zeros(4, 256, 128)}, ValueError, "w2 must have expert count 5"),
    ({"w13_scale": torch.ones(5, 1, 2)}, ValueError, r"w13_scale must have shape \(5, 2, 2\)"),
    ({"w2_scale": torch.ones(5, 2, 2)[:, :, :1]}, ValueError, "w2_scale must be contiguous"),
    ({"topk_ids": torch.zeros(4, 3)}, TypeError, "topk_ids must be int32 or int64"),
    ({"topk_ids": torch.zeros(3, 3).int()}, ValueError, "one row per token"),
    ({"topk_weights": torch.ones(4, 2)}, ValueError, "topk_weights must have the shape of topk_ids"),
    ({"topk_weights": torch.ones(4, 3).bfloat16()}, TypeError, "topk_weights must be float32"),
    ({"topk_ids": torch.zeros(4, 17).int(), "topk_weights": torch.ones(4, 17)}, ValueError, "at most 16 choices"),
    ({"expert_map": torch.zeros(8)}, TypeError, "expert_map must be int32"),
    ({"expert_map": torch.zeros(8).int(), "local_expert_offset": 4}, ValueError, "Pass one of them"),
    ({"expert_map": torch.zeros(8).int(), "num_experts": 9}, ValueError, "expert_map must have length 9"),
    ({"gate_up_order": "down_up"}, ValueError, "unknown gate/up layout 'down_up'"),
    ({"swiglu_limit": 0.0}, ValueError, "swiglu_limit must be a positive finite number"),
    ({"routed_scaling_factor": float("inf")}, ValueError, "routed_scaling_factor must be a finite number"),
    ({"routed_scaling_factor": None}, TypeError, r"routed_scaling_factor must be a number; got NoneType"),
    ({"local_expert_offset": 1.0}, TypeError, r"local_expert_offset must be an integer; got float \(1.0\)"),
    ({"pow2_scales": "ue8m0"}, TypeError, "pow2_scales must be True or False"),
    ({"apply_router_weight_on_input": "no"}, TypeError, "apply_router_weight_on_input must be True or False"),
    (
        {"shared_expert": (zeros(256, 256), zeros(256, 128))},
        TypeError,
        "shared_expert must be a SharedExpert; got tuple",
    ),
    (
        {"w13": zeros(5, 384, 256), "w2": zeros(5, 256, 192), "w13_scale": torch.ones(5, 3, 2)},
        ValueError,
        r"w13_scale must have shape \(5, 4, 2\) \(one scale for each block of 128, gate and up rows each with",
    ),
    ({"received_rows": torch.zeros(5)}, TypeError, "received_rows must be int32"),
    ({"received_rows": torch.zeros(4).int()}, ValueError, "received_rows must have length 5"),
    ({"received_rows": torch.zeros(5, 2).int()[:, 0]}, ValueError, "received_rows must be contiguous"),
    ({"out": torch.empty(4, 256)}, ValueError, "out must be a contiguous bfloat16 tensor"),
    ({"out": torch.empty(3, 256).bfloat16()}, ValueError, "out must have the shape of x"),
    ({"workspace": torch.empty(8)}, TypeError, "workspace must be uint8"),
    ({"workspace": torch.empty(8).byte()}, ValueError, "workspace must hold"),
    ({"max_tokens_per_chunk": 0}, ValueError, "max_tokens_per_chunk must be at least 1"),
    (
        {"shared_expert": SharedExpert(zeros(512, 256), zeros(256, 256), torch.ones(4, 2), torch.ones(2, 2))},
        ValueError,
        "shared_expert.w2 must have I 128",
    ),
    (
        {"shared_expert": SharedExpert(zeros(1, 256, 256), zeros(256, 128), torch.ones(2, 2), torch.ones(2, 1))},
        ValueError,
        "shared_expert.w13 must have 2 dimensions",
    ),
]

ROUTED = [
    ({"routing_logits": torch.randn(3, 16)}, ValueError, "routing_logits must have length 4"),
    ({"routing_logits": torch.randn(4, 16).bfloat16()}, TypeError, "routing_logits must be float32"),
    ({"routing_bias": torch.zeros(15)}, ValueError, "routing_bias must have length 16"),
    ({"routing_bias": torch.zeros(16).half()}, TypeError, "routing_bias must be bfloat16 or float32"),
    ({"hidden_states": zeros(4, 256, dtype=torch.bfloat16)}, TypeError, "moe_fp8_topk takes bfloat16"),
    ({"hidden_states_scale": torch.ones(4, 2)}, ValueError, r"hidden_states_scale must have shape \(2, 4\)"),
    ({"n_group": 3}, ValueError, "multiple of n_group"),
    ({"top_k": 9}, ValueError, "top_k must not exceed the experts of the kept groups"),
    ({"local_expert_offset": "8"}, TypeError, "local_expert_offset must be an integer; got str"),
    ({"local_expert_offset": 8.5}, TypeError, "local_expert_offset must be an integer; got float"),
    ({"routed_scaling_factor": None}, TypeError, "routed_scaling_factor must be a number; got NoneType"),
    ({"scoring": "relu"}, ValueError, "unknown scoring 'relu'; choose one of sigmoid, softmax, sqrt_softplus"),
]


REFUSED = [(moe_fp8_topk, topk_arguments, *case) for case in TOPK]
REFUSED += [(moe_fp8_ds_routed, routed_arguments, *case) for case in ROUTED]


@pytest.mark.parametrize(
    ("operator", "good", "change", "error", "message"), REFUSED, ids=[f"{f.__name__}-{m}" for f, *_, m in REFUSED]
)
def test_refused(
    operator: Callable[..., torch.Tensor],
    good: Callable[[], dict[str, Any]],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    arguments = good()
    operator(**arguments)
    with pytest.raises(error, match=message):
        operator(**{**arguments, **change})


def test_workspace_of_no_shape() -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        workspace_bytes(4, 0, 256, 128, 4)
    with pytest.raises(ValueError, match="num_tokens must not be negative"):
        workspace_bytes(-1, 8, 256, 128, 4)


def test_a_shared_expert_counts_as_a_local_one() -> None:
    case, shared = make_case(tokens=2, hidden=128, inter=64, local=512), make_case(local=1, hidden=128, inter=64)
    one = SharedExpert(shared.w13[0], shared.w2[0], shared.w13_scale[0], shared.w2_scale[0])
    arguments = (case.x, case.w13, case.w2, case.w13_scale, case.w2_scale, case.weights, case.ids)
    moe_fp8_topk(*arguments, x_scale=case.x_scale, gate_up_order="up_gate")
    with pytest.raises(ValueError, match="512 is the most; got 512 routed ones"):
        moe_fp8_topk(*arguments, x_scale=case.x_scale, gate_up_order="up_gate", shared_expert=one)
