"""The sm_90 grouped GEMMs against fp64: ragged and empty groups, odd sizes, both weight orders, rows through an index,
fused epilogues, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import oracle
import pytest
import torch
from down_backward_cases import ACTIVATIONS
from grouped_cases import CUDA, GROUPS, case, indexed, picked, row_experts, rows_case, segments
from poison import poisoned_allocations  # noqa: F401

from supersonic_moe.config.activation import GateUpLayout, as_activation
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import DownBackward, Gate, Into, Rows, UpProjection
from supersonic_moe.kernels.sm90 import gemm_config
from supersonic_moe.kernels.sm90.down_backward import down_backward
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad
from supersonic_moe.kernels.sm90.up_projection import up_projection

pytestmark = pytest.mark.gpu

SIZES = [(64, 256), (72, 8), (8, 264), (2880, 520), (1000, 1000)]


@pytest.fixture(params=[256, 320, 384])
def block_n(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a tile, which the size of the problem decides otherwise."""
    monkeypatch.setattr(gemm_config, "tile_columns", lambda columns, depth: request.param)


@pytest.mark.usefixtures("block_n")
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("n_contiguous", [False, True])
@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_rows(counts: list[int], depth: int, columns: int, n_contiguous: bool, positive: bool) -> None:
    offsets, (a,) = case(counts, 5, depth, positive=positive)
    shape = (len(counts), depth, columns) if n_contiguous else (len(counts), columns, depth)
    b = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    b = b.abs() if positive else b
    b = b if n_contiguous else b.transpose(1, 2)
    got = grouped_mm(Rows(a), b, offsets)
    for e, rows in segments(offsets):
        if rows.start < rows.stop:
            assert oracle.rel_fro(got[rows], a[rows].double() @ b[e].double()) < 3e-3, f"expert {e}"
    assert torch.equal(got[: sum(counts)], grouped_mm(Rows(a), b, offsets)[: sum(counts)])


@pytest.mark.usefixtures("block_n")
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("m", "n"), [(64, 256), (136, 8), (8, 264), (520, 2880), (1000, 1000)])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_weight_gradient(counts: list[int], m: int, n: int, positive: bool) -> None:
    offsets, (a, b) = case(counts, 70, m, n, positive=positive)
    got = grouped_mm_wgrad(Rows(a), b, offsets)
    exact = torch.full((len(counts), m, n), float("nan"), device=CUDA)
    grouped_mm_wgrad(Rows(a), b, offsets, Into(exact))
    start = torch.randn(len(counts), m, n, device=CUDA)
    added = grouped_mm_wgrad(Rows(a), b, offsets, Into(start.clone(), accumulate=True))
    for e, rows in segments(offsets):
        want = a[rows].double().T @ b[rows].double()
        if rows.start == rows.stop:
            assert (got[e] == 0).all() and (exact[e] == 0).all() and torch.equal(added[e], start[e])
            continue
        assert oracle.rel_fro(got[e], want) < 3e-3, f"expert {e}"
        assert oracle.rel_fro(exact[e], want) < 1e-5, f"expert {e} fp32"
        assert oracle.rel_fro(added[e] - start[e], want) < 1e-4, f"expert {e} accumulated"
    assert torch.equal(got, grouped_mm_wgrad(Rows(a), b, offsets))
    assert torch.equal(added, grouped_mm_wgrad(Rows(a), b, offsets, Into(start.clone(), accumulate=True)))


@pytest.mark.parametrize("n_contiguous", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(8, 264), (2880, 520)])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
@pytest.mark.usefixtures("block_n")
def test_rows_through_an_index(counts: list[int], depth: int, columns: int, n_contiguous: bool) -> None:
    """The same bits as from gathered rows."""
    offsets, x, index = indexed(counts, 5, depth)
    b = torch.randn(len(counts), depth, columns, device=CUDA, dtype=torch.bfloat16)
    b = b if n_contiguous else b.transpose(1, 2).contiguous().transpose(1, 2)
    got, rows = grouped_mm(Rows(x, index), b, offsets), sum(counts)
    assert torch.equal(got[:rows], grouped_mm(Rows(picked(x, index).bfloat16()), b, offsets)[:rows])


@pytest.mark.usefixtures("block_n")
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("m", "n"), [(64, 256), (136, 8), (8, 264), (520, 2880)])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_weight_gradient_of_indexed_rows_and_its_transpose(
    counts: list[int], m: int, n: int, gathered: bool, positive: bool
) -> None:
    offsets, x, index = indexed(counts, 70, m, positive=positive)
    _, (b,) = case(counts, 70, n, positive=positive)
    a, rows = picked(x, index), sum(counts)
    operands = Rows(x, index) if gathered else Rows(a.bfloat16()), b, offsets
    exact = torch.full((len(counts), m, n), float("nan"), device=CUDA)
    grouped_mm_wgrad(*operands, Into(exact))
    for e, segment in segments(offsets):
        want = a[segment].T @ b[:rows][segment].double()
        assert oracle.rel_fro(exact[e], want) < 1e-5 or (want.abs().max() == 0 and (exact[e] == 0).all()), f"expert {e}"
    got = grouped_mm_wgrad(*operands)
    assert torch.equal(got, exact.bfloat16())
    assert torch.equal(grouped_mm_wgrad(*operands, Into(transposed=True)), got.transpose(1, 2))
    flipped = torch.full((len(counts), n, m), float("nan"), device=CUDA)
    assert torch.equal(grouped_mm_wgrad(*operands, Into(flipped, transposed=True)), exact.transpose(1, 2))
    del exact, got  # 1.8 GB of the largest case, and there are 4.8 GB more
    start = torch.randn(len(counts), n, m, device=CUDA)
    added = grouped_mm_wgrad(*operands, Into(start.clone(), transposed=True, accumulate=True))
    assert torch.equal(added, start + flipped)


@pytest.mark.usefixtures("block_n")
@pytest.mark.parametrize("n_contiguous", [False, True])
@pytest.mark.parametrize("columns", [8, 64, 72, 128, 136, 192, 200, 264, 328, 520, 2880])
def test_columns_of_a_last_tile_have_the_bits_of_a_wider_product(columns: int, n_contiguous: bool) -> None:
    """The same columns of a product with more of them."""
    offsets, (a,) = case([700, 0, 129, 128, 901], 5, 200)  # enough for clusters of two
    whole = torch.randn(5, 200, 3840, device=CUDA, dtype=torch.bfloat16)
    whole = whole if n_contiguous else whole.mT.contiguous().mT
    part = whole[..., :columns] if n_contiguous else whole[..., :columns].mT.contiguous().mT
    want, got = grouped_mm(Rows(a), whole, offsets), grouped_mm(Rows(a), part, offsets)
    assert torch.equal(got[:1858], want[:1858, :columns])
    index = torch.arange(a.shape[0], device=CUDA, dtype=torch.int32)
    assert torch.equal(grouped_mm(Rows(a, index), part, offsets)[:1858], got[:1858])


@pytest.mark.usefixtures("block_n")
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("m", [8, 64, 72, 128, 136, 192, 320, 384, 448])
def test_the_last_rows_of_a_weight_gradient_have_the_bits_of_whole_tiles(
    m: int, accumulate: bool, gathered: bool
) -> None:
    """Tiles past the last row, half a tile, and pairs of blocks that share its rows, with an odd number of columns of
    tiles and an even one."""
    offsets, (a, b) = case([300, 0, 1, 64], 70, 512, 1600)
    rows = Rows(a, torch.arange(a.shape[0], device=CUDA, dtype=torch.int32)) if gathered else Rows(a)
    for n in (192, 328, 800, 1600):
        start = torch.randn(4, 512, n, device=CUDA)
        into = Into(start.clone(), accumulate=True) if accumulate else Into()
        want = grouped_mm_wgrad(rows, b[:, :n].contiguous(), offsets, into)[:, :m]
        part = Rows(a[:, :m].contiguous(), rows.gather_index)
        into = Into(start[:, :m].contiguous(), accumulate=True) if accumulate else Into()
        assert torch.equal(grouped_mm_wgrad(part, b[:, :n].contiguous(), offsets, into), want), n


def test_rows_at_any_stride() -> None:
    """A may be a slice of a wider buffer: row strides are free, with an index and without."""
    offsets, (wide,) = case([100, 30], 0, 512)
    a = wide[:, 128:256]
    b = torch.randn(2, 128, 64, device=CUDA, dtype=torch.bfloat16)
    got = grouped_mm(Rows(a), b, offsets)
    assert oracle.rel_fro(got[:100], a[:100].double() @ b[0].double()) < 3e-3
    index = torch.arange(130, device=CUDA, dtype=torch.int32)
    assert torch.equal(grouped_mm(Rows(a, index), b, offsets), got)
    assert torch.equal(grouped_mm_wgrad(Rows(a, index), a, offsets), grouped_mm_wgrad(Rows(a), a, offsets))


class Fused(NamedTuple):
    gate: Gate
    outermost: bool = False
    """Weights stored (E, H, N1) and (E, I, H)."""


FUSED = {
    **{f"{name}-{layout}": Fused(Gate(a, layout)) for name, a in ACTIVATIONS.items() for layout in GateUpLayout},
    "relu_sq": Fused(Gate(as_activation("relu_sq"), GateUpLayout.GATE_UP)),
    "swiglu-gate_up-outermost": Fused(Gate(as_activation("swiglu"), GateUpLayout.GATE_UP), True),
    "swiglu-up_gate-outermost": Fused(Gate(as_activation("swiglu"), GateUpLayout.UP_GATE), True),
    "gpt_oss-interleaved-outermost": Fused(Gate(ACTIVATIONS["gpt_oss"], GateUpLayout.INTERLEAVED), True),
}


def fused_cases(test: Callable[..., None]) -> Callable[..., None]:
    """Activations, layouts, sizes and groups of the two fused steps."""
    groups = ("ragged", "tiny", "even")
    for parametrize in (
        pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED),
        pytest.mark.parametrize("gathered", [False, True]),
        pytest.mark.parametrize(("hidden", "width"), [(72, 8), (520, 1000)]),
        pytest.mark.parametrize("counts", [GROUPS[name] for name in groups], ids=groups),
    ):
        test = parametrize(test)
    return test


def weight(*shape: int, outermost: bool) -> torch.Tensor:
    """(E, N, H), or a view of that shape of (E, H, N)."""
    w = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    return w.mT.contiguous().mT if outermost else w


@pytest.mark.parametrize(("bias", "save"), [(False, False), (False, True), (True, True)])
@fused_cases
def test_up_projection(
    counts: list[int], hidden: int, width: int, gathered: bool, fused: Fused, bias: bool, save: bool
) -> None:
    """Z and A against fp64; rows that no expert owns are free, all others written, the bias outside Z."""
    offsets, source, index = rows_case(counts, 3, hidden, gathered)
    num_experts, rows, n1 = len(counts), sum(counts), fused.gate.activation.fan * width
    w1 = weight(num_experts, n1, hidden, outermost=fused.outermost)
    b1 = torch.randn(num_experts, n1, device=CUDA, dtype=torch.bfloat16) if bias else None
    row_expert = row_experts(counts, 3)
    step = UpProjection(Rows(source, index), w1, b1, offsets, row_expert, fused.gate, save)
    z, a = up_projection(step)
    exact = reference.grouped_mm(Rows(picked(source, index)[:rows]), w1.double().transpose(1, 2), offsets)
    want = reference.activation_forward(exact, None if b1 is None else b1.double(), row_expert[:rows], fused.gate)
    assert oracle.rel_fro(a[:rows], want) < 3e-3
    assert z.shape == ((rows + 3) if save else 0, n1)
    if save:
        assert oracle.rel_fro(z[:rows], exact) < 3e-3
    assert torch.equal(a[:rows], up_projection(step)[1][:rows])
    if fused.outermost:
        other = up_projection(step._replace(w1=w1.contiguous()))
        assert torch.equal(a[:rows], other[1][:rows]) and torch.equal(z[:rows], other[0][:rows])


@pytest.mark.parametrize("bias", [False, True])
@fused_cases
def test_down_backward(counts: list[int], hidden: int, width: int, gathered: bool, fused: Fused, bias: bool) -> None:
    """dZ, s A and dS against fp64; rows of score 0 get exact zeros although Z is NaN there."""
    offsets, source, index = rows_case(counts, 3, hidden, gathered)
    num_experts, rows, n1 = len(counts), sum(counts), fused.gate.activation.fan * width
    w2 = weight(num_experts, hidden, width, outermost=fused.outermost) / hidden**0.5
    z = torch.randn(rows + 3, n1, device=CUDA, dtype=torch.bfloat16)
    scores = torch.randn(rows + 3, device=CUDA)
    unscored = torch.rand(rows + 3, device=CUDA) < 0.1
    scores[unscored], z[unscored] = 0, float("nan")
    b1 = torch.randn(num_experts, n1, device=CUDA, dtype=torch.bfloat16) if bias else None
    row_expert = row_experts(counts, 3)
    step = DownBackward(Rows(source, index), w2, z, b1, scores, offsets, row_expert, fused.gate)
    dz, scaled, ds = down_backward(step)
    z_read = torch.where(unscored[:, None], 0, z)
    da = reference.grouped_mm(Rows(picked(source, index)[:rows]), w2.double(), offsets)
    want = reference.activation_backward(
        z_read[:rows].double(), None if b1 is None else b1.double(), da, scores[:rows].double(), row_expert[:rows],
        fused.gate,
    )  # fmt: skip
    zero, scored = unscored[:rows], ~unscored[:rows]
    assert (dz[:rows][zero] == 0).all() and (scaled[:rows][zero] == 0).all()
    assert oracle.rel_fro(dz[:rows], want[0]) < 3e-3
    assert oracle.rel_fro(scaled[:rows], want[1]) < 3e-3
    assert oracle.rel_fro(ds[:rows][scored], want[2][scored]) < 1e-4
    again = down_backward(step)
    assert all(torch.equal(x[:rows][scored], y[:rows][scored]) for x, y in zip((dz, scaled, ds), again, strict=True))
    if fused.outermost:
        other = down_backward(step._replace(w2=w2.contiguous()))
        assert all(
            torch.equal(x[:rows][scored], y[:rows][scored]) for x, y in zip((dz, scaled, ds), other, strict=True)
        )


@pytest.mark.parametrize("fused", ["swiglu-gate_up", "relu_sq", "gpt_oss-interleaved-outermost"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("width", [320, 448, 832])
def test_clusters_stay_in_step(width: int, gathered: bool, fused: str) -> None:
    """Short tails, their columns split between the blocks of a cluster, then tiles of the same cluster that share B.
    Both blocks must have used as many stages, although the last column tile has fewer stages of Z than others.
    """
    counts = [300, 560] * 30
    test_up_projection(counts, 136, width, gathered, FUSED[fused], bias=False, save=True)
    test_down_backward(counts, 136, width, gathered, FUSED[fused], bias=False)
