"""A call that has been made before launches what it would launch if it had not: kernels, grids, numbers, addresses. No
GPU: launches are written down, for tensors of a CPU that pose as those of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded_launches import forget_kernels
from torch import Tensor

pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("triton")

from inference_oracle import make_case
from pretended_gpu import Launch, Machine, pretend_hopper

from supersonic_moe.inference import SharedExpert, moe_fp8_ds_routed, moe_fp8_topk, replays, workspace_bytes
from supersonic_moe.kernels.sm90 import combine_rows, stream_experts

HIDDEN, INTER, LOCAL, CHOICES = 256, 512, 2, 2
FEW, MANY = 40, 300  # tokens: rows are streamed, or go through the tile kernels


@pytest.fixture(name="machine")
def a_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    pretend_hopper(monkeypatch, machine)
    for module in (combine_rows, stream_experts):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(replays, "current_device", lambda: 0)
    monkeypatch.setattr(replays, "_of_thread", replays._OfThread())
    monkeypatch.setattr(Tensor, "is_cuda", True)
    forget_kernels()
    yield machine
    forget_kernels()


class Entry:
    """An entry point, with weights that stay and all else elsewhere in each call, some elements behind 256 bytes."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        sizes = {"hidden": HIDDEN, "inter": INTER, "local": LOCAL, "choices": CHOICES, "num_experts": 4}
        self.case = make_case(tokens=tokens, **sizes)
        self.alive: list[Tensor] = []
        self.shared = None
        if name == "shared":
            c = self.case
            self.shared = SharedExpert(*(t[0].clone() for t in (c.w13, c.w2, c.w13_scale, c.w2_scale)))

    def elsewhere(self, t: Tensor, behind: int = 0) -> Tensor:
        memory = torch.empty(t.nbytes + 4096, dtype=torch.uint8)
        self.alive.append(memory)
        first = -memory.data_ptr() % 256 + behind * t.element_size()
        return memory[first : first + t.nbytes].view(t.dtype).view(t.shape).copy_(t)

    def call(self, behind: int = 0, offset: int | Tensor = 0) -> Callable[[], Tensor]:
        """``behind``: of all but x, the output and the workspace."""
        c, tokens, choices = self.case, self.tokens, CHOICES + (self.shared is not None)
        needed = workspace_bytes(tokens, choices, HIDDEN, INTER, LOCAL + (self.shared is not None))
        given: dict[str, Any] = {
            "gate_up_order": c.order,
            "out": self.elsewhere(torch.empty(tokens, HIDDEN, dtype=torch.bfloat16)),
            "workspace": self.elsewhere(torch.empty(needed, dtype=torch.uint8)),
        }
        if self.name == "ds_routed":
            inputs = [torch.randn(tokens, 4), torch.randn(4).bfloat16(), c.x, c.x_scale.t().contiguous()]
            logits, bias, x, x_scale = (self.elsewhere(t, 0 if t is c.x else behind) for t in inputs)
            weights = c.w13, c.w13_scale, c.w2, c.w2_scale
            rule = {"n_group": 1, "topk_group": 1, "top_k": CHOICES}
            return lambda: moe_fp8_ds_routed(logits, bias, x, x_scale, *weights, offset, 1.0, **rule, **given)
        x = self.elsewhere(torch.randn(tokens, HIDDEN).bfloat16())
        weighted = self.name == "weight_on_input"
        ids = c.ids[:, :1].contiguous() if weighted else c.ids
        weights_TK, ids, places = (
            self.elsewhere(t, behind) for t in (torch.rand(ids.shape), ids, torch.arange(4).int() % LOCAL)
        )
        given |= {"shared_expert": self.shared, "expert_map": places, "apply_router_weight_on_input": weighted}
        return lambda: moe_fp8_topk(x, c.w13, c.w2, c.w13_scale, c.w2_scale, weights_TK, ids, **given)


def launched(machine: Machine, call: Callable[[], Tensor]) -> list[Launch]:
    machine.launches.clear()
    call()
    return list(machine.launches)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("name", ["ds_routed", "topk", "weight_on_input"])
def test_a_call_made_before(name: str, tokens: int, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(name, tokens)
    for _ in range(2):
        entry.call()()
    assert len(replays._of_thread.calls) == 1
    for behind in (0, 0, 1, 0):
        call = entry.call(behind)
        with monkeypatch.context() as context:
            if not (behind and tokens == MANY):  # a kernel that Triton compiled for aligned addresses
                context.setattr(replays.Request, "compute", None)
            again = launched(machine, call)
        with monkeypatch.context() as context:
            context.setattr(replays, "_of_thread", replays._OfThread())
            assert again == launched(machine, call)
        kernels = [launch[0] for launch in again]
        assert ("combine_rows" in kernels) == (tokens == MANY), kernels
    assert len(replays._of_thread.calls) == 1


def test_what_is_not_kept(machine: Machine) -> None:
    """Launches are not all that a shared expert needs on the tile kernels; and a call of no tokens launches nothing."""
    for entry in (Entry("shared", MANY), Entry("topk", 0)):
        for _ in range(3):
            entry.call()()
    assert not replays._of_thread.calls


def test_a_number_in_a_tensor_is_read_in_each_call(machine: Machine) -> None:
    entry, offset = Entry("ds_routed", FEW), torch.tensor(0)
    numbers = []
    for value in (0, 0, 0, 1, 0):
        offset.fill_(value)
        route = launched(machine, entry.call(offset=offset))[0]
        numbers.append([part for part in route if isinstance(part, int)])
    assert numbers[0] == numbers[2] == numbers[4] != numbers[3]
    assert not replays._of_thread.calls
