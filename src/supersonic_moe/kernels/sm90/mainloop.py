"""What the host knows of mainloop.cuh and load.cuh: tile sizes, shared memory, what all launches share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.jit.tma import TensorMap, tensor_map

BLOCK_M, BLOCK_K = 128, 64
BLOCK_N, WIDE_BLOCK_N = 256, 384
STAGES = {BLOCK_N: 4, WIDE_BLOCK_N: 3}  # as many as fit
GROUP_M = 16  # row blocks walked before the next column: 8 to 64 measured within 2-3 % (docs/log.md)
THREADS = 384
WARP_ROWS = 16  # rows of an output box
OPCODES = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM")


def mainloop_spec(
    name: str,
    *,
    block_n: int = BLOCK_N,
    cluster: int,
    gather: bool,
    constants: tuple[tuple[str, int], ...] = (),
    opcodes: tuple[str, ...],
) -> KernelSpec:
    """Kernel ``name`` of the file of that name; ``gather``: rows of A come through an index."""
    stages, line = STAGES[block_n], 128
    return KernelSpec(
        name=name,
        source=f"{name}.cu",
        constants=(
            ("BLOCK_N", block_n),
            ("STAGES", stages),
            ("CLUSTER", cluster),
            ("GROUP_M", GROUP_M),
            ("GATHER", int(gather)),
            *constants,
        ),
        threads=THREADS,
        smem_bytes=stages * ((BLOCK_M + block_n) * line + 32 + 16) + 4 * BLOCK_M,  # notes, barriers; row indices
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
