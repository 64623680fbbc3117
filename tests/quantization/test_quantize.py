"""FP8 quantizers: the reference against ``quantization/block_format.py``, Triton against the reference, byte for byte.

Rows that must not matter hold NaN; so do fresh outputs.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fp8_products import exact_grouped_mm, exact_grouped_mm_wgrad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.kernels.reference import quantize as reference
from supersonic_moe.kernels.triton import pad_segments, quantize_saved
from supersonic_moe.kernels.triton import quantize as triton
from supersonic_moe.kernels.triton.dequantize import dequantize_rows
from supersonic_moe.quantization.block_format import BLOCK, E4M3, SMALLEST_AMAX, blocks, padded_capacity, saved_steps

E4M3_MAX = 448.0
EXAMPLES = settings(max_examples=15)
SIDES = st.sampled_from([1, 8, 72, 127, 128, 129, 300])
WEIGHT_SIDES = st.sampled_from([1, 72, 128, 129, 200])  # one block or two, whole and not: the interpreter is slow
POW2 = pytest.mark.parametrize("pow2", [False, True], ids=["fp32 scales", "pow2 scales"])


def sample(*shape: int, seed: int, magnitude: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """bf16 values with zero rows, rows of very different size, outliers and exact powers of two."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    kind = torch.randint(6, (*shape[:-1], 1), generator=g)
    x = torch.where(kind == 0, 0, x)
    x = torch.where(kind == 1, x * 2.0 ** torch.randint(-30, 30, (*shape[:-1], 1), generator=g), x)
    x = torch.where(kind == 2, x.sign() * 2.0 ** torch.randint(-9, 9, shape, generator=g), x)
    x = torch.where(torch.rand(shape, generator=g) < 0.01, 1000 * x, x)
    return (x * 2.0**magnitude).bfloat16().to(device)


def plan_index(counts: list[int], num_tokens: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(expert_offsets, gather_index) with some rows that read no token, and five dead rows."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    gather = torch.randint(-1, num_tokens, (sum(counts) + 5,), generator=g, dtype=torch.int32)
    gather[sum(counts) :] = -1
    return offsets.to(device), gather.to(device)


def assert_same_bytes(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Equal bits, but for the sign and payload of NaN."""
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        g, w = g.cpu(), w.cpu()
        if g.dtype == E4M3:
            g, w = (torch.where(t.float().isnan(), 0x7F, t.contiguous().view(torch.uint8)) for t in (g, w))
        else:
            g, w = (torch.where(t.isnan(), -1, t) for t in (g, w))
        assert torch.equal(g, w), f"{(g != w).sum()} of {g.numel()} differ"


# ---- the reference says what the format says -------------------------------------------------------------------------


@POW2
@EXAMPLES
@given(r=SIDES, c=SIDES, seed=st.integers(0, 999), magnitude=st.sampled_from([-130, -90, 0, 70]))
def test_round_trip_error(pow2: bool, r: int, c: int, seed: int, magnitude: int) -> None:
    x = sample(r, c, seed=seed, magnitude=magnitude)
    q_blocks, _, block_scales = reference.quantize_blocks(x[None], pow2)
    for q, scale in (reference.quantize_rows(x, pow2), (q_blocks[0], block_scales[0])):
        s = reference.dequantize(torch.ones_like(q), scale)
        exponent = torch.floor(torch.log2((x.double() / s).abs().clamp(min=2.0**-6)))
        half_step = s * 2.0 ** (exponent.clamp(min=-6) - 4)
        error = (x.double() - reference.dequantize(q, scale)).abs()
        assert (error <= half_step * (1 + 2.0**-18)).all()
        assert scale.isfinite().all() and (scale >= SMALLEST_AMAX / 512).all()
        if pow2:
            assert torch.equal(scale, 2.0 ** torch.log2(scale).round())


@POW2
def test_scale_of_every_mantissa(pow2: bool) -> None:
    """Whatever the largest element, it gets the largest code (224 or more with pow2), and never saturates."""
    amax = torch.arange(0x3F800000, 0x40800000, 17, dtype=torch.int32).view(torch.float32)  # 1 .. 4
    edges = torch.tensor([1.75, 3.5])  # of the powers of two
    amax = torch.cat([amax, edges, edges.nextafter(torch.tensor(math.inf))])
    q, scale = reference.quantize_rows(amax[:, None], pow2)
    if pow2:
        exponent = torch.where(amax <= 1.75, -8, torch.where(amax <= 3.5, -7, -6))
        assert torch.equal(scale[:, 0], 2.0**exponent)
        assert ((q.float() > E4M3_MAX / 2 - 1) & (q.float() <= E4M3_MAX)).all()
    else:
        assert (q.float() == E4M3_MAX).all()
        torch.testing.assert_close(scale[:, 0].double() * E4M3_MAX, amax.double(), rtol=2.0**-22, atol=0)


@POW2
def test_nothing_non_finite_becomes_finite(pow2: bool) -> None:
    x = torch.randn(5, 300)
    x[1, 7], x[2, 200], x[3, 299], x[4] = math.inf, -math.inf, math.nan, math.nan
    q, scale = reference.quantize_rows(x, pow2)
    back = reference.dequantize(q, scale)
    assert back[0].isfinite().all()
    assert not back[1, :128].isfinite().any() and back[1, 128:].isfinite().all()
    assert not back[2, 128:256].isfinite().any() and back[2, :128].isfinite().all()
    assert back[3].isnan().nonzero().tolist() == [[299]]
    assert back[4].isnan().all()


def test_weight_blocks_share_scales_with_their_transpose() -> None:
    w = sample(3, 200, 300, seed=0)
    q, transposed, scale = reference.quantize_blocks(w)
    assert scale.shape == (3, 2, 3)
    assert torch.equal(reference.dequantize(transposed, scale.mT), reference.dequantize(q, scale).mT)
    assert_same_bytes(reference.quantize_blocks(w.mT)[:2], (transposed, q))
    scale_of_block = w[1, 128:, 128:256].abs().max().float() / E4M3_MAX
    torch.testing.assert_close(scale[1, 1, 1], scale_of_block)


def test_products_are_those_of_the_dequantized_operands() -> None:
    a, b = sample(7, 200, seed=1), sample(2, 130, 200, seed=2)
    (qa, sa), (qb, _, sb) = reference.quantize_rows(a), reference.quantize_blocks(b)
    got = exact_grouped_mm(Quantized(qa, sa), Quantized(qb, sb), torch.tensor([0, 3, 7]))
    for p, e, n in ((0, 0, 0), (2, 0, 129), (3, 1, 5), (6, 1, 128)):
        products = qa[p].double() * qb[e, n].double()
        want = sum(products[k] * sa[p, k // 128].double() * sb[e, n // 128, k // 128].double() for k in range(200))
        torch.testing.assert_close(got[p, n], want)

    index = torch.tensor([0, 1, 2, *[-1] * 125, 3, 4, 5, 6, *[-1] * 124])
    x, y = reference.quantize_columns(a, index), reference.quantize_columns(a, index, tiled=True)
    (qx, sx), (qy, sy) = x, y
    got = exact_grouped_mm_wgrad(x, y, torch.tensor([0, 128, 256]))
    for e, m, n in ((0, 0, 0), (0, 199, 127), (1, 130, 131)):
        products = qx[m].double() * qy[n].double()
        want = products[128 * e : 128 * (e + 1)].sum() * sx[m, e].double() * sy[n // 128, e].double()
        torch.testing.assert_close(got[e, m, n], want)


# ---- Triton gives the same bytes -------------------------------------------------------------------------------------


def test_every_bf16_value_converts(device: torch.device) -> None:
    """With amax 448 the scale is 1, so q is the conversion itself: all bf16 values, and fp32 around every tie."""
    bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = torch.stack([codes[:-1], codes[1:]]).mean(0)
    near = torch.cat(
        [(ties.view(torch.int32) + d).clamp(min=0).to(torch.int32).view(torch.float32) for d in (-1, 0, 1)]
    )
    values = torch.cat([bf16[~(bf16.abs() > E4M3_MAX)], near, -near])
    x = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat([x, torch.full_like(x[:, :1], E4M3_MAX)], dim=1)
    q, scale = triton.quantize_rows(x.to(device))
    assert (scale == 1).all()
    assert_same_bytes((q,), (x.to(E4M3),))


def hostile(x: Tensor) -> Tensor:
    """A few non-finite elements, one row of NaN."""
    x = x.clone()
    flat = x.view(-1)
    flat[:: max(1, flat.numel() // 3)] = torch.tensor(math.inf)
    flat[flat.numel() // 2] = math.nan
    x[..., -1, :] = math.nan
    return x


@POW2
@EXAMPLES
@given(
    r=SIDES,
    c=SIDES,
    seed=st.integers(0, 999),
    tma=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    bad=st.booleans(),
)
def test_rows(
    pow2: bool, device: torch.device, r: int, c: int, seed: int, tma: bool, dtype: torch.dtype, bad: bool
) -> None:
    x = sample(r, c + 8, seed=seed, device=device).to(dtype)[:, :c]  # rows at a stride
    x = hostile(x.contiguous()) if bad else x
    got = triton.quantize_rows(x, pow2, tma)
    assert_same_bytes(got, reference.quantize_rows(x, pow2))
    q, scale = got
    assert q.stride(0) % 16 == 0 and q.stride(1) == 1 and q.data_ptr() % 16 == 0
    assert scale.stride() == ((1, -(-r // 4) * 4) if tma else (blocks(c), 1))
    out = x.new_empty(r, c + 8, dtype=torch.float32)[:, :c]  # exact there; the interpreter truncates to bf16
    assert dequantize_rows(Quantized(*got), out) is out
    if not bad or device.type == "cuda":  # the interpreter reads NaN in e4m3 as a number
        assert torch.equal(out.nan_to_num(7), reference.dequantize(*got, torch.float32).nan_to_num(7))
    assert dequantize_rows(Quantized(*got)).dtype is reference.dequantize_rows(Quantized(*got)).dtype is torch.bfloat16


@POW2
@settings(max_examples=10)
@given(n=WEIGHT_SIDES, k=WEIGHT_SIDES, seed=st.integers(0, 999), transposed=st.booleans(), bad=st.booleans())
def test_blocks(pow2: bool, device: torch.device, n: int, k: int, seed: int, transposed: bool, bad: bool) -> None:
    w = sample(2, n, k, seed=seed, device=device)
    w = hostile(w) if bad else w
    stored = w.mT.contiguous().mT if transposed else w
    got = triton.quantize_blocks(stored, pow2)
    want = reference.quantize_blocks(w, pow2)
    assert_same_bytes(got, want)
    assert all(q.stride(1) % 16 == 0 and q.stride(2) == 1 for q in got[:2] if min(n, k) > 1)
    other = sample(2, k, 130, seed=seed + 1, device=device)  # the second weight in the same launch
    first, second = triton.quantize_weights((stored, other), pow2)
    assert_same_bytes(first, want)
    assert_same_bytes(second, reference.quantize_blocks(other, pow2))


COUNTS = st.lists(st.sampled_from([0, 0, 1, 5, 127, 128, 129, 200]), min_size=1, max_size=5)


@EXAMPLES
@given(counts=COUNTS, tokens=st.integers(0, 20), seed=st.integers(0, 999))
def test_pad_segments(device: torch.device, counts: list[int], tokens: int, seed: int) -> None:
    offsets, gather = plan_index(counts, tokens, seed, device)
    capacity = padded_capacity(len(gather), len(counts))
    got = pad_segments(offsets, gather, capacity)
    assert_same_bytes(got, reference.pad_segments(offsets, gather, capacity))
    starts, row, token, source = (t.tolist() for t in got)
    assert starts == [0, *itertools.accumulate(blocks(n) * BLOCK for n in counts)] and starts[-1] <= capacity
    where = [-1] * capacity
    for start, first, n in zip(starts, offsets.tolist(), counts, strict=False):
        where[start : start + n] = range(first, first + n)
    tokens_of = [int(gather[p]) if p >= 0 else -1 for p in where]
    assert token == tokens_of
    assert row == [p if t >= 0 else -1 for p, t in zip(where, tokens_of, strict=True)]
    read = [token[at : at + BLOCK] for at in range(0, capacity, BLOCK)]
    for block, mine in enumerate(read):
        same = mine[0] >= 0 and mine[0] % BLOCK == 0 and mine == [*read, *[None] * 20][mine[0] // BLOCK]
        assert source[block] == (mine[0] // BLOCK if same else block)


def test_experts_that_read_the_same_tokens(device: torch.device) -> None:
    """Of three: the second reads what the first does but for one token, the third less than that, two blocks apart."""
    tokens = torch.arange(300, dtype=torch.int32)
    other = tokens.clone()
    other[200] = 7
    parts = tokens, other, tokens[:260], tokens[128:256], torch.full((5,), -1, dtype=torch.int32)
    offsets = torch.tensor([0, *itertools.accumulate(len(part) for part in parts)], dtype=torch.int32, device=device)
    index = torch.cat(parts).to(device)
    capacity = padded_capacity(len(index), len(parts))
    got = pad_segments(offsets, index, capacity)
    assert_same_bytes(got, reference.pad_segments(offsets, index, capacity))
    source = got.source.tolist()
    assert source[:11] == [0, 1, 2, 0, 4, 2, 0, 1, 8, 1, 10] and source[11:] == list(range(11, capacity // BLOCK))
    read = got.token_index.view(-1, BLOCK)
    assert torch.equal(read[got.source.long()], read)


@POW2
@EXAMPLES
@given(counts=COUNTS, c=SIDES, seed=st.integers(0, 999), tiled=st.booleans(), bad=st.booleans())
def test_columns(
    pow2: bool, device: torch.device, counts: list[int], c: int, seed: int, tiled: bool, bad: bool
) -> None:
    offsets, gather = plan_index(counts, 30, seed, device)
    token = reference.pad_segments(offsets, gather, padded_capacity(len(gather), len(counts))).token_index
    x = sample(31, c + 8, seed=seed, device=device)[:, :c]
    x = hostile(x.contiguous()) if bad else x
    x[30] = math.nan  # a token that nobody reads
    got = triton.quantize_columns(x, token, pow2, tiled)
    assert_same_bytes(got, reference.quantize_columns(x, token, pow2, tiled))
    q, scale = got
    assert (
        scale.shape == (blocks(c) if tiled else c, len(token) // BLOCK)
        and scale.stride(0) == 1
        and scale.stride(1) % 4 == 0
    )
    if not bad:
        assert not q[:, token < 0].view(torch.uint8).any()  # padding is +0, whatever x holds


@POW2
@EXAMPLES
@given(counts=COUNTS, c=SIDES, seed=st.integers(0, 999))
def test_tiles(pow2: bool, device: torch.device, counts: list[int], c: int, seed: int) -> None:
    offsets, gather = plan_index(counts, 30, seed, device)
    row = reference.pad_segments(offsets, gather, padded_capacity(len(gather), len(counts))).row_index
    x = sample(len(gather), c, seed=seed, device=device)
    held = row[row >= 0].long()
    nobody = torch.ones(len(x), dtype=torch.bool, device=device)
    nobody[held] = False
    x[nobody] = math.nan
    got, want = triton.quantize_both_orders(x, row, pow2), reference.quantize_both_orders(x, row, pow2)
    assert_same_bytes(got.columns, want.columns)
    assert_same_bytes(tuple(t[held] for t in got.rows), tuple(t[held] for t in want.rows))
    (q, row_scale), (transposed, scale) = got
    assert row_scale.stride(0) == 1 and row_scale.stride(1) % 4 == 0
    by_row, by_column = reference.dequantize(q, row_scale)[held], reference.dequantize(transposed, scale)[:, row >= 0].T
    if by_row.isfinite().all() and by_column.isfinite().all() and by_row.numel():
        limit = 448 * scale.double().amax() / 14  # half a step of the largest tile
        assert (by_row - by_column).abs().amax() <= limit


@EXAMPLES
@given(rows=st.integers(1, 40), c=SIDES, seed=st.integers(0, 999), bad=st.booleans())
def test_saved(device: torch.device, rows: int, c: int, seed: int, bad: bool) -> None:
    """int8 with a power of two for 32 columns: 127.5 steps or more are never needed, and 63.5 nearly always."""
    z = sample(rows, c + 8, seed=seed, device=device)[:, :c]
    z = hostile(z.contiguous()) if bad else z
    got, want = quantize_saved(z), reference.quantize_saved(z)
    assert_same_bytes((got.scale,), (want.scale,))
    steps = saved_steps(got.scale, c)
    finite = steps.isfinite()
    assert torch.equal(got.q[finite], want.q[finite])
    value = got.q.float() * steps
    assert not value[~finite].isfinite().any(), "no group that is not finite ends as finite numbers"
    assert ((value - z.float()).abs() <= steps / 2)[finite].all()
    groups = torch.nn.functional.pad(torch.where(finite, z.float().abs(), 0), (0, -c % 32)).view(rows, -1, 32).amax(2)
    codes = torch.nn.functional.pad(got.q.int().abs(), (0, -c % 32)).view(rows, -1, 32).amax(2)
    assert (codes[groups > 1e-29] >= 63).all()
    assert got.scale.stride(0) == 1 and got.scale.stride(1) % 4 == 0 and (rows == 1 or got.q.stride(0) % 16 == 0)


@POW2
def test_a_quiet_row_beside_a_loud_one_keeps_its_digits(pow2: bool, device: torch.device) -> None:
    """What one scale for a tile loses: rows a million times smaller than their neighbour."""
    x = torch.randn(128, 256, device=device)
    x[1::2] *= 1e-6
    x = x.bfloat16()
    index = torch.arange(128, dtype=torch.int32, device=device)
    for backend in (triton, reference):
        rows = backend.quantize_both_orders(x, index, pow2).rows
        error = (reference.dequantize(*rows) - x.double()).norm(dim=1) / x.double().norm(dim=1)
        assert error.amax() < 0.05


def test_same_bytes_again(device: torch.device) -> None:
    x = sample(300, 200, seed=3, device=device)
    index = torch.randint(-1, 300, (384,), dtype=torch.int32, device=device)
    assert_same_bytes(triton.quantize_columns(x, index), triton.quantize_columns(x, index))
    assert_same_bytes(triton.quantize_rows(x), triton.quantize_rows(x))


def test_nothing_to_quantize(device: torch.device) -> None:
    empty = torch.empty(0, 200, dtype=torch.bfloat16, device=device)
    index = torch.empty(0, dtype=torch.int32, device=device)
    offsets = torch.zeros(4, dtype=torch.int32, device=device)
    assert_same_bytes(triton.quantize_rows(empty), reference.quantize_rows(empty))
    assert_same_bytes(triton.quantize_columns(empty, index), reference.quantize_columns(empty, index))
    for got, want in zip(
        triton.quantize_both_orders(empty, index), reference.quantize_both_orders(empty, index), strict=True
    ):
        assert_same_bytes(got, want)
    assert_same_bytes(pad_segments(offsets, index, 0), reference.pad_segments(offsets, index, 0))
    weight = torch.empty(0, 128, 128, dtype=torch.bfloat16, device=device)
    assert_same_bytes(triton.quantize_blocks(weight), reference.quantize_blocks(weight))


@settings(max_examples=200)
@given(counts=st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_padded_capacity_is_enough_and_tight(counts: list[int]) -> None:
    capacity = padded_capacity(sum(counts), len(counts))
    assert sum(blocks(n) * BLOCK for n in counts) <= capacity
    worst = [1] * (min(len(counts), sum(counts)) - 1)
    worst = [*worst, sum(counts) - len(worst)] if sum(counts) else []
    assert capacity - sum(blocks(n) * BLOCK for n in worst) < BLOCK


@pytest.mark.parametrize(("rows", "stride"), [(257, 2**23), (129, 2**24)])
def test_row_offsets_of_a_weight_may_pass_2_to_31(rows: int, stride: int, device: torch.device) -> None:
    """A view whose last row starts at element 2^31, the first of a tile or not: 4 GB of addresses, of which a CPU
    touches the rows only.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # so much, for half a minute
        w = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device).as_strided((1, rows, 8), (0, stride, 1))
    w.copy_(sample(1, rows, 8, seed=3, device=device))
    for view in (w, w.mT):
        assert_same_bytes(triton.quantize_weights((view,))[0], triton.quantize_weights((view.contiguous(),))[0])
