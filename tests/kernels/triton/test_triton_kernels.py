"""The memory-bound Triton kernels against fp64 oracles that loop over rows. Rows that must not matter hold NaN; so do
fresh outputs."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from oracle import gelu_tanh
from poison import poisoned_allocations  # noqa: F401
from sorted_rows import assert_rounded, offsets_of, owners_of

from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation
from supersonic_moe.kernels import reference
from supersonic_moe.kernels import triton as kernels
from supersonic_moe.kernels.interface import Gate, Quantized, Rows, TokenRows
from supersonic_moe.kernels.triton import bias_gradient
from supersonic_moe.kernels.triton.scatter_quantized import scatter_quantized
from supersonic_moe.quantization.block_format import empty_scales

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- gather_rows and gather_sum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "width", "num_rows"), [(7, 1, 40), (5, 24, 33), (3, 1100, 9), (4, 3072, 3)])
def test_gather_rows(num_tokens: int, width: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(num_tokens, width + 8, device=device).to(dtype)[:, :width]  # rows at a stride
    index = torch.randint(-2, num_tokens, (num_rows,), dtype=torch.int32, device=device)
    index[0] = -1
    got = kernels.gather_rows(x, index)
    want = torch.stack([x[i] if i >= 0 else torch.zeros_like(x[0]) for i in index.tolist()])
    assert got.dtype is dtype and torch.equal(got, want)
    assert torch.equal(kernels.gather_rows(x, index), got)


def gather_sum_oracle(
    y: Tensor, scale: Tensor | None, bias: Tensor | None, owner: Tensor, rows_of: list[list[int]]
) -> Tensor:
    out = torch.zeros(len(rows_of), y.shape[1], dtype=torch.float64)
    for t, rows in enumerate(rows_of):
        for r in rows:
            value = y[r].double().cpu()
            if bias is not None:
                value = value + bias[owner[r]].double().cpu()
            out[t] += value if scale is None else value * scale[r].double().cpu()
    return out


@pytest.mark.parametrize(
    ("k", "width", "dtype"),
    [
        (1, 40, torch.float32),
        (3, 200, torch.float32),
        (3, 200, torch.bfloat16),
        (3, 200, torch.float16),
        (8, 16, torch.bfloat16),
        (10, 2050, torch.float32),  # two rounds of five rows
    ],
    ids=str,
)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "scale and bias"])
def test_gather_sum(k: int, width: int, full: bool, dtype: torch.dtype, device: torch.device) -> None:
    num_tokens, counts = 4, [20, 0, 30]
    owner = owners_of(counts, 14, device)
    y = torch.randn(64, width, device=device).to(dtype)
    scale = torch.randn(64, device=device) if full else None
    bias = torch.randn(3, width, device=device).to(dtype) if full else None
    token_rows = torch.randperm(50)[: num_tokens * k % 50].tolist()
    token_rows = (token_rows * num_tokens * k)[: num_tokens * k]
    token_rows[k : 2 * k] = [-1] * k  # token 1 has no rows
    token_rows[-1] = -1
    y[50:] = math.nan  # dead
    rows_of = [[r for r in token_rows[t * k : (t + 1) * k] if r >= 0] for t in range(num_tokens)]
    y[[r for r in range(50) if r not in token_rows]] = math.nan  # real rows that no token reads
    rows = torch.tensor(token_rows, dtype=torch.int32, device=device)
    args = y, scale, bias, owner, TokenRows(rows, None, k, num_tokens)
    got = kernels.gather_sum(*args)
    assert got.dtype is dtype
    assert_rounded(got, gather_sum_oracle(y, scale, bias, owner, rows_of), scale=10)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert torch.equal(got, kernels.gather_sum(*args))


def test_gather_sum_of_any_number_of_rows(device: torch.device) -> None:
    lengths = [0, 3, 1, 0, 11, 4]
    bounds = [0, *itertools.accumulate(lengths)]
    token_rows = torch.randperm(bounds[-1]).tolist()
    token_rows[5] = -1
    rows_of = [[r for r in token_rows[a:b] if r >= 0] for a, b in itertools.pairwise(bounds)]
    y, scale = torch.randn(bounds[-1], 72, device=device), torch.rand(bounds[-1], device=device)
    owner = owners_of([bounds[-1]], 0, device)
    got = kernels.gather_sum(
        y,
        scale,
        None,
        owner,
        TokenRows(
            torch.tensor(token_rows, dtype=torch.int32, device=device),
            torch.tensor(bounds, dtype=torch.int32, device=device),
            0,
            len(lengths),
        ),
    )
    assert_rounded(got, gather_sum_oracle(y, scale, None, owner, rows_of), scale=10)


@pytest.mark.parametrize(("counts", "dead"), [([3, 0, 5], 4), ([0, 0], 7), ([6], 0)], ids=str)
@pytest.mark.parametrize("width", [1, 40, 4100])
def test_zero_dead_rows(width: int, counts: list[int], dead: int, device: torch.device) -> None:
    live = sum(counts)
    y = torch.full((live + dead, width), math.nan, dtype=torch.bfloat16, device=device)
    y[:live] = 3
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    kernels.zero_dead_rows(y, offsets)
    assert (y[:live] == 3).all() and (y[live:] == 0).all()


# ---- activations ---------------------------------------------------------------------------------------------------

ACTIVATIONS = [*(as_activation(kind) for kind in ActivationType), Activation.gpt_oss(), Activation.swiglu_clamped(2.5)]


def activate(activation: Activation, h: Tensor, layout: GateUpLayout) -> Tensor:
    """The formulas of ``activation.py`` in torch, differentiable."""
    unary = {
        ActivationType.RELU: F.relu,
        ActivationType.RELU_SQ: lambda x: F.relu(x).square(),
        ActivationType.GELU: F.gelu,
        ActivationType.GELU_TANH: gelu_tanh,
        ActivationType.SILU: F.silu,
        ActivationType.GEGLU: F.gelu,
        ActivationType.GEGLU_TANH: gelu_tanh,
        ActivationType.REGLU: F.relu,
    }
    if not activation.gated:
        return unary[activation.type](h)
    width = h.shape[1] // 2
    gate, up = {
        GateUpLayout.INTERLEAVED: (h[:, 0::2], h[:, 1::2]),
        GateUpLayout.GATE_UP: (h[:, :width], h[:, width:]),
        GateUpLayout.UP_GATE: (h[:, width:], h[:, :width]),
    }[layout]
    if activation.type is not ActivationType.SWIGLU:
        return unary[activation.type](gate) * up
    if activation.limit is not None:
        limit = activation.limit  # since torch 2.14 no gradient passes at the bounds of clamp
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.up_offset)


def check_activation(
    activation: Activation, layout: GateUpLayout, width: int, dtype: torch.dtype, biased: bool, device: torch.device
) -> None:
    counts, dead = [4, 0, 7, 2], 3
    live = sum(counts)
    padding = [3, 12]  # rows of an expert that no token reads: score 0, and here NaN
    columns = width * activation.fan
    owner = owners_of(counts, dead, device)
    h = (3 * torch.randn(live + dead, columns + 8, device=device)).to(dtype)[:, :columns]
    if activation.limit is not None:
        h[0, ::3] = activation.limit  # gradients pass at the bounds
        h[1, ::3] = -activation.limit
    bias = torch.randn(4, columns, device=device).to(dtype) if biased else None
    da = torch.randn(live + dead, width, device=device).to(dtype)
    scores = torch.rand(live + dead, device=device)
    silent = [*padding, *range(live, live + dead)]
    h[silent], da[silent], scores[silent] = math.nan, math.nan, 0.0
    scores[5] = 0.0  # a real row may have score 0: its ds still counts

    real = [r for r in range(live) if r not in padding]
    leaf = h[real].double().cpu().requires_grad_()
    total = leaf if bias is None else leaf + bias[owner[real].long()].double().cpu()
    a = activate(activation, total, layout)
    da_real, s_real = da[real].double().cpu(), scores[real].double().cpu()[:, None]
    (dh,) = torch.autograd.grad((s_real * da_real * a).sum(), leaf)

    forward = kernels.activation_forward(h, bias, owner, Gate(activation, layout))
    backward = kernels.activation_backward(h, bias, da, scores, owner, Gate(activation, layout))
    assert [t.dtype for t in (forward, *backward)] == [dtype, dtype, dtype, torch.float32]
    assert_rounded(forward[real], a.detach(), scale=10)
    got_dh, got_as, got_ds = backward
    assert_rounded(got_dh[real], dh, scale=10)
    assert_rounded(got_as[real], (s_real * a).detach(), scale=10)
    assert_rounded(got_ds[real], (da_real * a).sum(1).detach(), scale=100)
    assert not got_dh[silent].any() and not got_as[silent].any()
    again = kernels.activation_backward(h, bias, da, scores, owner, Gate(activation, layout))
    assert all(torch.equal(x[real], y[real]) for x, y in zip(backward, again, strict=True))


@pytest.mark.parametrize("layout", GateUpLayout, ids=lambda v: v.value)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activation(activation: Activation, layout: GateUpLayout, device: torch.device) -> None:
    check_activation(activation, layout, 40, torch.float32, True, device)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (1, torch.float32),
        (152, torch.bfloat16),
        (152, torch.float16),
        (1304, torch.float32),
    ],  # 1304: 11 blocks, one partial
    ids=str,
)
@pytest.mark.parametrize("activation", [Activation.gpt_oss(), as_activation("gelu")], ids=repr)
def test_activation_widths(activation: Activation, width: int, dtype: torch.dtype, device: torch.device) -> None:
    check_activation(activation, GateUpLayout.INTERLEAVED, width, dtype, False, device)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activation_keeps_nan(activation: Activation, device: torch.device) -> None:
    """No maximum or clamp may turn a NaN into a number, be it in the gate or in the up half."""
    h = torch.ones(3, 8, device=device)
    h[1, :4], h[2, 4:] = math.nan, math.nan
    a = kernels.activation_forward(h, None, owners_of([3], 0, device), Gate(activation, GateUpLayout.GATE_UP))
    assert torch.equal(a.isnan(), h[:, :4].isnan() | h[:, 4:].isnan() if activation.gated else h.isnan())


# ---- reductions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "dtype"), [(8, torch.bfloat16), (200, torch.float16), (1304, torch.float32)], ids=str
)
def test_row_dot(width: int, dtype: torch.dtype, device: torch.device) -> None:
    owner = owners_of([3, 0, 6], 2, device)
    a, b = torch.randn(11, width, device=device).to(dtype), torch.randn(3, width, device=device).to(dtype)
    a[9:] = math.nan
    start = torch.randn(11, device=device)
    out = start.clone()
    kernels.row_dot(Rows(a), b, owner, out)
    want = (start[:9].double() + (a[:9].double() * b[owner[:9].long()].double()).sum(1)).cpu()
    assert_rounded(out[:9], want, scale=width)
    assert torch.equal(out[9:], start[9:])  # dead rows are left alone

    index = torch.tensor([4, 0, -1, 3, 3, 1, -1, 0, 2, 9, 9], dtype=torch.int32, device=device)
    gathered, through_index = start.clone(), start.clone()
    kernels.row_dot(Rows(kernels.gather_rows(a, index)), b, owner, gathered)
    kernels.row_dot(Rows(a, index), b, owner, through_index)
    assert torch.equal(through_index, gathered)


@pytest.mark.parametrize(
    ("counts", "width", "dtype"),
    [
        ([5, 0, 1, 17], 40, torch.float32),
        ([5, 0, 1, 17], 40, torch.bfloat16),
        ([5, 0, 1, 17], 40, torch.float16),
        ([0, 0, 90, 0], 24, torch.bfloat16),  # one hot expert: many chunks
        ([16, 32, 0, 15, 33], 130, torch.float32),  # at and around the chunk bounds
        ([1], 1, torch.float32),
        ([2] * 9, 8, torch.float32),
        ([0, 0], 16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True])
def test_segment_sum(
    counts: list[int],
    width: int,
    scaled: bool,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bias_gradient, "CHUNK", 16)
    live = sum(counts)
    a = torch.randn(live + 5, width, device=device).to(dtype)
    a[live:] = math.nan
    scale = torch.randn(live + 5, device=device) if scaled else None
    got = kernels.segment_sum(Rows(a), scale, offsets_of(counts, device))
    want = torch.zeros(len(counts), width, dtype=torch.float64)
    for row, e in enumerate(owners_of(counts, 0, device).tolist()):
        want[e] += a[row].double().cpu() * (1 if scale is None else scale[row].double().cpu())
    assert got.dtype is torch.float32
    assert_rounded(got, want, scale=10)
    assert torch.equal(got, kernels.segment_sum(Rows(a), scale, offsets_of(counts, device)))

    index = torch.randint(-1, live + 1, (live + 5,), dtype=torch.int32, device=device).clamp(max=max(live - 1, -1))
    index[live:] = live  # dead rows name a row of NaN
    want = kernels.segment_sum(Rows(kernels.gather_rows(a, index)), scale, offsets_of(counts, device))
    assert torch.equal(kernels.segment_sum(Rows(a, index), scale, offsets_of(counts, device)), want)


# ---- fp64 probabilities (Megatron's moe_router_dtype) ----------------------------------------------------------------


def test_fp64_scores_count_as_fp32(device: torch.device) -> None:
    """Same bits as with the scores in fp32: a kernel that reads them as they come."""
    counts, gate = [5, 0, 7], Gate(as_activation("swiglu"), GateUpLayout.GATE_UP)
    owner, offsets = owners_of(counts, 0, device), offsets_of(counts, device)
    z, y = (torch.randn(12, 16, device=device).bfloat16() for _ in range(2))
    tokens = TokenRows(torch.randperm(12, device=device).int(), None, 3, 4)
    single = torch.rand(12, device=device)
    results = [
        (
            *kernels.activation_backward(z, None, y[:, :8], scores, owner, gate),
            kernels.gather_sum(y, scores, None, owner, tokens),
            kernels.segment_sum(Rows(y), scores, offsets),
        )
        for scores in (single, single.double())
    ]
    for got, want in zip(*results, strict=True):
        assert got.dtype is want.dtype and torch.equal(got, want)


def test_no_rows(device: torch.device) -> None:
    """T = 0: nothing is read, outputs that have elements are zero."""
    bf16 = torch.bfloat16
    nothing = torch.empty(0, 16, dtype=bf16, device=device)
    index = torch.empty(0, dtype=torch.int32, device=device)
    offsets = torch.zeros(4, dtype=torch.int32, device=device)
    scores = torch.empty(0, device=device)
    assert kernels.gather_rows(nothing, index).shape == (0, 16)
    assert kernels.gather_sum(nothing, scores, None, index, TokenRows(index, None, 2, 0)).shape == (0, 16)
    assert not kernels.gather_sum(nothing, scores, None, index, TokenRows(index, None, 0, 3)).any()
    gate = Gate(as_activation("swiglu"), GateUpLayout.INTERLEAVED)
    assert kernels.activation_forward(nothing, None, index, gate).shape == (0, 8)
    dh, scaled, ds = kernels.activation_backward(nothing, None, nothing[:, :8], scores, index, gate)
    assert (dh.shape, scaled.shape, ds.shape) == ((0, 16), (0, 8), (0,))
    kernels.row_dot(Rows(nothing), torch.empty(3, 16, dtype=bf16, device=device), index, scores)
    assert torch.equal(kernels.segment_sum(Rows(nothing), None, offsets), torch.zeros(3, 16, device=device))
    for dtype in (bf16, torch.float16):
        rows, w = nothing.to(dtype), torch.empty(3, 16, 24, dtype=dtype, device=device)
        assert kernels.grouped_mm(Rows(rows), w, offsets).shape == (0, 24)
        dw = kernels.grouped_mm_wgrad(Rows(rows), rows, offsets)
        assert torch.equal(dw, torch.zeros(3, 16, 16, dtype=dtype, device=device))


# ---- sizes that only a GPU holds -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.xdist_group("large on a GPU")
def test_element_offsets_past_2_to_31(device: torch.device) -> None:
    """P * H > 2^31: 32-bit element offsets would wrap to the first rows. About 20 GB."""
    width, num_rows = 8192, 2**18 + 24
    x = torch.randn(64, width, device=device).bfloat16()
    index = torch.arange(num_rows, dtype=torch.int32, device=device) % 64
    rows = kernels.gather_rows(x, index)
    assert torch.equal(rows[-24:], x[index[-24:].long()])
    last = torch.arange(num_rows - 16, num_rows, dtype=torch.int32, device=device)
    ones = torch.ones(num_rows, device=device)
    owner = torch.zeros_like(index)
    assert torch.equal(kernels.gather_sum(rows, ones, None, owner, TokenRows(last, None, 1, 16)), rows[-16:])

    gate = Gate(as_activation("relu"), GateUpLayout.GATE_UP)
    assert torch.equal(kernels.activation_forward(rows, None, owner, gate)[-16:], rows[-16:].relu())
    dh, scaled, _ = kernels.activation_backward(rows, None, rows, ones, owner, gate)
    assert torch.equal(dh[-16:], rows[-16:].relu()) and torch.equal(scaled[-16:], rows[-16:].relu())
    dots = torch.zeros(num_rows, device=device)
    kernels.row_dot(Rows(rows), x[:1], owner, dots)
    torch.testing.assert_close(dots[-16:], (rows[-16:].float() * x[0].float()).sum(1), rtol=1e-3, atol=1e-2)
    offsets = torch.tensor([0, num_rows - 16, num_rows], dtype=torch.int32, device=device)
    sums = kernels.segment_sum(Rows(rows), None, offsets)
    torch.testing.assert_close(sums[1], rows[-16:].float().sum(0), rtol=1e-5, atol=1e-4)


# ---- entries by index ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("out", [None, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [kernels, reference], ids=["triton", "reference"])
def test_pick(backend: ModuleType, out: torch.dtype | None, dtype: torch.dtype, device: torch.device) -> None:
    """Strided values, NaN where no index points; an index below 0 reads nothing and gives 0."""
    index = torch.randint(-3, 350, (2500,), dtype=torch.int32, device=device)
    values = torch.full((700, 2), math.nan, dtype=dtype, device=device)[:, 1]
    values[index[index >= 0].long()] = torch.randn(int((index >= 0).sum()), dtype=dtype, device=device)
    got = backend.pick(values, index, out)
    want = torch.tensor([values[i].item() if i >= 0 else 0.0 for i in index.tolist()], dtype=torch.float64)
    assert got.dtype is (out or dtype)
    assert torch.equal(got.cpu(), want.to(got.dtype))
    assert backend.pick(values[:0], torch.full((5,), -1, dtype=torch.int32, device=device)).tolist() == [0.0] * 5
    assert backend.pick(values, index[:0], out).shape == (0,)


# ---- scatter_quantized -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "tokens"), [(128, 1), (256, 5), (384, 33), (7168, 6)])
@pytest.mark.parametrize("kind", ["bf16", "pow2", "weighted", "by_token", "by_block"])
def test_scatter_quantized(columns: int, tokens: int, kind: str, device: torch.device) -> None:
    """Codes and scales of each slot that has a row; the last slot is not used, tokens without a row are not read, and
    other rows keep their bytes.
    """
    blocks, slots, weight = columns // 128, 4, None
    x = torch.randn(tokens, columns + 16, device=device).bfloat16()[:, :columns]
    pow2 = kind == "pow2"
    want = reference.quantize_rows(x, pow2)
    scale = None
    if kind in ("by_token", "by_block"):
        x, scale = want.q, want.scale.T.contiguous().T if kind == "by_block" else want.scale
    if kind == "weighted":
        weight = torch.rand(tokens, device=device)
        want = Quantized(want.q, want.scale * weight[:, None])
    row_TS = torch.randperm(tokens * slots, device=device).int().view(tokens, slots)
    row_TS[torch.rand(tokens, slots, device=device) < 0.4] = -1
    row_TS[tokens // 2, :3] = -1
    row_TS[:, 3] = 1 << 30  # not to be followed
    x[tokens // 2] = math.nan
    codes = torch.full((tokens * slots + 3, columns), 77, device=device, dtype=torch.uint8)
    out = Quantized(codes.view(torch.float8_e4m3fn), empty_scales(codes, len(codes), blocks, tma=True).fill_(-1))
    scatter_quantized(out, x, scale, row_TS, 3, weight, pow2)
    used = torch.zeros(len(codes), dtype=torch.bool, device=device)
    for s in range(3):
        has = (row_TS[:, s] >= 0).nonzero().flatten()
        rows = row_TS[has, s].long()
        used[rows] = True
        assert torch.equal(codes[rows], want.q.view(torch.uint8)[has]) and torch.equal(out.scale[rows], want.scale[has])
    assert codes[~used].eq(77).all() and out.scale[~used].eq(-1).all()
