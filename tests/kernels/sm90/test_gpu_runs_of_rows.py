"""Rows through an index that follow each other are loaded as one box: which ones, what it holds, and where it ends.

The map of such boxes is made of another matrix than the map of single rows, so each row of a result tells from which of
the two it came. What is computed must have the bits of the same product of rows that were put together beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from grouped_cases import CUDA, row_experts, segments
from poison import poisoned_allocations  # noqa: F401
from torch import Tensor

from supersonic_moe.config.activation import GateUpLayout, as_activation
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.jit.tma import TensorMap, tensor_map
from supersonic_moe.kernels.interface import DownBackward, Gate, Quantized, Rows, UpProjection
from supersonic_moe.kernels.sm90 import (
    down_backward,
    down_backward_fp8,
    down_backward_fp8_quantize,
    down_backward_ungated,
    gemm_config,
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_wgrad,
    up_projection,
    up_projection_fp8,
    up_projection_ungated,
)
from supersonic_moe.kernels.triton.pad_segments import pad_segments
from supersonic_moe.kernels.triton.quantize import quantize_blocks, quantize_rows
from supersonic_moe.quantization.block_format import E4M3, empty_scales, padded_capacity

pytestmark = pytest.mark.gpu

MODULES: tuple[ModuleType, ...] = (
    down_backward, down_backward_fp8, down_backward_ungated, grouped_gemm, grouped_gemm_fp8, grouped_wgrad,
    up_projection, up_projection_fp8, up_projection_ungated,
)  # fmt: skip
# Experts that end inside a box, at its end and in its first row: few rows for single blocks, many for pairs of blocks.
COUNTS = {"few": [0, 300, 1, 31, 255, 513, 128, 64, 0, 33], "many": [300, 1000, 0, 560, 97, 16]}
HIDDEN, SEED = 208, 5


def of_each(counts: list[int], rows: Callable[[int], Tensor]) -> Tensor:
    return torch.cat([rows(count) for count in counts])


def in_blocks(counts: list[int], tokens: int) -> Tensor:
    """Sixteen rows that follow each other, then sixteen from elsewhere."""
    starts = torch.randint(0, tokens - 16, (sum(counts) // 16 + len(counts),))
    blocks = iter(start + torch.arange(16) for start in starts)
    return of_each(counts, lambda n: torch.cat([*(next(blocks) for _ in range(0, n, 16)), torch.arange(0)])[:n])


def broken(counts: list[int], tokens: int) -> Tensor:
    index = of_each(counts, torch.arange)
    elsewhere = torch.rand(index.shape) < 0.03
    return torch.where(elsewhere, torch.randint(-1, tokens, index.shape), index)


PATTERNS: dict[str, Callable[[list[int], int], Tensor]] = {
    "every token": lambda counts, tokens: of_each(counts, torch.arange),
    "to the last token": lambda counts, tokens: of_each(counts, lambda n: torch.arange(tokens - n, tokens)),
    "on into the next expert": lambda counts, tokens: torch.arange(sum(counts)),
    "from the zero row": lambda counts, tokens: of_each(counts, lambda n: torch.arange(-1, n - 1)),
    "broken": broken,
    "in blocks": in_blocks,
    "backwards": lambda counts, tokens: of_each(counts, lambda n: torch.arange(n).flip(0)),
    "every other": lambda counts, tokens: of_each(counts, lambda n: 2 * torch.arange(n) % tokens),
    "one": lambda counts, tokens: torch.full((sum(counts),), 3),
}


class Problem:
    """An index; two matrices, NaN in rows that it does not name; and the rows in boxes of ``lines``."""

    def __init__(self, counts: list[int], pattern: str) -> None:
        torch.manual_seed(SEED)
        self.counts, self.rows, self.tokens = counts, sum(counts), sum(counts) + 7
        self.offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=CUDA)
        self.row_expert = row_experts(counts, 0)
        self.index = PATTERNS[pattern](counts, self.tokens).int().to(CUDA)
        self.unnamed = torch.ones(self.tokens, dtype=torch.bool, device=CUDA)
        self.unnamed[self.index[self.index >= 0].long()] = False

    def in_runs(self, lines: int) -> Tensor:
        """(P, 1): rows of which each box of ``lines`` lines from an expert's first row on follows the one before it."""
        runs = torch.zeros(self.rows, 1, dtype=torch.bool, device=CUDA)
        for _, expert in segments(self.offsets):
            for first in range(expert.start, expert.stop, lines):
                box = slice(first, min(first + lines, expert.stop))
                runs[box] = bool((self.index[box].diff() == 1).all())
        return runs

    def matrices(self) -> tuple[Tensor, Tensor]:
        x, other = torch.randn(2, self.tokens, HIDDEN, device=CUDA).bfloat16()
        x[self.unnamed], other[self.unnamed] = float("nan"), float("nan")
        return x, other

    def quantized(self) -> tuple[Quantized, Tensor]:
        """The second has codes of its own and the scales of the first."""
        x, other = (quantize_rows(y, tma=False) for y in torch.randn(2, self.tokens, HIDDEN, device=CUDA).bfloat16())
        x.scale[self.unnamed] = float("nan")
        for codes in (x.q, other.q):
            codes.view(torch.uint8)[self.unnamed] = 0x7F  # NaN
        return x, other.q

    def picked(self, x: Tensor, other: Tensor, lines: int) -> Tensor:
        """Rows as a kernel must see them, of any dtype; -1 names a row of zeros."""
        token = self.index.clamp(min=0).long()
        x, other = (t.view(torch.uint8) if t.dtype is E4M3 else t for t in (x, other))
        return torch.where(self.index[:, None] < 0, 0, torch.where(self.in_runs(lines), other[token], x[token]))

    def bf16(self, lines: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Rows[Tensor], Rows[Tensor]]:
        """The same rows through the index and as they lie."""
        x, other = self.matrices()
        boxes_of(other, monkeypatch)
        return Rows(x, self.index), Rows(self.picked(x, other, lines))

    def fp8(self, lines: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Rows[Quantized], Rows[Quantized]]:
        x, other = self.quantized()
        boxes_of(other, monkeypatch)
        scale = empty_scales(x.scale, self.rows, x.scale.shape[1], True)
        scale.copy_(x.scale[self.index.clamp(min=0).long()])
        return Rows(x, self.index), Rows(Quantized(self.picked(x.q, other, lines).view(E4M3), scale))


def boxes_of(other: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels load as whole boxes from now on."""

    def map_of_run(a_TK: Tensor, index: Tensor | None, box: tuple[int, int], unused: TensorMap) -> TensorMap:
        assert a_TK.shape == other.shape or index is None
        return unused if index is None else tensor_map(other, box=box)

    for module in MODULES:
        monkeypatch.setattr(module, "map_of_run", map_of_run)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and x.float().isfinite().all() and torch.equal(x.float(), y.float())


problems = pytest.mark.parametrize("pattern", PATTERNS)
counts_of = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


@problems
@counts_of
@pytest.mark.parametrize("block_n", [256, 320, 384])
def test_products(counts: list[int], pattern: str, block_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_config, "tile_columns", lambda columns, depth: block_n)
    p = Problem(counts, pattern)
    b = torch.randn(len(counts), HIDDEN, 520, device=CUDA).bfloat16()
    through_index, as_they_lie = p.bf16(32, monkeypatch)
    same(*((grouped_gemm.grouped_mm(rows, b, p.offsets),) for rows in (through_index, as_they_lie)))
    other = torch.randn(p.rows, 520, device=CUDA).bfloat16()
    through_index, as_they_lie = p.bf16(16, monkeypatch)
    same(*((grouped_wgrad.grouped_mm_wgrad(rows, other, p.offsets),) for rows in (through_index, as_they_lie)))


@problems
@counts_of
@pytest.mark.parametrize("activation", ["swiglu", "relu_sq"])
def test_fused_steps(counts: list[int], pattern: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, gate = Problem(counts, pattern), Gate(as_activation(activation), GateUpLayout.GATE_UP)
    width = 264
    n1, experts = gate.activation.fan * width, len(counts)
    w1, w2 = torch.randn(2, experts, n1, HIDDEN, device=CUDA).bfloat16() / HIDDEN**0.5
    w2 = w2[:, :width].mT.contiguous()
    z, scores = torch.randn(p.rows, n1, device=CUDA).bfloat16(), torch.rand(p.rows, device=CUDA) + 0.1
    rows = p.bf16(32, monkeypatch)
    same(
        *(
            (
                *up_projection.up_projection(UpProjection(a, w1, None, p.offsets, p.row_expert, gate, save=True)),
                *down_backward.down_backward(DownBackward(a, w2, z, None, scores, p.offsets, p.row_expert, gate)),
            )
            for a in rows
        )
    )


@problems
@counts_of
@pytest.mark.parametrize(("width", "lines"), [(256, 32), (384, 16)])  # 384: two blocks of columns share the rows
def test_fp8(counts: list[int], pattern: str, width: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, gate = Problem(counts, pattern), Gate(as_activation("swiglu"), GateUpLayout.INTERLEAVED)
    w1, w2 = torch.randn(2, len(counts), 2 * width, HIDDEN, device=CUDA).bfloat16() / HIDDEN**0.5
    w1_q, _, w1_scale = quantize_blocks(w1)
    _, w2_q, w2_scale = quantize_blocks(w2[:, :width].mT.contiguous())
    z = quantize_rows(torch.randn(p.rows, 2 * width, device=CUDA).bfloat16(), tma=True)
    scores = torch.rand(p.rows, device=CUDA) + 0.1
    padded = pad_segments(p.offsets, p.index, padded_capacity(p.rows, len(counts)))
    used = int(padded.offsets[-1])

    def steps(rows: Rows[Quantized]) -> tuple[Tensor, ...]:
        product = grouped_gemm_fp8.grouped_mm_fp8(rows, Quantized(w1_q[:, :width], w1_scale), p.offsets)
        down = DownBackward(rows, Quantized(w2_q, w2_scale.mT), z, None, scores, p.offsets, p.row_expert, gate)
        dz, scaled, _ = down_backward_fp8_quantize.down_backward_fp8_quantize(down, padded, False)
        turned = (dz.columns.q[:, :used], dz.columns.scale[:, : used // 128], scaled.q[:, :used])
        return (product, *down_backward_fp8.down_backward_fp8(down), *dz.rows, *turned, scaled.scale[:, : used // 128])

    through_index, as_they_lie = p.fp8(lines, monkeypatch)
    same(steps(through_index), steps(as_they_lie))


@problems
@counts_of
def test_fp8_up_projection(counts: list[int], pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, gate = Problem(counts, pattern), Gate(as_activation("swiglu"), GateUpLayout.INTERLEAVED)
    for width, lines in ((128, 32), (256, 16)):  # activations; W1 has twice as many columns
        w1_q, _, w1_scale = quantize_blocks(torch.randn(len(counts), 2 * width, HIDDEN, device=CUDA).bfloat16())
        w1 = Quantized(w1_q, w1_scale)
        through_index, as_they_lie = (
            up_projection_fp8.up_projection_fp8(
                UpProjection(rows, w1, None, p.offsets, p.row_expert, gate, save=True), Fp8Recipe()
            )
            for rows in p.fp8(lines, monkeypatch)
        )
        same((*through_index[0], *through_index[1]), (*as_they_lie[0], *as_they_lie[1]))
