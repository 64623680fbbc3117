"""The workspace counts as the kernels count, without importing them."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings.driver")

from supersonic_moe.inference import workspace
from supersonic_moe.kernels.sm90 import route_rows, stream_experts


def test_constants_agree() -> None:
    assert workspace.COUNTING_BLOCKS == route_rows.MAX_BLOCKS
    assert workspace.ITEM_ROWS == route_rows.ITEM_ROWS
    for rows, experts in ((0, 3), (1, 3), (8, 1), (700, 32), (4096, 32)):
        assert workspace.padding(rows, experts) == stream_experts.plane_rows(rows, experts)


@pytest.mark.parametrize(
    ("tokens", "choices", "local"), [(0, 1, 1), (1, 8, 32), (901, 8, 32), (14107, 8, 32), (64, 10, 512)]
)
@pytest.mark.parametrize("inter", [64, 192, 2048])
def test_the_counters_fit(tokens: int, choices: int, local: int, inter: int) -> None:
    streamed = workspace.streamed_rows(tokens * choices, inter, local)
    items, planes = route_rows.max_items(local, streamed), stream_experts.plane_rows(streamed, local)
    at = workspace.regions(tokens, choices, 7168, inter, local)
    words = stream_experts.num_counters(items, planes, 7168, inter)
    assert 4 * words <= at.offsets - at.counters < 4 * words + workspace.ALIGNMENT
