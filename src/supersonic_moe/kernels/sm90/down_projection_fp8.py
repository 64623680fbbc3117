"""Down-projection of the inference operator in FP8 on sm_90a: y[r] = C[r] · W2[expert of r]ᵀ, bf16, and the output of
every token that has no other row.

Layout
    C (P, I) and W2 (E, H, I) as A and B of grouped_gemm_fp8.py, rows in order; W2 may have any strides of scales.
    Rows by ``row_out`` (route_rows.py): {token, weight}: weight · y[r] is written to out[token], in fp32 up to the one
    rounding; {-1, 1}: y[r] is, for combine_rows.py to add up. With 8 of 256 experts chosen and 32 here, 37 % of the
    tokens have one row, and their y is neither written nor read again.
Tiles
    As grouped_gemm_fp8.py, without an index; with ``pairs``, two blocks of rows of an expert are in flight side by side
    and load half of W2's columns each, for both: 64 KB for two tiles and 128 of K in place of 96. The last block of an
    odd number is multiplied by two columns of tiles at a time, which share its rows: 80 KB. Rows leave by
    ordinary stores of 128 bytes, since TMA stores only neighbouring rows: 64 store instructions of a warp for its 16
    rows of 256 columns.
Cost
    2·P·H·I FLOP. Bytes: P·I + E·H·I + 2·P·H.
"""

from __future__ import annotations

import functools

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, kernel_of, on_device
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BUFFER_BYTES, fp8_form
from supersonic_moe.kernels.sm90.operands import map_of_columns, map_of_rows, scaled_weight
from supersonic_moe.kernels.sm90.route_rows import Buffer

ONE, PAIR = (fp8_form(cluster, False, 4 * BUFFER_BYTES + 8 * BLOCK_M) for cluster in (1, 2))
OPCODES = ("QGMMA", "UTMALDG", "USETMAXREG", "F2FP.BF16")
SPECS = tuple(form.spec("down_projection_fp8", OPCODES) for form in (ONE, PAIR))


@functools.cache
def _kernel(pairs: bool) -> Kernel:
    return kernel_of(SPECS[pairs])


def down_projection_fp8(
    c: Quantized, w2_EHI: Quantized, expert_offsets: Tensor, row_out: Buffer, y_PH: Tensor, out_TH: Tensor, pairs: bool
) -> None:
    """Writes the rows of ``y_PH`` that ``row_out`` does not send to ``out_TH``, and those that it does. Both bf16.
    ``pairs``: two blocks of rows of an expert are multiplied side by side and share what they load of W2.
    """
    if y_PH.numel() == 0:
        return
    form = PAIR if pairs else ONE
    with on_device(y_PH):
        _kernel(pairs).launch(
            form.grid(y_PH.get_device()),
            map_a=map_of_rows(c.q, None, box=(form.rows_of_a, form.block_k)),
            map_scale_a=map_of_columns(c.scale),
            **scaled_weight(w2_EHI, form),
            offsets=expert_offsets,
            row_out=row_out,
            y=y_PH,
            out=out_TH,
            row_bytes=out_TH.stride(0) * 2,
        )
