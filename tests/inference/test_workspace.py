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


@pytest.mark.parametrize(("tokens", "inter"), [(128, 2048), (129, 2048), (14107, 2048), (14107, 192)])
def test_tile_kernels_use_the_memory_of_the_streaming_kernel(tokens: int, inter: int) -> None:
    rows, hidden, local = 8 * tokens, 7168, 8
    at = workspace.regions(tokens, 8, hidden, inter, local)
    many = rows if rows > 128 * local and inter % 128 == 0 else 0
    sizes = (2 * many * hidden, many * hidden // 32, many * inter, many * inter // 32)
    assert at.x_rows == at.tile_y >= at.x_scale + (tokens * hidden // 32 if rows > 128 * local else 0)
    starts = (at.tile_y, at.tile_x_scale, at.tile_c, at.tile_c_scale, at.end)
    for start, size, following in zip(starts, sizes, starts[1:], strict=False):
        assert start % workspace.ALIGNMENT == 0 and start + size <= following
