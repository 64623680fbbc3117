"""torch.library contracts of every op: schema, fake kernels, dispatch under AOT; and the op list itself, so that none
goes untested.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.library import opcheck

import supersonic_moe as sm
import supersonic_moe.moe  # defines every op
from supersonic_moe.config.activation import as_activation
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.kernels.reference.activation import acc_dtype
from supersonic_moe.training import arguments
from supersonic_moe.training.fields import Fields

T, H, I, E, K = 6, 8, 4, 3, 2  # noqa: E741
ops = torch.ops.supersonic_moe

ROUTERS = [
    ("softmax_after_topk", False, 1, 1, 1.0),
    ("softmax_before_topk", True, 1, 1, 1.0),
    ("sigmoid_grouped_topk", True, 3, 2, 2.5),
]


def experts_args(tokens, dtype, bias, contiguous):
    """All ids valid and no padding: rows that no slot uses have undefined content, which opcheck would compare."""
    w1, b1, w2, b2 = (
        None if t is None else t.detach() for t in oracle.weights(E, H, I, 2, bias=(bias, bias), dtype=dtype)
    )
    if not contiguous:
        w1, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w1, w2))
    plan = arguments.Plan.of(sm.plan_from_topk(torch.randint(E, (tokens, K)), E))
    static = arguments.Static.of(as_activation("swiglu"), sm.GateUpLayout.GATE_UP, "auto")
    x = torch.randn(tokens, H, dtype=dtype)
    scores = torch.rand(tokens * K, dtype=acc_dtype(dtype))
    return [x, scores, w1, b1, w2, b2], plan, static


def flat(given):
    return Fields(type(given)).flat(*given)


EVERYTHING, ONLY_DX, NO_BUFFERS = (True,) * 6, (True, *(False,) * 5), (None, None)


def flat_incoming(dout, needs, main):
    return flat(arguments.Incoming(dout, arguments.Inputs(*needs), arguments.MainGrads(*main)))


def cases():
    for tokens, dtype, bias, contiguous in [
        (T, torch.float32, True, True),
        (T, torch.bfloat16, False, False),
        (0, torch.float64, True, True),
    ]:
        operands, plan, static = experts_args(tokens, dtype, bias, contiguous)
        name = f"T{tokens}-{str(dtype)[6:]}"
        yield f"experts_forward-{name}", flat(arguments.Bf16Forward(*operands, plan, static, True))
        yield f"experts_forward-{name}-inference", flat(arguments.Bf16Forward(*operands, plan, static, False))
        x, _, w1, b1, w2, b2 = operands
        z = torch.randn(tokens * K, 2 * I, dtype=dtype)
        _, s_P, _ = ops.experts_forward.default(*flat(arguments.Bf16Forward(*operands, plan, static, True)))
        saved = flat(arguments.Bf16Saved(z, x, s_P, w1, b1, w2, b2, plan, static))
        dout = torch.randn(tokens, H, dtype=dtype)
        main_w1, main_w2 = (torch.randn(w.shape, dtype=acc_dtype(dtype)) for w in (w1, w2))
        for kind, needs, main in [
            ("all", EVERYTHING, NO_BUFFERS),
            ("dx", ONLY_DX, NO_BUFFERS),
            ("main_grad", EVERYTHING, (main_w1, main_w2)),
            ("main_grad_of_w2", (True, True, True, False, True, False), (None, main_w2)),
        ]:
            yield f"experts_backward-{name}-{kind}", (*saved, *flat_incoming(dout, needs, main))
    yield from fp8_cases()
    for int64 in (True, False):
        ids = torch.randint(-1, E + 1, (T * K,), dtype=torch.int64 if int64 else torch.int32)
        yield f"build_plan-{int64}", (ids, None, K, T, E, 4, T * K + E * 3)
        yield (
            f"build_plan-{int64}-triples",
            (ids, torch.randint(-1, T + 1, (T * K,), dtype=ids.dtype), 0, T, E, 1, T * K),
        )
    for router in ROUTERS:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(T, E, dtype=dtype)
            bias = torch.randn(E) if router[0].startswith("sigmoid") else None
            args = (logits, bias, K, *router, "auto")
            yield f"route_forward-{router[0]}-{str(dtype)[6:]}", args
            scores, ids = ops.route_forward.default(*args)
            yield (
                f"route_backward-{router[0]}-{str(dtype)[6:]}",
                (torch.randn_like(scores), logits, scores, ids, *router, "auto"),
            )
    for dtype, counts in ((torch.float64, torch.arange(E)), (torch.bfloat16, torch.rand(E))):
        logits, dloss = torch.randn(T, E, dtype=dtype), torch.tensor(0.5, dtype=acc_dtype(dtype))
        yield f"switch_loss_forward-{str(dtype)[6:]}", (logits, counts, "auto")
        yield f"switch_loss_backward-{str(dtype)[6:]}", (dloss, logits, counts, "auto")
    counts = torch.arange(E, dtype=torch.int32)
    yield "keep_counts-last", (torch.zeros_like(counts), None, counts)
    yield "keep_counts-and_total", (torch.zeros_like(counts), torch.full((E,), 2**40), counts)
    for dtype, scale, step in ((torch.float32, None, None), (torch.bfloat16, 2.5, torch.tensor(3))):
        logits = torch.randn(T, E, dtype=dtype)
        scores, ids = ops.route_forward.default(logits, None, K, *ROUTERS[0], "auto")
        args = (logits, scores, ids, scale, "SR-f", 2, 7, 5, step, T * E, "auto")
        yield f"token_rounding_forward-{str(dtype)[6:]}", args
        _, experts, weights, _, offsets = ops.token_rounding_forward.default(*args)
        yield (
            f"token_rounding_backward-{str(dtype)[6:]}",
            (torch.randn_like(weights), logits, weights, experts, offsets, scale, "auto"),
        )


def fp8_cases():
    """Sizes that are no multiples of 16, so that the strides of FP8 buffers matter."""
    for tokens, saved, wgrad, contiguous in [
        (T, "fp8", "bf16", True),
        (T, "recompute", "fp8", False),
        (0, "bf16", "fp8", True),
    ]:
        name = f"T{tokens}-{saved}-{wgrad}"
        (x, scores, w1, b1, w2, b2), plan, static = experts_args(tokens, torch.bfloat16, True, contiguous)
        yield f"quantize_weights-{name}", ([w1, w2], "fp32", "auto")
        q1, t1, s1, q2, t2, s2 = ops.quantize_weights.default([w1, w2], "fp32", "auto")
        numerics = arguments.Numerics("fp32", saved, wgrad)
        for save in (True, False):
            weights = Quantized(q1, s1), b1, Quantized(q2, s2), b2
            forward = flat(arguments.Fp8Forward(x, scores, *weights, plan, static, numerics, save))
            yield f"experts_fp8_forward-{name}-{save}", forward
        forward = flat(arguments.Fp8Forward(x, scores, *weights, plan, static, numerics, True))
        _, s_P, z, z_scale = ops.experts_fp8_forward.default(*forward)
        weights = arguments.Fp8Weights(t1, s1, t2, s2, q1 if saved == "recompute" else None)
        kept = flat(weights) + flat(
            arguments.Fp8Saved(
                Quantized(z, z_scale), x, s_P, b1, b2, plan, static, numerics, not contiguous, not contiguous
            )
        )
        dout = torch.randn(tokens, H, dtype=torch.bfloat16)
        for kind, needs, main in [
            ("all", EVERYTHING, NO_BUFFERS),
            ("dx", ONLY_DX, NO_BUFFERS),
            ("main_grad", EVERYTHING, (torch.randn(w1.shape), None)),
        ]:
            yield f"experts_fp8_backward-{name}-{kind}", (*kept, *flat_incoming(dout, needs, main))


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op = getattr(ops, name.split("-")[0]).default
    in_fp8 = "fp8" in name or "quantize" in name
    schema = () if in_fp8 else ("test_schema",)  # its comparison of inputs before and after multiplies, e4m3 cannot
    opcheck(op, CASES[name], test_utils=(*schema, "test_faketensor", "test_aot_dispatch_dynamic"))


def test_every_op_is_checked():
    defined = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("supersonic_moe::")}
    elsewhere = {"moe_fp8_ds_routed", "moe_fp8_topk"}  # tests/inference
    elsewhere |= {"grouped_linear_forward", "grouped_linear_backward"}  # tests/api/test_grouped_linear.py
    elsewhere |= {"decode"}  # tests/integrations/transformers/test_decode.py
    assert defined - elsewhere == {name.split("-")[0] for name in CASES}


def test_compiled_gradients_are_those_of_the_definition():
    """The ops carry no autograd of their own; what surrounds them must hand AOT dispatch the right gradients."""
    weights = oracle.weights(E, H, I, 2)
    leaves = [t.detach().requires_grad_() for t in (torch.randn(T, H).double(), torch.rand(T * K).double(), *weights)]
    ids, dout = torch.randint(E, (T, K)), torch.randn(T, H).double()
    plan, activation = sm.plan_from_topk(ids, E), as_activation("swiglu")

    def layer(x, scores, w1, b1, w2, b2):
        return sm.experts_from_plan(x, scores, plan, w1, w2, b1=b1, b2=b2, activation=activation)

    def definition(x, scores, w1, b1, w2, b2):
        triples = oracle.topk_triples(ids, scores.view(T, K), E)
        return oracle.experts(x, triples, w1, b1, w2, b2, activation, sm.GateUpLayout.INTERLEAVED)

    got, want = torch.compile(layer, backend="aot_eager", fullgraph=True)(*leaves), definition(*leaves)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out, leaves, dout) for out in (got, want)]
    torch.testing.assert_close(*grads)
