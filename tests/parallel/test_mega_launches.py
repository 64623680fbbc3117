"""What ``MegaMoE`` of one rank launches: the kernels of the plain call on the caller's tensors, and
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mega_cases as cases
import pytest
import torch
from mega_cases import E, H
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")

from recorded_launches import recorded_launches  # noqa: F401

from supersonic_moe.inference import moe_fp8_topk, ops, sm90
from supersonic_moe.kernels.sm90 import route_rows, stream_experts


class Ops(TorchDispatchMode):
    """Ops that a call runs, views left out: each allocates or launches something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch: pytest.MonkeyPatch, launches: list[Any]) -> Iterator[None]:
    monkeypatch.setattr(ops, "on_sm90", lambda x: True)
    monkeypatch.setattr(sm90, "ALIGNMENT", 16)  # a CPU's buffers
    monkeypatch.setattr(stream_experts, "multiprocessors", lambda device: 131)
    for module in (route_rows, stream_experts):
        module._kernel.cache_clear()
    yield
    for module in (route_rows, stream_experts):
        module._kernel.cache_clear()


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
