"""``moe_fp8_ds_routed`` against the definition of the operator, and what a serving stack may do with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compiled_graphs import Graphs
from inference_oracle import Case, errors, make_case, moe_loop, route_token
from torch import Tensor

from supersonic_moe.inference import moe_fp8_ds_routed, workspace_bytes

EXPERTS, LOCAL = 32, 4
NAN_CODE = 0x7F
RULE = {"n_group": 8, "topk_group": 4, "top_k": 6, "scoring": "sigmoid"}


def routed_case(tokens: int, kind: str = "contest", **sizes: int) -> tuple[Case, Tensor, Tensor]:
    case = make_case(kind, tokens=tokens, local=LOCAL, choices=RULE["top_k"], num_experts=EXPERTS, **sizes)
    g = torch.Generator().manual_seed(tokens + 1)
    logits = torch.randn(tokens, EXPERTS, generator=g) + torch.randn(EXPERTS, generator=g) * 0.2
    return case, logits, (torch.randn(EXPERTS, generator=g) * 0.05).bfloat16()


def call(case: Case, logits: Tensor, bias: Tensor | None, offset: int = 8, factor: float = 2.5, **settings) -> Tensor:
    return moe_fp8_ds_routed(
        logits, bias, case.x, case.x_scale.t().contiguous(), case.w13, case.w13_scale, case.w2, case.w2_scale, offset,
        factor, **{**RULE, **settings},
    )  # fmt: skip


def definition(case: Case, logits: Tensor, bias: Tensor, offset: int = 8, factor: float = 2.5) -> np.ndarray:
    """Routing and experts one token at a time; weights and ids are put into the case."""
    rows = [
        route_token(row, bias.double().numpy(), factor=factor, **RULE)
        for row in logits.double().numpy()
    ]  # fmt: skip
    case.ids = torch.tensor([ids for ids, _ in rows], dtype=torch.int32).reshape(len(rows), RULE["top_k"]) - offset
    case.weights = torch.tensor([w for _, w in rows], dtype=torch.float64).reshape(len(rows), RULE["top_k"])
    return moe_loop(case)


@pytest.mark.parametrize("kind", ["contest", "realistic", "positive", "all_positive"])
@pytest.mark.parametrize("tokens", [1, 7, 32, 53])
def test_like_the_definition(tokens: int, kind: str) -> None:
    case, logits, bias = routed_case(tokens, kind)
    got, want = call(case, logits, bias), definition(case, logits, bias)
    assert got.dtype is torch.bfloat16 and got.shape == case.x.shape
    without = ~want.any(axis=1)
    assert got[torch.from_numpy(without)].view(torch.int16).eq(0).all(), "rows without a local expert are +0"
    if not without.all():
        frobenius, worst_row = errors(got, want)
        assert frobenius <= 0.03 and worst_row <= 0.06


@pytest.mark.parametrize(("offset", "local"), [(-2, 2), (0, 4), (8, 4), (29, 3), (30, 2), (32, 0), (1000, 0)])
def test_offsets_at_and_beyond_the_edges(offset: int, local: int) -> None:
    case, logits, bias = routed_case(40)
    got, want = call(case, logits, bias, offset), definition(case, logits, bias, offset)
    if local:
        assert errors(got, want)[0] <= 0.03
    else:
        assert got.view(torch.int16).eq(0).all()


@pytest.mark.parametrize("tokens", [*range(1, 131), 900])
def test_every_token_count_is_the_same_operator(tokens: int) -> None:
    """Each token is computed as it is alone: no size is special."""
    case, logits, bias = routed_case(tokens, hidden=128, inter=64)
    got = call(case, logits, bias)
    for t in {0, tokens // 2, tokens - 1}:
        one = make_case(tokens=0, local=LOCAL, choices=RULE["top_k"], num_experts=EXPERTS, hidden=128, inter=64)
        one.x, one.x_scale = case.x[t : t + 1], case.x_scale[t : t + 1]
        one.w13, one.w13_scale, one.w2, one.w2_scale = case.w13, case.w13_scale, case.w2, case.w2_scale
        torch.testing.assert_close(call(one, logits[t : t + 1], bias), got[t : t + 1], rtol=0.05, atol=1e-2)


def test_all_tokens_at_one_expert() -> None:
    case, logits, bias = routed_case(64)
    bias[9] = 3.0
    got, want = call(case, logits, bias), definition(case, logits, bias)
    assert (case.ids == 1).any(1).all()
    assert errors(got, want)[0] <= 0.03


def test_no_tokens() -> None:
    case, logits, bias = routed_case(0)
    assert call(case, logits, bias).shape == (0, 256)


def test_nan_where_no_local_expert_reads_it() -> None:
    case, logits, bias = routed_case(40)
    clean = call(case, logits, bias)
    unread = clean.eq(0).all(1)
    assert unread.any() and not unread.all()
    case.x.view(torch.uint8)[unread] = NAN_CODE
    case.x_scale[unread] = math.nan
    out = torch.full_like(clean, math.nan)
    assert torch.equal(call(case, logits, bias, out=out), clean) and not out.signbit()[unread].any()


def test_nan_logits_leave_other_tokens_alone() -> None:
    case, logits, bias = routed_case(20)
    clean = call(case, logits, bias)
    logits[[3, 11]] = math.nan
    got = call(case, logits, bias)
    rest = [t for t in range(20) if t not in (3, 11)]
    assert torch.equal(got[rest], clean[rest])


def test_contents_are_read_in_every_call() -> None:
    """Operands changed in place, at the same addresses: nothing may be remembered."""
    case, logits, bias = routed_case(16)
    x_scale = case.x_scale.t().contiguous()
    operands = [logits, bias, case.x, x_scale, case.w13, case.w13_scale, case.w2, case.w2_scale]

    def now() -> Tensor:
        return moe_fp8_ds_routed(*operands, 8, 2.5, **RULE)

    before = now()
    other, other_logits, other_bias = routed_case(17, seed=9)
    favoured = torch.where(torch.arange(EXPERTS) // LOCAL == 2, 1.0, other_bias.float())
    changed = [other_logits[:16], favoured, other.x[:16], other.x_scale[:16].t(), other.w13.flip(0)]
    changed += [2 * case.w13_scale, other.w2.flip(0), 3 * case.w2_scale]
    for operand, new in zip(operands, changed, strict=True):
        kept = operand.clone()
        operand.copy_(new)
        assert not torch.equal(now(), before)
        operand.copy_(kept)
        assert torch.equal(now(), before)


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_chunks_give_the_same_result(chunk: int) -> None:
    case, logits, bias = routed_case(40, "realistic")
    torch.testing.assert_close(
        call(case, logits, bias, max_tokens_per_chunk=chunk), call(case, logits, bias), rtol=0.02, atol=1e-4
    )


def test_out_and_workspace_of_the_caller() -> None:
    case, logits, bias = routed_case(12)
    needed = workspace_bytes(12, RULE["top_k"], 256, 128, LOCAL)
    workspace = torch.full((needed,), 255, dtype=torch.uint8)
    out = torch.full((12, 256), math.nan, dtype=torch.bfloat16)
    got = call(case, logits, bias, out=out, workspace=workspace)
    assert got.data_ptr() == out.data_ptr() and torch.equal(out, call(case, logits, bias))
    with pytest.raises(ValueError, match=f"must hold {needed} bytes for this call; got {needed - 1}"):
        call(case, logits, bias, workspace=workspace[:-1])
    small = workspace_bytes(5, RULE["top_k"], 256, 128, LOCAL)
    call(case, logits, bias, workspace=workspace[:small], max_tokens_per_chunk=5)


@pytest.mark.parametrize("scoring", ["softmax", "sqrt_softplus"])
def test_other_scores_reach_the_router(scoring: str) -> None:
    case, logits, bias = routed_case(10)
    assert not torch.equal(call(case, logits, bias, scoring=scoring), call(case, logits, bias))


def test_the_same_bits_in_every_call_and_under_the_compiler() -> None:
    case, logits, bias = routed_case(33)
    first = call(case, logits, bias)
    assert torch.equal(call(case, logits, bias), first)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case, logits, bias), first)
    for tokens in (21, 40):  # the second number of tokens makes it a symbol
        case, logits, bias = routed_case(tokens)
        assert torch.equal(compiled(case, logits, bias), call(case, logits, bias))


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_graph_for_any_number_of_tokens(dynamic: bool | None) -> None:
    graphs = Graphs()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=graphs)
    for tokens in range(20, 32):  # more than any other size is symbolic
        given = routed_case(tokens)
        assert torch.equal(compiled(*given), call(*given))
    assert len(graphs) <= 2


def test_autocast_changes_nothing() -> None:
    given = routed_case(tokens=5)
    want = call(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(*given), want)


def test_op_and_its_fake_agree() -> None:
    case, logits, bias = routed_case(4)
    torch.library.opcheck(
        torch.ops.supersonic_moe.moe_fp8_ds_routed.default,
        (logits, bias, case.x, case.x_scale, [case.w13, case.w13_scale, case.w2, case.w2_scale], 8, 6, 8, 4, "sigmoid",
         2.5, "up_gate", torch.empty(4, 256, dtype=torch.bfloat16), None),
        test_utils="test_faketensor",
    )  # fmt: skip
