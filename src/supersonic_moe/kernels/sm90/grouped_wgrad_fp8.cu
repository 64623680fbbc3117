// D[e] = or += A[:, positions of e] * B[:, positions of e]^T, or its transpose, e4m3 operands with block scales, bf16 or fp32 output.
// See grouped_wgrad_fp8.py.
#include "epilogue/deferred_weight_gradient.cuh"
#include "gemm/load_depth_fp8.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::E4M3>;
using Epilogue = DeferredWeightGradient<CONFIG, FP32>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    grouped_wgrad_fp8(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_scale_a,
                      const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d, const i32* offsets,
                      const i32* source, const i32 experts, const i32 rows, const i32 columns, const float* scale_b, const i64 scale_b_column, const i64 scale_b_k,
                      const i32 adds, const i32 transposed) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES, Epilogue::STAGING_BYTES>();
    const auto produce = [&](u32 warp) {
        if (warp > 0) return;
        const ScaledDepthGemm gemm{offsets, source, experts, rows, columns, scale_b, scale_b_column, scale_b_k};
        load_scaled_depth(shared, gemm, &map_a, &map_scale_a, &map_b, FP32 && adds);
    };
    run_roles(shared, produce, [&](u32 warp) { Epilogue{shared, {&map_d, FP32 && adds, transposed != 0}, warp / 4 - 1, warp}.run(rows); });
}
