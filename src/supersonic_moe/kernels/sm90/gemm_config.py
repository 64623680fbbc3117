"""In which form a GEMM is compiled: the host's side of gemm/config.cuh, and the only place that chooses.

A block computes 128 x ``block_n`` of D, or as many activations as fit into that, K block by K block of 128 bytes, with
a ring of stages that one warpgroup fills and two multiply. A cluster of two shares half of what it loads: columns of B,
or rows of A that are gathered in FP8. Why these sizes: docs/design.md, "Hopper", and docs/log.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from supersonic_moe.jit.spec import KernelSpec

LINE = 128  # bytes of a swizzled line: K of a stage
BLOCK_M = 128
BLOCK_N, BROAD_BLOCK_N, WIDE_BLOCK_N = 256, 320, 384
BF16_STAGES = {BLOCK_N: 4, BROAD_BLOCK_N: 4, WIDE_BLOCK_N: 3}  # as many as fit
FP8_STAGES = 3
GROUP_M = 16  # row blocks walked before the next column: 8 to 64 measured within 2-3 % (docs/log.md)
THREADS = 384
WARP_ROWS = 16  # rows of an output box
ARRIVALS = 1  # lanes of a warp that arrive on a barrier; the test under racecheck sets 32
LOAD_WARPS = 4  # that load, with gather
BUFFER_BYTES = BLOCK_M * LINE  # of a staging buffer
WORK_TILE_BYTES, BARRIER_BYTES = 32, 16  # beside a stage

OPCODES = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM")
FP8_OPCODES = ("QGMMA", *OPCODES[1:])


@dataclass(frozen=True, eq=False)
class GemmConfig:
    """One form. ``bf16_form`` and ``fp8_form`` make one object of each, so that a kernel is found by it at once."""

    block_n: int
    cluster: int
    gather: bool
    """Rows of A come through an index."""
    fp8: bool
    """e4m3 operands with block scales."""
    staging_bytes: int
    """Shared memory of the epilogue's own, behind everything else."""
    block_k: int = field(init=False)
    """K of a stage, in elements."""
    run_box: tuple[int, int] = field(init=False)
    """Rows of a tile that a loading warp gathers, and K of a stage: a TMA box where they follow each other."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_k", LINE if self.fp8 else LINE // 2)
        gathering_warps = LOAD_WARPS * (self.cluster if self.share_a else 1)
        object.__setattr__(self, "run_box", (BLOCK_M // gathering_warps, self.block_k))

    @property
    def stages(self) -> int:
        return FP8_STAGES if self.fp8 else BF16_STAGES[self.block_n]

    @property
    def share_a(self) -> bool:
        """Whether a cluster shares rows of A instead of columns of B."""
        return self.fp8 and self.gather and self.cluster > 1

    @property
    def rows_of_a(self) -> int:
        """Of a box of A as it lies."""
        return BLOCK_M // self.cluster if self.fp8 and not self.gather else BLOCK_M

    @property
    def rows_of_b(self) -> int:
        """Of a box of B: what a block loads of it at once."""
        return self.block_n // (1 if self.share_a else self.cluster)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block: stages; scales of A, work tiles and barriers of each; row indices; staging. C++
        asserts the same number (``shared_bytes`` of gemm/config.cuh).
        """
        scales = _round_up((BLOCK_M + 4) * 4, LINE) if self.fp8 else 0
        side = self.stages * (scales + WORK_TILE_BYTES + BARRIER_BYTES) + 4 * BLOCK_M
        staging = _round_up(side, 1024) - side + self.staging_bytes if self.staging_bytes else 0
        return self.stages * (BLOCK_M + self.block_n) * LINE + side + staging

    def grid(self, device: int) -> tuple[int, int, int]:
        """One block on each multiprocessor, in whole clusters."""
        return multiprocessors(device) // self.cluster * self.cluster, 1, 1

    def spec(self, name: str, opcodes: tuple[str, ...], **constants: int) -> KernelSpec:
        """Kernel ``name`` of the file of that name in this form. ``constants``: what its epilogue is compiled for."""
        everywhere = {
            "BLOCK_N": self.block_n,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "GROUP_M": GROUP_M,
            "GATHER": int(self.gather),
            "SHARE_A": int(self.share_a),
            "ARRIVALS": ARRIVALS,
            "SMEM_BYTES": self.smem_bytes,
        }
        return KernelSpec(
            name=name,
            source=f"{name}.cu",
            constants=tuple((everywhere | constants).items()),
            threads=THREADS,
            smem_bytes=self.smem_bytes,
            cluster=self.cluster,
            opcodes=opcodes,
        )

    def __str__(self) -> str:
        pair = f", pairs of blocks share {'A' if self.share_a else 'B'}" if self.cluster > 1 else ""
        return f"{BLOCK_M} x {self.block_n} x {self.block_k} in {self.stages} stages{pair}"


# One form is one object: the caches would take arguments given in another way (by name, or left out) for another form.


@functools.cache
def bf16_form(block_n: int, cluster: int, gather: bool, /) -> GemmConfig:
    """The epilogue borrows stages."""
    return GemmConfig(block_n, cluster, gather, fp8=False, staging_bytes=0)


@functools.cache
def fp8_form(cluster: int, gather: bool, staging_bytes: int, /) -> GemmConfig:
    return GemmConfig(BLOCK_N, cluster, gather, fp8=True, staging_bytes=staging_bytes)


def choose(
    columns: int, gather: bool, *, rows: int | None = None, depth: int = 0, broad: bool = False, staging_bytes: int = 0
) -> GemmConfig:
    """The form for these sizes.

    Args:
        columns: N, in elements of B.
        gather: whether rows of A come through an index.
        rows: what an expert has on average; None where D has no ragged rows, in weight gradients.
        depth: K, or the rows of an expert in a weight gradient; 0 for an epilogue that does not know all tiles.
        broad: whether such an epilogue knows tiles of 320 columns beside those of 256.
        staging_bytes: of the epilogue, which in FP8 has its own; 0 in bf16, where it borrows stages.

    In bf16 two blocks share B where an expert has two blocks of rows; else the second would idle. In FP8 they share
    gathered rows, each of which costs the TMA unit a box, if blocks of columns come in pairs.
    """
    if staging_bytes:
        pair = gather and -(-columns // BLOCK_N) % 2 == 0
        return fp8_form(2 if pair else 1, gather, staging_bytes)
    if rows is not None and rows < 2 * BLOCK_M:
        return bf16_form(BLOCK_N, 1, gather)
    if depth:
        return bf16_form(tile_columns(columns, depth), 2, gather)
    return bf16_form(narrower_columns(columns) if broad else BLOCK_N, 2, gather)


def tile_columns(columns: int, depth: int) -> int:
    """Columns of a tile: 256, or 320 where those pad the product less, as for H 2880; or 384 for a deep contraction of
    columns that it covers about as well. The wider a tile, the fewer bytes it loads for a product: 384 gains 2-4 %; the
    price, one stage less, is paid at each tile (docs/log.md).
    """
    narrower = narrower_columns(columns)
    fills = _round_up(columns, WIDE_BLOCK_N) <= 1.04 * _round_up(columns, narrower)
    return WIDE_BLOCK_N if depth >= 4096 and fills else narrower


def narrower_columns(columns: int) -> int:
    """The same without 384."""
    return BROAD_BLOCK_N if _round_up(columns, BROAD_BLOCK_N) < _round_up(columns, BLOCK_N) else BLOCK_N


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
