"""A replay writes the addresses that have changed where they stood when it was recorded, and launches in order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from supersonic_moe.jit import tape
from supersonic_moe.jit.replay import Replay, recording


def test_addresses_inside_a_tensor_move_with_it_and_nothing_else_does() -> None:
    x, workspace, weight = (torch.zeros(64, dtype=torch.uint8) for _ in range(3))
    slots = dict.fromkeys(("x", "head", "tail", "weight", "none"), 0)
    launched: list[dict[str, int]] = []
    with recording([x, workspace, weight]) as recorder:
        for slot, address in (
            ("x", x.data_ptr()), ("head", workspace.data_ptr()), ("tail", workspace.data_ptr() + 63),
            ("weight", weight.data_ptr() + 8), ("none", 0),
        ):  # fmt: skip
            slots[slot] = address
            recorder.place(slots, slot, address)
        for _ in range(2):
            recorder.launched(lambda _: launched.append(dict(slots)))
    assert recorder.possible and tape.state.recorder is None

    replay = Replay(recorder, moving=2)
    first = x.data_ptr(), workspace.data_ptr()
    for x_at, workspace_at in (first, (512, first[1]), (512, 1024), first):
        launched.clear()
        replay.run((x_at, workspace_at))
        expected = {
            "x": x_at, "head": workspace_at, "tail": workspace_at + 63, "weight": weight.data_ptr() + 8, "none": 0,
        }  # fmt: skip
        assert launched == [expected, expected]


def test_an_address_of_nobody_is_not_for_a_replay() -> None:
    with recording([torch.zeros(4)]) as recorder:
        recorder.place([0], 0, 8)
    assert not recorder.possible


def test_an_error_leaves_no_recorder() -> None:
    with pytest.raises(ValueError, match="no"), recording([torch.zeros(4)]):
        raise ValueError("no")
    assert tape.state.recorder is None
