"""What the host knows of mainloop.cuh, mainloop_fp8.cuh and load.cuh: tile sizes, shared memory, common launch code."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map

BLOCK_M, BLOCK_K = 128, 64
BLOCK_N, WIDE_BLOCK_N = 256, 384
STAGES = {BLOCK_N: 4, WIDE_BLOCK_N: 3}  # as many as fit
FP8_BLOCK_K, FP8_STAGES = 128, 3
GROUP_M = 16  # row blocks walked before the next column: 8 to 64 measured within 2-3 % (docs/log.md)
THREADS = 384
WARP_ROWS = 16  # rows of an output box
ARRIVALS = 1  # lanes of a warp that arrive on a barrier; the test under racecheck sets 32
OPCODES = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM")
FP8_OPCODES = ("QGMMA", *OPCODES[1:])


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def mainloop_spec(
    name: str,
    *,
    block_n: int = BLOCK_N,
    cluster: int,
    gather: bool,
    constants: tuple[tuple[str, int], ...] = (),
    opcodes: tuple[str, ...],
    scaled: bool = False,
    share_a: bool = False,
    staging_rooms: int = 4,
    extra_bytes: int = 0,
) -> KernelSpec:
    """Kernel ``name`` of the file of that name. ``gather``: rows of A come through an index; ``scaled``: e4m3 with
    block scales; ``share_a``: a cluster shares rows of A, not columns of B; ``staging_rooms``: of 128 lines, where
    ``scaled``; ``extra_bytes`` follow them.
    """
    stages, line = FP8_STAGES if scaled else STAGES[block_n], 128
    ring, side = stages * (BLOCK_M + block_n) * line, stages * (32 + 16) + 4 * BLOCK_M  # notes, barriers; row indices
    if scaled:  # scales of A; staging
        side = (
            _round_up(side + stages * _round_up((BLOCK_M + 4) * 4, 128), 1024)
            + staging_rooms * BLOCK_M * line
            + extra_bytes
        )
    return KernelSpec(
        name=name,
        source=f"{name}.cu",
        constants=(
            ("BLOCK_N", block_n),
            ("STAGES", stages),
            ("CLUSTER", cluster),
            ("GROUP_M", GROUP_M),
            ("GATHER", int(gather)),
            ("SHARE_A", int(share_a)),
            ("SCALED", int(scaled)),
            ("ARRIVALS", ARRIVALS),
            ("SMEM_BYTES", ring + side),  # gemm/config.cuh computes the same
            *constants,
        ),
        threads=THREADS,
        smem_bytes=ring + side,
        cluster=cluster,
        opcodes=opcodes,
    )


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def cluster_size(rows: int, num_experts: int) -> int:
    """Two blocks share B where an expert has at least two blocks of rows on average; else the second would idle."""
    return 2 if rows >= 2 * BLOCK_M * num_experts else 1


def tile_columns(columns: int, depth: int) -> int:
    """384 for a deep contraction of columns that it covers well, else 256. The wide tile moves less and gains 2-4 %;
    the price, one stage less, is paid at each tile (docs/log.md).
    """
    padded, padded_wide = -(-columns // BLOCK_N) * BLOCK_N, -(-columns // WIDE_BLOCK_N) * WIDE_BLOCK_N
    return WIDE_BLOCK_N if depth >= 4096 and padded_wide <= 1.04 * padded else BLOCK_N


def num_rows(a_TK: Tensor, gather_index: Tensor | None) -> int:
    return a_TK.shape[0] if gather_index is None else gather_index.shape[0]


def map_of_rows(a_TK: Tensor, gather_index: Tensor | None, box: tuple[int, int]) -> TensorMap:
    """A as a kernel loads it: boxes of rows, or with an index one row at a time."""
    return tensor_map(a_TK, box=box if gather_index is None else (1, box[1]))
