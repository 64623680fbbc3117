"""What ``MegaMoE`` launches: of one rank the kernels of the plain call on the caller's tensors, and nothing else; of
several with few rows two more, and no copy.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mega_cases as cases
import pytest
import torch
from dispatched_ops import Ops
from mega_cases import E, H, K

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")

from recorded_launches import recorded_launches  # noqa: F401

from supersonic_moe.config.activation import as_layout
from supersonic_moe.inference import moe_fp8_topk, ops, sm90
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.kernels.sm90 import rank_tokens, stream_experts
from supersonic_moe.kernels.sm90.exchange_flags import ExchangeFlags
from supersonic_moe.kernels.sm90.rank_tokens import Layout, RankTokens
from supersonic_moe.parallel.few_rows import FewRows, Given


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch: pytest.MonkeyPatch, launches: list[Any]) -> None:
    monkeypatch.setattr(ops, "on_sm90", lambda x: True)
    monkeypatch.setattr(sm90, "ALIGNMENT", 16)  # a CPU's buffers
    monkeypatch.setattr(sm90, "streams", lambda *sizes: True)
    monkeypatch.setattr(stream_experts, "multiprocessors", lambda device: 131)
    monkeypatch.setattr(rank_tokens, "multiprocessors", lambda device: 131)


@pytest.mark.parametrize("tokens", [5, 200])
def test_one_rank_launches_what_the_operator_does(tokens: int, launches: list[Any]) -> None:
    case, layer = cases.case_of(tokens), cases.mega()
    out = torch.empty(tokens, H, dtype=torch.bfloat16)
    received = torch.zeros(E, dtype=torch.int32)

    def operator() -> None:
        moe_fp8_topk(
            case.x, case.w13, case.w2, case.w13_scale, case.w2_scale, case.weights, case.ids, x_scale=case.x_scale,
            num_experts=E, gate_up_order="gate_up", out=out,
        )  # fmt: skip

    def mega(**options: Any) -> None:
        cases.call(layer, case, out=out, **options)

    ran = []
    for call in (operator, mega, lambda: mega(received_rows=received)):
        launches.clear()
        with Ops() as found:
            call()
        ran.append((found.names, [kernel.spec.name for kernel, *_ in launches], launches[-1][2], launches[-2][2]))
    (plain, names, streamed, _), *others = ran
    assert names == [*(["place_small"] if tokens <= 128 else ["place_count", "place_rows"]), "stream_experts"]
    assert streamed["x"] == case.x.data_ptr() and streamed["out"] == out.data_ptr()
    assert plain == ["supersonic_moe::moe_fp8_topk"]
    for number, (own, own_names, own_streamed, placed) in enumerate(others):
        assert (own, own_names) == (plain, names)
        assert all(own_streamed[name] == streamed[name] for name in ("x", "x_scale", "out", "tokens"))
        assert placed["received"] == (received.data_ptr() if number else 0)


@pytest.mark.parametrize(("places", "router"), [(60, ["place_small"]), (85, ["place_count", "place_rows"])])
def test_two_ranks_with_few_rows_launch_two_kernels_more(
    places: int, router: list[str], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **kwargs: zeros(*size, **kwargs))
    regions = Layout.of(2, places, H, K)
    blocks = [torch.zeros(1024 + regions.end, dtype=torch.uint8) for _ in range(2)]
    flags = ExchangeFlags(blocks, 1, 30.0)
    few = FewRows(SimpleNamespace(memory=SimpleNamespace(blocks=blocks, flags=flags)), 1, 2, E, places, K)
    case, here = cases.case_of(7), slice(E // 2, E)
    experts = Fp8Experts(*(t[here] for t in (case.w13, case.w13_scale, case.w2, case.w2_scale)))
    received, out = torch.zeros(E // 2, dtype=torch.int32), torch.empty(7, H, dtype=torch.bfloat16)
    given = Given(case.x, case.x_scale, case.ids, case.weights, experts, as_layout(case.order), 10.0, False, received)
    at = Layout(*(1024 + start for start in regions))
    few._launch(RankTokens(flags, at, places, 5), given, out, True)
    names = [kernel.spec.name for kernel, *_ in launches]
    assert names == ["post_tokens", *router, "stream_experts_ranks", "sum_parts"]
    post, place, *_, stream, total = (arguments for _, _, arguments in launches)
    assert post["x"] == case.x.data_ptr() and total["out"] == out.data_ptr() and total["accumulate"] == 1
    assert place["ids"] == blocks[1].data_ptr() + at.ids and place["topk_weights"] == blocks[1].data_ptr() + at.weights
    assert (place["tokens"], place["offset"], place["num_experts"], place["routed"]) == (2 * places, E // 2, E, E // 2)
    assert launches[len(router)][2]["received"] == received.data_ptr()
    assert (stream["codes_at"], stream["scales_at"], stream["out_at"]) == (at.codes, at.scales, at.parts)
    assert (stream["places"], stream["left"], stream["limit"], stream["limit_ns"]) == (places, 1, 10.0, 5 * 10**9)
    assert [arguments["phase"] for arguments in (post, stream, total)] == [0, 0, 1]
