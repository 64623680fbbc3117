"""DeepGEMM's calling convention: signatures as published, and calls in its words, on a CPU."""

from __future__ import annotations

import inspect
import math
from typing import Any

import mega_cases as cases
import pytest
import torch
from mega_cases import E, H, I, K

from supersonic_moe.parallel import mega_deep_gemm as deep_gemm

NONE, TRUE, SWIGLU = None, True, "swiglu"
REQUIRED = inspect.Parameter.empty
BUFFER = {
    "group": REQUIRED, "num_experts": REQUIRED, "num_max_tokens_per_rank": REQUIRED, "num_topk": REQUIRED,
    "hidden": REQUIRED, "intermediate_hidden": REQUIRED, "use_fp8_dispatch": TRUE, "activation": SWIGLU,
}  # fmt: skip
WEIGHTS = {"l1_weights": REQUIRED, "l2_weights": REQUIRED}
#: deepseek-ai/DeepGEMM, pull request 360 at 0e245d6f, and sgl-deep-gemm 0.1.5.post1: parameters and defaults.
PUBLISHED = {
    "get_symm_buffer_for_mega_moe": BUFFER,
    "get_symm_buffer_for_sm90_mega_moe": BUFFER,
    "transform_weights_for_mega_moe": WEIGHTS,
    "transform_weights_for_mega_moe_sm90": WEIGHTS,
    "fp8_mega_moe": {
        "y": REQUIRED, **WEIGHTS, "sym_buffer": REQUIRED, "cumulative_local_expert_recv_stats": NONE,
        "recipe": (128, 128, 128), "activation": SWIGLU, "activation_clamp": NONE, "fast_math": TRUE,
    },
}  # fmt: skip
INPUTS = ("x", "x_sf", "topk_idx", "topk_weights")


@pytest.mark.parametrize("name", PUBLISHED)
def test_signatures_are_the_published_ones(name: str) -> None:
    parameters = inspect.signature(getattr(deep_gemm, name)).parameters.values()
    assert {p.name: p.default for p in parameters} == PUBLISHED[name]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


def buffer(tokens: int = 40, **changes: Any) -> deep_gemm.SymmBuffer:
    sizes = {"num_experts": E, "num_max_tokens_per_rank": tokens, "num_topk": K, "hidden": H, "intermediate_hidden": I}
    return deep_gemm.get_symm_buffer_for_mega_moe(None, **(sizes | changes))


def test_calls_in_its_words() -> None:
    """T changes between calls, stats add up, a clamp of infinity is none, and what lies behind T is not read."""
    buf = buffer()
    assert (buf.num_max_tokens_per_rank, buf.num_topk, buf.hidden, buf.intermediate_hidden) == (40, K, H, I)
    stats, seen = torch.zeros(E, dtype=torch.int32), torch.zeros(E, dtype=torch.int32)
    for tokens, clamp in ((40, None), (7, math.inf), (0, None), (1, 1.0)):
        case = cases.case_of(tokens, masked=0.3, seed=tokens)
        l1, l2 = deep_gemm.transform_weights_for_mega_moe_sm90((case.w13, case.w13_scale), (case.w2, case.w2_scale))
        for name, given in zip(INPUTS, (case.x, case.x_scale, case.ids, case.weights), strict=True):
            getattr(buf, name)[:tokens].copy_(given)
        buf.x_sf[tokens:] = math.nan
        y = torch.full((tokens, H), math.nan).bfloat16()
        assert deep_gemm.fp8_mega_moe(y, l1, l2, buf, stats, activation_clamp=clamp) is None
        finite = None if clamp == math.inf else clamp
        assert torch.equal(y, cases.call(cases.mega(), case, swiglu_limit=finite, received_rows=seen))
        assert torch.equal(stats, seen)
    assert int(stats.sum()) > 40
    buf.destroy()


def test_weights_are_neither_copied_nor_mistaken() -> None:
    case = cases.case_of(3)
    pairs = (case.w13, case.w13_scale), (case.w2, case.w2_scale)
    l1, l2 = deep_gemm.transform_weights_for_mega_moe(*pairs)
    assert l1[0] is case.w13 and l1[1] is case.w13_scale and l2[0] is case.w2 and l2[1] is case.w2_scale
    y = torch.zeros(3, H).bfloat16()
    for given in ((pairs[0], l2), (l1, pairs[1])):
        with pytest.raises(TypeError, match="look the same and have their rows in another order; got tuple"):
            deep_gemm.fp8_mega_moe(y, *given, buffer())
    with pytest.raises(TypeError, match="w13 must be float8_e4m3fn; got int8"):
        packed = case.w13.view(torch.int8)
        deep_gemm.transform_weights_for_mega_moe((packed, case.w13_scale), pairs[1])


def test_what_does_not_exist_is_refused() -> None:
    case, y = cases.case_of(3), torch.zeros(3, H).bfloat16()
    weights = deep_gemm.transform_weights_for_mega_moe((case.w13, case.w13_scale), (case.w2, case.w2_scale))
    for changes, message in (
        ({"use_fp8_dispatch": False}, "use_fp8_dispatch must be True"),
        ({"activation": "gelu"}, "activation must be 'swiglu'; got 'gelu'"),
    ):
        with pytest.raises(ValueError, match=message):
            buffer(**changes)
    for options, message in (
        ({"recipe": (1, 1, 32)}, r"recipe must be \(128, 128, 128\)"),
        ({"recipe": None}, r"recipe must be \(128, 128, 128\).*; got None"),
        ({"activation": "gelu"}, "activation must be 'swiglu'; got 'gelu'"),
        ({"activation_clamp": -1.0}, "limit must be a positive finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            deep_gemm.fp8_mega_moe(y, *weights, buffer(), **options)
    with pytest.raises(ValueError, match="more rows than the buffer, 2; got 3"):
        deep_gemm.fp8_mega_moe(y, *weights, buffer(2))
    with pytest.raises(TypeError, match="sym_buffer must come from get_symm_buffer_for_mega_moe of this module"):
        deep_gemm.fp8_mega_moe(y, *weights, object())
    for other in (y.float(), torch.zeros(H, 3).bfloat16().t()):
        with pytest.raises(ValueError, match=r"y must be a contiguous bfloat16 tensor; got .* strides"):
            deep_gemm.fp8_mega_moe(other, *weights, buffer())
    for pairs in ((case.w13, weights[1]), ((*weights[0], None), weights[1])):
        with pytest.raises(TypeError, match=r"l1_weights must be a pair \(codes, scale\); got"):
            deep_gemm.transform_weights_for_mega_moe(*pairs)


def test_a_buffer_is_destroyed_once() -> None:
    case, buf = cases.case_of(3), buffer()
    weights = deep_gemm.transform_weights_for_mega_moe((case.w13, case.w13_scale), (case.w2, case.w2_scale))
    buf.destroy()
    buf.destroy()
    with pytest.raises(ValueError, match="must not be destroyed before a call"):
        deep_gemm.fp8_mega_moe(torch.zeros(3, H).bfloat16(), *weights, buf)
