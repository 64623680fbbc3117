"""The sm_90 grouped GEMMs against fp64: ragged and empty groups, odd sizes, both weight orders, accumulation."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from poison import poisoned_allocations  # noqa: F401
from torch import Tensor

from supersonic_moe.activation import Activation, GateUpLayout, as_activation
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.sm90.grouped_gemm import grouped_mm
from supersonic_moe.kernels.sm90.grouped_wgrad import grouped_mm_wgrad
from supersonic_moe.kernels.sm90.up_projection import up_projection

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
GROUPS = {
    "ragged": [0, 300, 1, 0, 255, 513, 128, 64, 0],
    "tiny": [1, 2, 3, 0, 5, 7, 8, 9],
    "one hot": [0, 0, 1999, 0],
    "single": [1],
    "even": [256, 256, 256, 256],
    "many": [17] * 200,
}
SIZES = [(64, 256), (72, 8), (8, 264), (2880, 520), (1000, 1000)]


def case(counts: list[int], dead: int, *widths: int, positive: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Offsets and one operand of each width; dead rows at the end are NaN and must not be read into a result."""
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=CUDA)
    rows = sum(counts)
    operands = []
    for width in widths:
        x = torch.randn(rows + dead, width, device=CUDA, dtype=torch.bfloat16)
        x = x.abs() if positive else x
        x[rows:] = float("nan")
        operands.append(x)
    return offsets, operands


def segments(offsets: Tensor) -> list[tuple[int, slice]]:
    return [(e, slice(a, b)) for e, (a, b) in enumerate(itertools.pairwise(offsets.tolist()))]


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
    got = grouped_mm(a, b, offsets)
    for e, rows in segments(offsets):
        if rows.start < rows.stop:
            assert oracle.rel_fro(got[rows], a[rows].double() @ b[e].double()) < 3e-3, f"expert {e}"
    assert torch.equal(got[: sum(counts)], grouped_mm(a, b, offsets)[: sum(counts)])


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("m", "n"), [(64, 256), (136, 8), (8, 264), (520, 2880), (1000, 1000)])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_weight_gradient(counts: list[int], m: int, n: int, positive: bool) -> None:
    offsets, (a, b) = case(counts, 70, m, n, positive=positive)
    got = grouped_mm_wgrad(a, b, offsets)
    exact = torch.full((len(counts), m, n), float("nan"), device=CUDA)
    grouped_mm_wgrad(a, b, offsets, exact)
    start = torch.randn(len(counts), m, n, device=CUDA)
    added = grouped_mm_wgrad(a, b, offsets, start.clone(), accumulate=True)
    for e, rows in segments(offsets):
        want = a[rows].double().T @ b[rows].double()
        if rows.start == rows.stop:
            assert (got[e] == 0).all() and (exact[e] == 0).all() and torch.equal(added[e], start[e])
            continue
        assert oracle.rel_fro(got[e], want) < 3e-3, f"expert {e}"
        assert oracle.rel_fro(exact[e], want) < 1e-5, f"expert {e} fp32"
        assert oracle.rel_fro(added[e] - start[e], want) < 1e-4, f"expert {e} accumulated"
    assert torch.equal(got, grouped_mm_wgrad(a, b, offsets))
    assert torch.equal(added, grouped_mm_wgrad(a, b, offsets, start.clone(), accumulate=True))


def test_transposed_output_of_strided_rows() -> None:
    """A may be a slice of a wider buffer: row strides are free."""
    offsets, (wide,) = case([100, 30], 0, 512)
    a = wide[:, 128:256]
    b = torch.randn(2, 128, 64, device=CUDA, dtype=torch.bfloat16)
    got = grouped_mm(a, b, offsets)
    assert oracle.rel_fro(got[:100], a[:100].double() @ b[0].double()) < 3e-3


@pytest.mark.parametrize(("bias", "save"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("layout", GateUpLayout)
@pytest.mark.parametrize(
    "activation",
    [as_activation("swiglu"), as_activation("geglu"), as_activation("reglu"), Activation.gpt_oss(limit=0.9)],
    ids=["swiglu", "geglu", "reglu", "gpt_oss"],
)
@pytest.mark.parametrize(("hidden", "width"), [(72, 8), (520, 1000)])
@pytest.mark.parametrize("counts", [GROUPS["ragged"], GROUPS["tiny"], GROUPS["even"]], ids=["ragged", "tiny", "even"])
def test_up_projection(
    counts: list[int], hidden: int, width: int, activation: Activation, layout: GateUpLayout, bias: bool, save: bool
) -> None:
    """H and A against fp64; rows that no expert owns are free, all others written, the bias outside H."""
    offsets, (x,) = case(counts, 3, hidden)
    num_experts, rows = len(counts), sum(counts)
    w1 = torch.randn(num_experts, 2 * width, hidden, device=CUDA, dtype=torch.bfloat16)
    b1 = torch.randn(num_experts, 2 * width, device=CUDA, dtype=torch.bfloat16) if bias else None
    row_expert = torch.repeat_interleave(
        torch.arange(num_experts + 1, device=CUDA), torch.tensor([*counts, 3], device=CUDA)
    ).int()
    h, a = up_projection(x, w1, b1, offsets, row_expert, activation, layout, save)
    exact = reference.grouped_mm(x[:rows].double(), w1.double().transpose(1, 2), offsets)
    want = reference.activation_forward(
        exact, None if b1 is None else b1.double(), row_expert[:rows], activation, layout
    )
    assert oracle.rel_fro(a[:rows], want) < 3e-3
    assert h.shape == ((rows + 3) if save else 0, 2 * width)
    if save:
        assert oracle.rel_fro(h[:rows], exact) < 3e-3
    assert torch.equal(a[:rows], up_projection(x, w1, b1, offsets, row_expert, activation, layout, save)[1][:rows])
