"""Kernels for sm_90a in CUDA C++: `name.cu` composes one of the parts in `ptx/`, `gemm/` and `epilogue/`, `name.py`
beside it is its configuration and launch. `gemm_config.py` says in which forms a GEMM is compiled and chooses one.
"""

from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.kernels.sm90 import launch_probe, self_test


def registered_specs() -> tuple[KernelSpec, ...]:
    """Every kernel configuration that the package may launch: what `warmup` compiles and the tests inspect."""
    from supersonic_moe.kernels.sm90 import (  # need triton
        combine_rows,
        down_backward,
        down_backward_fp8,
        down_backward_fp8_quantize,
        down_backward_ungated,
        down_projection_fp8,
        exchange_flags,
        grouped_gemm,
        grouped_gemm_fp8,
        grouped_wgrad,
        grouped_wgrad_fp8,
        quantize_columns,
        rank_tokens,
        route_rows,
        stream_experts,
        up_projection,
        up_projection_fp8,
        up_projection_ungated,
    )

    return (
        *self_test.SPECS,
        *launch_probe.SPECS,
        *grouped_gemm.SPECS,
        *grouped_gemm_fp8.SPECS,
        *grouped_wgrad.SPECS,
        *grouped_wgrad_fp8.SPECS,
        *up_projection.SPECS,
        *up_projection_ungated.SPECS,
        *up_projection_fp8.SPECS,
        *down_backward.SPECS,
        *down_backward_ungated.SPECS,
        *down_backward_fp8.SPECS,
        *down_backward_fp8_quantize.SPECS,
        *quantize_columns.SPECS,
        *route_rows.SPECS,
        *stream_experts.SPECS,
        *down_projection_fp8.SPECS,
        *combine_rows.SPECS,
        *exchange_flags.SPECS,
        *rank_tokens.SPECS,
    )
