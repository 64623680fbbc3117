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


@pytest.mark.parametrize(("tokens", "inter"), [(64, 2048), (65, 2048), (14107, 2048), (14107, 192)])
def test_tile_kernels_use_the_memory_of_the_streaming_kernel(tokens: int, inter: int) -> None:
    rows, hidden, local = 8 * tokens, 7168, 8
    at = workspace.regions(tokens, 8, hidden, inter, local)
    many = 0 if workspace.streams(rows, rows, hidden, inter, local) else rows
    sizes = (2 * many * hidden, many * hidden // 32, many * inter, many * inter // 32)
    assert at.x_rows == at.tile_y
    starts = (at.tile_y, at.tile_x_scale, at.tile_c, at.tile_c_scale, at.end)
    for start, size, following in zip(starts, sizes, starts[1:], strict=False):
        assert start % workspace.ALIGNMENT == 0 and start + size <= following


@pytest.mark.parametrize("inter", [64, 256, 2048])
def test_the_workspace_never_shrinks_and_holds_either_way(inter: int) -> None:
    """Which way a call takes also hangs on how many experts there are in all; its workspace does not."""
    sizes = [workspace.workspace_bytes(tokens, 8, 1024, inter, 4) for tokens in range(160)]
    assert sizes == sorted(sizes)
    for tokens in range(1, 160):
        rows, at = 8 * tokens, workspace.regions(tokens, 8, 1024, inter, 4)
        for experts in (4, 16, 256):
            if not workspace.streams(rows, rows * 4 / experts, 1024, inter, 4):
                assert at.tile_c_scale - at.tile_y >= rows * (2 * 1024 + inter)
            else:
                assert at.tile_y + rows * 4 * (1024 + inter) <= at.end


def test_what_is_streamed() -> None:
    def most(hidden: int, local: int, share: float = 1.0, inter: int = 2048) -> int:
        """Rows an expert."""
        return max(n for n in range(600) if workspace.streams(n * local, share * n * local, hidden, inter, local))

    assert [most(7168, local) for local in (8, 32, 256)] == [64, 24, 6]
    assert [most(2048, local) for local in (8, 128, 512)] == [64, 17, 13]
    assert (
        most(7168, 32, 0.5) == 48 and most(7168, 32, 0.05) == most(7168, 32, 0.001, 256) == 256
    )  # bounds of rows that go elsewhere
    assert most(7168, 32, inter=192) == 599  # which tile kernels cannot take


def test_an_integer_of_numpy_is_told_how_to_become_one() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"num_tokens must be .*int64.*Convert it with int"):
        workspace.workspace_bytes(numpy.int64(4), 2, 256, 128, 4)
