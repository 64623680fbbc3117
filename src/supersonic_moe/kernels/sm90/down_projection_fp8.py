"""Down-projection of the inference operator in FP8 on sm_90a: y[r] = C[r] · W2[expert of r]ᵀ, bf16, and the output of
every token that has no other row.

Layout
    C (P, I) and W2 (E, H, I) as A and B of grouped_gemm_fp8.py, rows in order; W2 may have any strides of scales.
    Rows by ``row_out`` (route_rows.py): {token, weight}: weight · y[r] is written to out[token], in fp32 up to the one
    rounding; {-1, 1}: y[r] is, for combine_rows.py to add up. With 8 of 256 experts chosen and 32 here, 37 % of the
    tokens have one row, and their y is neither written nor read again.
Tiles
    As grouped_gemm_fp8.py, without an index. Rows leave by ordinary stores of 128 bytes, since TMA stores only
    neighbouring rows: 64 store instructions of a warp for its 16 rows of 256 columns.
Cost
    2·P·H·I FLOP. Bytes: P·I + E·H·I + 2·P·H.
"""

from __future__ import annotations

import functools

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, on_device
from supersonic_moe.kernels.interface import Quantized
from supersonic_moe.kernels.sm90.gemm_config import BLOCK_M, BUFFER_BYTES, fp8_form
from supersonic_moe.kernels.sm90.operands import map_of_columns, map_of_rows, scaled_weight
from supersonic_moe.kernels.sm90.route_rows import Buffer

CONFIG = fp8_form(1, False, 4 * BUFFER_BYTES + 8 * BLOCK_M)
SPECS = (CONFIG.spec("down_projection_fp8", ("QGMMA", "UTMALDG", "USETMAXREG", "F2FP.BF16")),)


@functools.cache
def _kernel() -> Kernel:
    return Kernel(SPECS[0])


def down_projection_fp8(
    c: Quantized, w2_EHI: Quantized, expert_offsets: Tensor, row_out: Buffer, y_PH: Tensor, out_TH: Tensor
) -> None:
    """Writes the rows of ``y_PH`` that ``row_out`` does not send to ``out_TH``, and those that it does. Both bf16."""
    if y_PH.numel() == 0:
        return
    with on_device(y_PH):
        _kernel().launch(
            CONFIG.grid(y_PH.get_device()),
            map_a=map_of_rows(c.q, None, box=(BLOCK_M, CONFIG.block_k)),
            map_scale_a=map_of_columns(c.scale),
            **scaled_weight(w2_EHI, CONFIG),
            offsets=expert_offsets,
            row_out=row_out,
            y=y_PH,
            out=out_TH,
            row_bytes=out_TH.stride(0) * 2,
        )
