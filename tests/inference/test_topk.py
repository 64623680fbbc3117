"""``moe_fp8_topk``: the operator behind another router, as vLLM and SGLang call it."""

from __future__ import annotations

import math

import pytest
import torch
from compiled_graphs import Graphs
from inference_oracle import Case, errors, make_case, moe_loop
from torch import Tensor

from supersonic_moe.inference import SharedExpert, moe_fp8_topk, workspace_bytes
from supersonic_moe.kernels.reference.inference import local_ids
from supersonic_moe.kernels.reference.quantize import quantize_rows


def call(case: Case, **settings) -> Tensor:
    settings = {"x_scale": case.x_scale, "gate_up_order": case.order, **settings}
    ids, weights = settings.pop("ids", case.ids), settings.pop("weights", case.weights)
    x = settings.pop("x", case.x)
    return moe_fp8_topk(x, case.w13, case.w2, case.w13_scale, case.w2_scale, weights, ids, **settings)


def test_like_the_loop() -> None:
    for dtype in (torch.int32, torch.int64):
        case = make_case(tokens=25, order="gate_up")
        frobenius, worst_row = errors(call(case, ids=case.ids.to(dtype)), moe_loop(case))
        assert frobenius <= 0.03 and worst_row <= 0.06


def test_row_orders_are_the_same_operator() -> None:
    """The same experts with their rows in another order give the same bits."""
    case = make_case(tokens=9, inter=128, order="gate_up")
    case.w13_scale[:, 1] = case.w13_scale[:, 0]  # so that a block of interleaved rows has one scale
    gate, up = case.w13.chunk(2, dim=1)
    want = call(case)
    case.w13, case.order = torch.cat([up, gate], 1), "up_gate"
    assert torch.equal(call(case), want)
    case.w13, case.order = torch.stack([gate, up], 2).flatten(1, 2), "interleaved"
    assert torch.equal(call(case), want)


def test_layouts_of_the_scales_of_x() -> None:
    case = make_case(tokens=2, hidden=256)  # T = H / 128: the shapes are equal and the layouts are not
    want = call(case)
    assert torch.equal(call(case, x_scale=case.x_scale.t().contiguous(), x_scale_layout="block_major"), want)
    assert not torch.equal(call(case, x_scale_layout="block_major"), want)
    padded = torch.empty(2, 64).t()[:2].copy_(case.x_scale)  # columns at a stride, as DeepGEMM wants them
    assert torch.equal(call(case, x_scale=padded), want)


@pytest.mark.parametrize("pow2", [False, True])
def test_bf16_x_is_quantized_inside(pow2: bool) -> None:
    case = make_case("realistic", tokens=15)
    x = torch.randn(15, 256).bfloat16()
    case.x, case.x_scale = quantize_rows(x, pow2)
    got = call(case, x=x, x_scale=None, pow2_scales=pow2)
    assert torch.equal(got, call(case, pow2_scales=pow2))
    assert errors(got, moe_loop(case, requantize=True, pow2=pow2))[0] <= 0.006
    assert not torch.equal(got, call(case, x=x, x_scale=None, pow2_scales=not pow2))


def test_offset_map_and_sentinels_say_the_same() -> None:
    case = make_case(tokens=40, num_experts=24, choices=6)
    case.ids[::3, 1] = -1
    case.ids[1::3, 2] = 24
    want = moe_loop(case, local_ids=local_ids(case.ids, 5, 7, 24))
    got = call(case, local_expert_offset=7, num_experts=24)
    assert errors(got, want)[0] <= 0.03
    placed = torch.full((24,), -1, dtype=torch.int32)
    placed[7:12] = torch.arange(5, dtype=torch.int32)
    assert torch.equal(call(case, expert_map=placed), got)
    assert torch.equal(call(case, local_expert_offset=7), got)


def test_a_map_in_any_order() -> None:
    case = make_case(tokens=20, num_experts=8)
    placed = torch.tensor([-1, 3, -1, 0, 4, -1, 1, 2], dtype=torch.int32)
    want = moe_loop(case, local_ids=placed.long()[case.ids.long()])
    assert errors(call(case, expert_map=placed), want)[0] <= 0.03


def test_duplicates_count_twice() -> None:
    case = make_case("realistic", tokens=6, choices=2)
    case.ids[:, 1] = case.ids[:, 0] = case.ids[:, 0] % 5
    assert errors(call(case), moe_loop(case))[0] <= 0.03


def test_tokens_without_a_row_are_positive_zero() -> None:
    case = make_case(tokens=6)
    case.ids[2] = -1
    case.ids[4] = torch.tensor([5, 6, 7])
    case.x[[2, 4]], case.weights[[2, 4]] = math.nan, math.nan
    got = call(case, out=torch.full((6, 256), math.nan, dtype=torch.bfloat16))
    assert got[[2, 4]].view(torch.int16).eq(0).all() and got[[0, 1, 3, 5]].isfinite().all()
    case.ids[:] = -1
    assert call(case).view(torch.int16).eq(0).all()


def test_zero_weights_and_zero_blocks() -> None:
    case = make_case("realistic", tokens=5)
    case.x[1] = 0
    case.weights[3] = 0
    got = call(case)
    assert got[1].eq(0).all() and got[3].eq(0).all() and got.isfinite().all()


def test_rows_of_experts_are_added_up() -> None:
    """Of ids through an offset, with sentinels and duplicates; the shared expert's rows do not count."""
    case = make_case(tokens=30)
    ids = case.ids + 3
    ids[0], ids[1, 0] = 5, -1
    received = torch.full((case.w13.shape[0],), 100, dtype=torch.int32)
    for times in (1, 2):
        call(case, ids=ids, local_expert_offset=3, received_rows=received, max_tokens_per_chunk=11)
        assert received.tolist() == [100 + times * int((ids == 3 + e).sum()) for e in range(len(received))]


def test_clamp_factor_and_shared_expert() -> None:
    case, shared = make_case(tokens=11, order="gate_up"), make_case(tokens=1, local=1, order="gate_up", seed=3)
    one = SharedExpert(shared.w13[0], shared.w2[0], shared.w13_scale[0], shared.w2_scale[0])
    got = call(case, swiglu_limit=50.0, routed_scaling_factor=2.5, shared_expert=one)
    assert errors(got, moe_loop(case, limit=50.0, factor=2.5, shared=shared))[0] <= 0.03
    case.ids[:] = -1
    alone = call(case, shared_expert=one)
    assert errors(alone, moe_loop(case, shared=shared))[0] <= 0.03
    assert torch.equal(call(case, shared_expert=one, routed_scaling_factor=9.0), alone)


def test_weight_on_the_input() -> None:
    case = make_case("realistic", tokens=12, choices=1)
    got = call(case, apply_router_weight_on_input=True, routed_scaling_factor=1.5)
    assert errors(got, moe_loop(case, weight_on_input=True, factor=1.5))[0] <= 0.03
    two = make_case(tokens=4, choices=2)
    with pytest.raises(ValueError, match=r"one expert a token \(K = 1\); got K = 2"):
        call(two, apply_router_weight_on_input=True)


@pytest.mark.parametrize("chunk", [1, 9, 64])
def test_chunks_and_workspace(chunk: int) -> None:
    case = make_case("realistic", tokens=33)
    workspace = torch.empty(workspace_bytes(min(chunk, 33), 3, 256, 128, 5), dtype=torch.uint8)
    got = call(case, max_tokens_per_chunk=chunk, workspace=workspace)
    torch.testing.assert_close(got, call(case), rtol=0.02, atol=1e-4)


def test_workspace_grows_with_t() -> None:
    sizes = [workspace_bytes(t, 8, 7168, 2048, 32) for t in range(0, 20000, 97)]
    assert sizes == sorted(sizes) and all(isinstance(s, int) and s > 0 for s in sizes)
    assert workspace_bytes(900, 8, 7168, 2048, 32) < 2**29 and workspace_bytes(14107, 8, 7168, 2048, 32) < 2**31
    assert workspace_bytes(2**22, 16, 7168, 192, 512) > 2**39  # Python integers do not wrap


def test_strided_weights_need_no_copy() -> None:
    case = make_case(tokens=8)
    want = call(case)
    wide = torch.zeros(5, 256, 512, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide[:, :, :256] = case.w13
    case.w13 = wide[:, :, :256]
    assert torch.equal(call(case), want)


def test_no_gradient_on_any_device() -> None:
    """Kernels record none; the definition must not do so on a CPU alone."""
    case = make_case(tokens=3)
    out = call(case, weights=case.weights.clone().requires_grad_())
    assert not out.requires_grad


def test_autocast_changes_nothing() -> None:
    """Kernels do not know it; the definition's products must not get its dtype on a CPU."""
    case, x = make_case(tokens=5), torch.randn(5, 256).bfloat16()
    want = call(case), call(case, x=x, x_scale=None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(case), want[0]) and torch.equal(call(case, x=x, x_scale=None), want[1])


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_graph_for_any_number_of_tokens(dynamic: bool | None) -> None:
    graphs = Graphs()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=graphs)
    scratch = torch.empty(workspace_bytes(32, 3, 256, 128, 5), dtype=torch.uint8)
    for tokens in range(20, 32):  # more than any other size is symbolic
        case = make_case(tokens=tokens)
        assert torch.equal(compiled(case, workspace=scratch), call(case))
    assert len(graphs) <= 2


@pytest.mark.parametrize("made", ["nested", "csr", "coo"])
def test_x_without_strides(made: str) -> None:
    case, x = make_case(tokens=4), torch.randn(4, 256).bfloat16()
    odd = {"csr": x.to_sparse_csr, "coo": x.to_sparse, "nested": lambda: torch.nested.nested_tensor([x[:2], x[2:]])}[
        made
    ]()
    with pytest.raises((TypeError, ValueError), match="x must be a dense tensor"):
        call(case, x=odd, x_scale=None)


def test_out_that_must_not_be_written_to() -> None:
    case = make_case(tokens=4)
    with pytest.raises(ValueError, match="out must not want a gradient"):
        call(case, out=torch.empty(4, 256, dtype=torch.bfloat16, requires_grad=True))
    with torch.inference_mode():
        out = torch.empty(4, 256, dtype=torch.bfloat16)
        assert call(case, out=out) is out
    with pytest.raises(ValueError, match="out was made in inference mode"):
        call(case, out=out)


def test_out_over_a_part_of_x_in_chunks() -> None:
    case, memory = make_case(tokens=5), torch.randn(9, 256).bfloat16()
    want = call(case, x=memory[:5].clone(), x_scale=None, max_tokens_per_chunk=2)
    with pytest.raises(ValueError, match="out must be x itself or lie elsewhere"):
        call(case, x=memory[:5], x_scale=None, max_tokens_per_chunk=2, out=memory[2:7])
    bytes_of_codes = torch.empty(5, 512, dtype=torch.uint8)
    codes = bytes_of_codes.view(-1)[: case.x.nbytes].view(case.x.dtype).view(case.x.shape).copy_(case.x)
    with pytest.raises(ValueError, match="out must be x itself or lie elsewhere"):
        call(case, x=codes, max_tokens_per_chunk=2, out=bytes_of_codes.view(torch.bfloat16))
    got = call(case, x=memory[:5], x_scale=None, max_tokens_per_chunk=2, out=memory[:5])
    assert torch.equal(got, want) and got.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("local_expert_offset", 2**40),
        ("num_experts", 2**63),
        ("swiglu_limit", 10**400),
        ("routed_scaling_factor", 10**400),
    ],
)
def test_numbers_that_no_kernel_holds(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*; got "):
        call(make_case(tokens=2), **{name: value})


@pytest.mark.filterwarnings("error:Dynamo detected a call to")
def test_under_the_compiler() -> None:
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    scratch = torch.empty(workspace_bytes(17, 3, 256, 128, 5), dtype=torch.uint8)
    for tokens in (13, 11, 17):  # the second number of tokens makes it a symbol
        case = make_case(tokens=tokens)
        for workspace in (None, scratch):
            assert torch.equal(compiled(case, workspace=workspace), call(case))
    case = make_case(tokens=13)
    torch.library.opcheck(
        torch.ops.supersonic_moe.moe_fp8_topk.default,
        (case.x, case.x_scale, [case.w13, case.w13_scale, case.w2, case.w2_scale], case.weights, case.ids, None, 0,
         None, 1.0, "up_gate", None, False, False, None, torch.empty(13, 256, dtype=torch.bfloat16), None),
        test_utils="test_faketensor",
    )  # fmt: skip
