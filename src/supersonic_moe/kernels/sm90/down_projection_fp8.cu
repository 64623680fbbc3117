// y[r] = C[r] * W2[expert of r]^T in e4m3 with block scales, straight to its token where that has no other row. See down_projection_fp8.py.
#include "epilogue/deferred_token_store.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles_fp8.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::E4M3>;
using Epilogue = DeferredTokenStore<CONFIG>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    down_projection_fp8(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_scale_a,
                        const __grid_constant__ TensorMap map_b, const i32* offsets, const i32 experts, const i32 columns,
                        const i32 blocks_k, const float* scale_b, const i64 scale_b_expert, const i32 scale_b_column, const i32 scale_b_k,
                        const int2* row_out, u8* y, u8* out, const i64 row_bytes) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES, Epilogue::STAGING_BYTES>();
    const RaggedGemm gemm{offsets, nullptr, nullptr, experts, columns, blocks_k};
    const auto produce = [&](u32) {
        const Scales<ColumnBlocksOf> scales{&map_scale_a, nullptr, 0, scale_b, scale_b_expert, scale_b_column, scale_b_k, {columns}};
        const auto load_b = [&] {
            if constexpr (CONFIG.cluster > 1 && !CONFIG.share_a) {
                return LoadWeight<CONFIG, false>{&map_b};
            } else {
                return LoadOwnWeight{&map_b};
            }
        }();
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_a, scales, load_b, NoTail{});
    };
    run_roles(shared, produce, [&](u32 warp) {
        const Epilogue epilogue{shared, {row_out, y, out, row_bytes, columns}, blocks_k, warp};
        for_each_scaled_tile<Walk::Stages, false>(shared, warp, epilogue);
    });
}
