"""The FP8 backward of the down-projection with quantized results, against fp64 and against the formats it promises."""

from __future__ import annotations

import oracle
import pytest
import torch
from down_backward_cases import ACTIVATIONS, INTERLEAVED, RAGGED, SIZES, step_of
from grouped_cases import CUDA, GROUPS, case, rows_case
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.activation import Activation, GateUpLayout
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import BothOrders, Quantized, Segments
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.sm90.down_backward_fp8 import down_backward_fp8
from supersonic_moe.kernels.sm90.down_backward_fp8_quantize import down_backward_fp8_quantize
from supersonic_moe.kernels.triton.pad_segments import pad_segments
from supersonic_moe.kernels.triton.quantize import quantize_both_orders, quantize_columns
from supersonic_moe.quantization.block_format import E4M3, padded_capacity

pytestmark = pytest.mark.gpu

LONE_CHUNKS = [(128, 64), (256, 192), (128, 320)]  # the last tile of s A has one chunk of 64 activations


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [*SIZES, *RAGGED, *LONE_CHUNKS])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_sizes(counts: list[int], hidden: int, width: int, gathered: bool, pow2: bool) -> None:
    check(counts, hidden, width, ACTIVATIONS["swiglu"], gathered=gathered, bias=True, pow2=pow2)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [*SIZES, *RAGGED, *LONE_CHUNKS])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_z_in_int8(counts: list[int], hidden: int, width: int, gathered: bool) -> None:
    activation = ACTIVATIONS["swiglu"]
    check(counts, hidden, width, activation, gathered=gathered, bias=gathered, pow2=False, int8=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(("gathered", "width"), [(False, 384), (True, 384), (True, 640)])
def test_activations(gathered: bool, width: int, activation: Activation, bias: bool) -> None:
    check([0, 300, 1, 70], 264, width, activation, gathered=gathered, bias=bias, pow2=False)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("hidden", [128, 512])
@pytest.mark.parametrize("width", [320, 384, 448])
def test_many_tiles_of_one_block(width: int, hidden: int, gathered: bool) -> None:
    """Several tiles a block, some without rows for a warp or a warpgroup, some without a second pair of chunks."""
    check([300, 560, 20] * 30, hidden, width, ACTIVATIONS["swiglu"], gathered=gathered, bias=False, pow2=False)


@pytest.mark.parametrize(("layout", "saved_fp8"), [(GateUpLayout.UP_GATE, True), (INTERLEAVED, False)])
def test_other_cases_are_composed(layout: GateUpLayout, saved_fp8: bool) -> None:
    offsets, (dout,) = case([300, 0, 70], 3, 256)
    step, _ = step_of(offsets, dout, None, 256, layout, ACTIVATIONS["swiglu"], saved_fp8, True)
    segments = segments_of(offsets, dout.shape[0])
    got = flat(*down_backward_fp8_quantize(step, segments, False))
    dh, scaled, ds = down_backward_fp8(step)
    index = segments.row_index
    want = flat(quantize_both_orders(dh, index), quantize_columns(scaled, index, tiled=True), ds)
    rows, used = int(offsets[-1]), int(segments.offsets[-1])
    owned = [(rows,), (rows,), *[(None, used), (None, used // 128)] * 2, (rows,)]  # what is written
    for x, y, ends in zip(got, want, owned, strict=True):
        part = tuple(slice(end) for end in ends)
        assert x.dtype is y.dtype and x.shape == y.shape
        assert torch.equal(bits(x[part]), bits(y[part]))


def bits(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype is E4M3 else x.view(torch.int32)


def flat(dz: BothOrders, scaled: Quantized, ds: torch.Tensor) -> list[torch.Tensor]:
    return [*dz.rows, *dz.columns, *scaled, ds]


def segments_of(offsets: torch.Tensor, allocated: int) -> Segments:
    """Every row reads a token."""
    capacity = padded_capacity(allocated, offsets.shape[0] - 1)
    return pad_segments(offsets, torch.zeros(allocated, dtype=torch.int32, device=CUDA), capacity)


def check(
    counts: list[int], hidden: int, width: int, activation: Activation, *, gathered: bool, bias: bool, pow2: bool,
    int8: bool = False,
) -> None:  # fmt: skip
    offsets, dout, index = rows_case(counts, 3, hidden, gathered)
    rows, allocated = sum(counts), dout.shape[0] if index is None else index.shape[0]
    step, (want_dh, want_as, want_ds, products) = step_of(
        offsets, dout, index, width, INTERLEAVED, activation, True, bias, int8
    )
    zero = step.row_scores[:rows] == 0
    segments = segments_of(offsets, allocated)
    used = int(segments.offsets[-1])
    row_index = segments.row_index[:used].long()
    held = row_index >= 0

    def run() -> list[torch.Tensor]:
        """Codes and scales of what experts own; tiles of positions that none owns are not written."""
        results = down_backward_fp8_quantize(step, segments, pow2)
        q, row_scale, turned, scale, a_turned, a_scale, ds = flat(*results)
        assert q.dtype is turned.dtype is a_turned.dtype is E4M3
        tiles = used // 128
        return [
            q[:rows], row_scale[:rows], turned[:, :used], scale[:, :tiles], a_turned[:, :used], a_scale[:, :tiles],
            ds[:rows],
        ]  # fmt: skip

    q, row_scale, turned, scale, a_turned, a_scale, ds = got = run()
    for codes, tile_scale, exact in ((turned, scale, want_dh), (a_turned, a_scale, want_as)):
        assert (bits(codes)[:, ~held] == 0).all()
        exact_CG = torch.zeros(exact.shape[1], used, device=CUDA, dtype=torch.float64)
        exact_CG[:, held] = exact[row_index[held]].T
        assert (bits(codes)[:, held][:, zero[row_index[held]]] == 0).all()
        if not exact_CG.any():
            continue
        assert oracle.rel_fro(dequantize(codes, tile_scale), exact_CG) < 4e-2
        _, expected = reference.quantize_columns(exact_CG.T.float(), torch.arange(used, device=CUDA), pow2, tiled=True)
        if pow2:
            assert ((tile_scale / expected).log2().abs() <= 1).all() and (tile_scale.frexp().mantissa == 0.5).all()
        else:
            torch.testing.assert_close(tile_scale, expected, rtol=2e-2, atol=0)
        # The largest code of a tile says that all of it was looked at, and nothing else.
        largest = tile_max(codes)
        empty = tile_max(exact_CG) == 0
        assert (largest[empty] == 0).all()
        assert (largest[~empty] >= 224).all() and (pow2 or (largest[~empty] == 448).all())
    # As it lies, dZ has a scale for each row and 128 columns: each row is as good as any, however quiet.
    exact_rows, live = want_dh[:rows], ~zero
    assert (bits(q)[zero] == 0).all()
    if rows and exact_rows[live].any():
        error = (dequantize(q, row_scale) - exact_rows).norm(dim=1) / exact_rows.norm(dim=1).clamp(min=1e-300)
        assert error[live].max() < 0.1
        largest = torch.nn.functional.pad(q.float().abs(), (0, -q.shape[1] % 128)).unflatten(1, (-1, 128)).amax(2)
        assert (largest[live] == 0).logical_or(largest[live] >= 224).all()
    assert (ds[~zero].double() - want_ds[~zero]).norm() <= 3e-3 * products
    for first, second in zip(got[:-1], run()[:-1], strict=True):
        assert torch.equal(bits(first), bits(second))


def tile_max(x_CG: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each 128 x 128 tile."""
    x = torch.nn.functional.pad(x_CG.float().abs(), (0, 0, 0, -x_CG.shape[0] % 128))
    return x.reshape(x.shape[0] // 128, 128, -1, 128).amax((1, 3))
