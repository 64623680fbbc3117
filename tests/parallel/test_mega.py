"""``MegaMoE`` on a CPU: against a loop over tokens in fp64, and several ranks against one process, to the bit."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import mega_cases as cases
import pytest
import torch
import torch.distributed as dist
from inference_oracle import moe_loop
from mega_cases import E, H, calc_diff, worst_row
from ranks import end_groups, run_ranks
from virtual_ranks import ON, end_processes

from supersonic_moe.inference import moe_fp8_topk, workspace
from supersonic_moe.kernels.reference.quantize import quantize_rows
from supersonic_moe.parallel import MegaMoE
from supersonic_moe.parallel.copies import bank_of, shares
from supersonic_moe.parallel.mega import LARGEST_BANK

LIMITS = (None, 10.0, 1.0)


# ---- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 7, 333])
def test_like_the_definition(tokens: int, masked: float) -> None:
    for shift, kind in enumerate(("contest", "all_positive")):
        limit = LIMITS[(tokens + round(10 * masked) + shift) % 3]
        case = cases.case_of(tokens, kind, masked)
        got = cases.call(cases.mega(), case, swiglu_limit=limit)
        want = torch.from_numpy(moe_loop(case, requantize=True, limit=limit))
        assert got.shape == (tokens, H) and got.dtype is torch.bfloat16
        assert calc_diff(got, want) <= 0.001 and worst_row(got, want) <= 0.03
        assert got[(case.ids >= E).all(1) | (case.ids < 0).all(1)].view(torch.int16).eq(0).all()  # +0, by bits


@pytest.mark.parametrize("limit", LIMITS)
def test_weights_before_and_after_the_down_projection_are_one_number(limit: float | None) -> None:
    case = cases.case_of(40, "realistic")
    case.weights *= torch.tensor([-3.0, 1e-3, 40.0])
    case.weights[5] = 0
    got = cases.call(cases.mega(), case, swiglu_limit=limit)
    before = torch.from_numpy(moe_loop(case, requantize=True, limit=limit, weight_before_down=True))
    assert calc_diff(got, before) <= 1e-5 and worst_row(got, before) <= 0.006  # a rounding to bf16; some codes at ties


def test_one_rank_is_the_operator_and_copies_nothing() -> None:
    case, layer = cases.case_of(21), cases.mega()
    expected = moe_fp8_topk(
        case.x, case.w13, case.w2, case.w13_scale, case.w2_scale, case.weights, case.ids, x_scale=case.x_scale,
        gate_up_order="gate_up", num_experts=E,
    )  # fmt: skip
    out = torch.full_like(expected, math.nan)
    assert cases.call(layer, case, out=out) is out and torch.equal(out, expected)
    assert torch.equal(cases.call(layer, case, out=out, accumulate=True), expected + expected)
    x = torch.randn(21, H).bfloat16()
    case.x, case.x_scale = quantize_rows(x, True)
    given = cases.call(layer, case, pow2_scales=True)
    assert torch.equal(cases.call(layer, case, x=x, x_scale=None, pow2_scales=True), given)


def test_a_group_of_one_rank_makes_nothing_travel() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = cases.mega(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    case = cases.case_of(6)
    assert (layer.rank, layer.size, layer.first_expert, layer.experts_here) == (0, 1, 0, E)
    assert torch.equal(cases.call(copy.deepcopy(layer), case), cases.call(cases.mega(), case))
    layer.check()
    layer.close()


def test_received_rows_are_added_up() -> None:
    case, received = cases.case_of(30, masked=0.5), torch.full((E,), 100, dtype=torch.int32)
    case.ids[0] = torch.tensor([3, 3, E])
    for times in (1, 2):
        cases.call(cases.mega(), case, received_rows=received)
        expected = [100 + times * int((case.ids == e).sum()) for e in range(E)]
        assert received.tolist() == expected
    assert sum(expected) > 100 * E


def test_torch_compile_traces_a_call_of_one_rank() -> None:
    layer = cases.mega()
    compiled = torch.compile(lambda case: cases.call(layer, case), fullgraph=True, backend="aot_eager")
    for tokens in (5, 9, 4):  # the second number of tokens makes it a symbol
        case = cases.case_of(tokens)
        assert torch.equal(compiled(case), cases.call(layer, case))


CONSTRUCTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": 192}, ValueError, "hidden must be a multiple of 128; got 192"),
    ({"intermediate": 96}, ValueError, "intermediate must be a multiple of 64; got 96"),
    ({"top_k": 17, "num_experts": 32}, ValueError, "top_k must be at most 16, choices of a token"),
    ({"top_k": 9}, ValueError, "must not exceed the number of experts; got K = 9 with E = 8"),
    ({"max_tokens_per_rank": 0}, ValueError, "max_tokens_per_rank must be at least 1; got 0"),
    ({"num_experts": 8.0}, TypeError, "num_experts must be a positive integer"),
    ({"group": "world"}, TypeError, "needs a process group of torch.distributed or a DeviceMesh; got str"),
    ({"transport": "pigeon"}, ValueError, "transport must be one of 'gather', 'all_to_all', 'push'; got"),
    ({"direct": 1}, TypeError, "direct must be True or False"),
    ({"direct": True, "transport": "all_to_all"}, ValueError, "direct=True needs a place .*; got 'all_to_all'"),
    ({"timeout_s": 0}, ValueError, "timeout_s must be finite and at least 0.01; got 0"),
]
CALLED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(4, H)}, TypeError, "x must be bfloat16 or float8_e4m3fn"),
    ({"x": [1]}, TypeError, r"x must be a torch.Tensor of shape \(T, H\); got list"),
    ({"x_scale": None}, ValueError, "float8_e4m3fn x needs x_scale"),
    ({"swiglu_limit": -1.0}, ValueError, "limit must be a positive finite number"),
    ({"accumulate": True}, ValueError, "accumulate adds the result to out; got out=None"),
    ({"out": torch.zeros(4, H)}, ValueError, "out must be a contiguous bfloat16 tensor"),
    ({"out": torch.zeros(4, H), "accumulate": True}, ValueError, "out must be a contiguous bfloat16 tensor"),
    ({"received_rows": torch.zeros(E)}, TypeError, "received_rows must be int32"),
    ({"received_rows": torch.zeros(3).int()}, ValueError, "received_rows must have length 8"),
]


@pytest.mark.parametrize(("change", "error", "message"), CONSTRUCTED, ids=[m for _, _, m in CONSTRUCTED])
def test_sizes_that_do_not_exist(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cases.mega(**change)


@pytest.mark.parametrize(("change", "error", "message"), CALLED, ids=[m for _, _, m in CALLED])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cases.call(cases.mega(), cases.case_of(4), **change)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 7}, r"w13 must have shape \(7, 256, 256\) .*; got \(8, 256, 256\)"),
        ({"intermediate": 64}, r"w13 must have shape \(8, 128, 256\)"),
        ({"top_k": 2}, "topk_ids must have choices 2 .*; got 3"),
        ({"max_tokens_per_rank": 3}, "more than max_tokens_per_rank = 3 tokens in a call; got 4"),
    ],
)
def test_a_call_of_other_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases.call(cases.mega(**sizes), cases.case_of(4))


def test_explain_says_what_a_call_needs() -> None:
    layer = MegaMoE(None, num_experts=48, hidden=7168, intermediate=3072, top_k=6, max_tokens_per_rank=8192)
    experts, way, memory = layer.explain().splitlines()
    assert experts == "48 experts over 1 ranks, 48 on each; this is rank 0"
    assert "inference.moe_fp8_topk" in way and "nothing travels" in way
    gib = re.fullmatch(r"memory: at most (0\.\d+) GiB for a call of 8192 tokens on every rank", memory)
    assert gib and float(gib[1]) <= 1.2


# ---- several ranks ---------------------------------------------------------------------------------------------------


def spread(ranks: int) -> list[cases.Call]:
    """Token counts that change from call to call, masks and clamps."""
    counts = [(0, 1), (7, 333), (1, 0), (333, 7), (0, 0), (1, 1), (40, 7), (7, 7)]
    masks = (0.0, 0.3, 0.7, 1.0)
    return [((tokens * 4)[:ranks], masks[i % 4], LIMITS[i % 3]) for i, tokens in enumerate(counts)]


@pytest.mark.parametrize("transport", ["gather", "all_to_all"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_have_the_bits_of_one_process(ranks: int, transport: str) -> None:
    assert run_ranks(ranks, cases.same_as_one_process, spread(ranks), transport) == [[]] * ranks


@pytest.mark.parametrize(("ranks", "transport"), [(2, "gather"), (8, "gather"), (4, "push")])
def test_copies_between_ranks_carry_the_same(ranks: int, transport: str) -> None:
    (found,) = run_ranks(1, cases.over_copies, ranks, spread(ranks), transport)
    assert found == [[]] * ranks


@pytest.mark.parametrize(
    ("ranks", "rows", "transport"), [(2, 150, "gather"), (4, 1, "gather"), (2, 150, "push"), (4, 1, "push")]
)
def test_more_rows_than_a_bank_holds_travel_one_share_after_the_other(ranks: int, rows: int, transport: str) -> None:
    """Of all places of a rank ``rows`` outputs fit, and twice as many of the others, whose rows are shorter."""
    most, calls = (400, spread(ranks)) if rows > 1 else (40, [((0, 1, 40, 17), 0.3, None), ((7, 40, 1, 0), 0.0, 1.0)])
    (found, said) = run_ranks(1, cases.over_small_copies, ranks, calls, transport, most, ranks * rows * 2 * H)[0]
    assert found == [[]] * ranks
    expected = {150: "the widest rows go in 3 exchanges, 134 of a rank at a time", 1: "in 40 exchanges, 1 of a rank"}
    assert all(expected[rows] in each for each in said)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("hidden", [4096, 6144, 7168])
def test_ranks_reach_no_more_than_1_2_gib_of_each_other(ranks: int, hidden: int) -> None:
    """Of 8192 tokens a rank."""
    sizes = {"ranks": ranks, "places": 8192, "row_bytes": 2 * hidden}
    bank = bank_of(**sizes, largest=LARGEST_BANK)
    assert 2 * bank <= 1.2 * 2**30
    shares_of = shares(8192, 2 * hidden, ranks, bank)
    assert [place for share in shares_of for place in range(8192)[share]] == [*range(8192)]
    assert (ranks * max(share.stop - share.start for share in shares_of)) * 2 * hidden <= bank


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_few_rows_are_read_and_written_where_they_lie(ranks: int, gpu: bool) -> None:
    """With random delays of each rank, and the same bits."""
    most = cases.few_tokens(ranks)
    counts = [(0, 1), (most, most // 2), (1, 0), (most // 2, most), (0, 0), (1, 1), (most, most)]
    calls = [((tokens * 4)[:ranks], (0.0, 0.3, 0.7, 1.0)[i % 4], LIMITS[i % 3]) for i, tokens in enumerate(counts)]
    (found,) = run_ranks(1, cases.without_copies, ranks, gpu, calls, timeout_s=300)
    assert found == [[]] * ranks


def test_explain_says_whether_anything_is_copied() -> None:
    """And how much memory ranks reach: at 8192 tokens of the largest published shape, 2 ranks."""
    (said,) = run_ranks(1, cases.explanations, 2)
    for copied, unasked, few in said:
        assert "way: composed of dispatch in e4m3" in copied and "way: composed" in unasked and "way: direct" in few
        assert "kernels on Hopper: tiles, in every call; rows are streamed up to max_tokens_per_rank = 139" in copied
        assert "kernels on Hopper: rows are streamed" in unasked and "kernels on" not in few
        assert [workspace.streams(2 * 6 * most, 6 * most, 7168, 3072, 48) for most in (139, 140)] == [True, False]
        gib = re.search(
            r"GiB for a call of 8192 tokens on every rank, beside (0\.\d+) GiB that all ranks reach", copied
        )
        assert gib and float(gib[1]) <= 1.2
        assert re.search(r"beside 0\.0\d+ GiB that all ranks reach", few)


@pytest.mark.parametrize("gpu", ON)
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_launches_of_few_rows_have_the_same_bits(ranks: int, gpu: bool) -> None:
    (found,) = run_ranks(1, cases.random_launches, ranks, gpu, 1000 if gpu else 25, timeout_s=300)
    assert found == [[]] * ranks


@pytest.mark.parametrize("gpu", ON)
def test_a_late_rank_is_named_by_who_waits_for_its_rows(gpu: bool) -> None:
    late = [(2, "forward dispatch"), (2, "forward combine"), (4, "forward combine")]
    calls = [(ranks, gpu, phase, 3.0) for ranks, phase in late]
    for (_, phase), (ended,) in zip(late, end_processes(gpu, cases.with_a_late_rank, calls), strict=True):
        assert ended.result is not None, ended
        errors: list[str] = ended.result  # none of the late rank, if the others have written what it reads
        wanted = rf"waited 3 s in the {phase} of call 3 for rank 1 \(exchange \d+ expected, \d+ seen\)"
        assert any(re.search(wanted, error) for error in errors), errors  # on a GPU it ends the context of both


@pytest.mark.parametrize("pow2", [False, True])
def test_bf16_tokens_are_quantized_at_home(pow2: bool) -> None:
    for equal, said, closed in run_ranks(2, cases.bf16_over_ranks, pow2):
        assert equal and closed.endswith("is closed; make a new MegaMoE, of a new group if a rank has failed.")
        # 400 tokens to one rank: 256 codes, 2 scales, 3 ids and weights there; 256 bf16 numbers back
        assert "transport: gather" in said and "limit of a wait: 60 s" in said
        assert "a rank sends, in MB: 0.115 there, 0.205 back" in said


@pytest.mark.parametrize("transport", ["gather", "all_to_all"])
def test_mistakes_of_all_ranks_and_of_one(transport: str) -> None:
    for common, (unequal, widths, ways, many), error in run_ranks(2, cases.mistakes, transport):
        limit, scale, pow2, out, none = common
        assert "swiglu_limit must be a positive finite number" in limit and "needs x_scale; got None" in scale
        assert "pow2_scales must be True or False" in pow2 and "out must have the shape of x" in out
        assert none == "no error"
        assert re.match(
            r"ValueError: MegaMoE needs .*max_tokens_per_rank is (4 on rank 0 and 5 on rank 1|5 on rank 1 and 4)",
            unequal,
        )
        assert re.match(r"ValueError: .*intermediate is \d+ on rank [01] and \d+ on rank [01]", widths)
        assert re.match(r"ValueError: .*direct is (False on rank 0 and True on rank 1|True on rank 1 and False)", ways)
        assert "direct=True needs few rows: max_tokens_per_rank must not exceed 85 with 2 ranks, 8 experts" in many
        assert "must not have more than max_tokens_per_rank = 4 tokens in a call" in error and "5" in error
        assert "Make the MegaMoE with a larger max_tokens_per_rank" in error


def test_who_waits_hears_what_one_rank_alone_has_refused() -> None:
    said = {"accumulate": "got out=None", "deep_gemm": "y must be a contiguous"}
    groups = end_groups(2, cases.refused_by_one, [(how,) for how in said])
    for error, (first, second) in zip(said.values(), groups, strict=True):
        assert first.exit_code == second.exit_code == 0 and error in second.result, (first, second)
        assert f"Rank 1 has refused this call: {second.result}" in first.result, first
