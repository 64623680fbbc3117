// D[r] = A[r] * B[expert of r] for rows sorted by expert, e4m3 with block scales. See grouped_gemm_fp8.py for layout, maths, bytes and
// FLOPs.
#include "epilogue/deferred_store.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles_fp8.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::E4M3>;
using Epilogue = DeferredStore<CONFIG>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    grouped_gemm_fp8(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_a_run,
                     const __grid_constant__ TensorMap map_scale_a, const __grid_constant__ TensorMap map_b,
                     const __grid_constant__ TensorMap map_d, const i32* offsets, const i32* index, const i32 experts, const i32 columns,
                     const i32 blocks_k, const float* scale_a, const i64 scale_a_row, const float* scale_b, const i64 scale_b_expert,
                     const i32 scale_b_column, const i32 scale_b_k, u8* d, const i64 d_row_bytes, const i32* begin_block, const i32* end_block,
                     const u32* arrived, const i32 parts) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES, Epilogue::STAGING_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_a_run, experts, columns, blocks_k};
    const auto produce = [&](u32) {
        const Scales<ColumnBlocksOf> scales{&map_scale_a, scale_a, scale_a_row, scale_b, scale_b_expert, scale_b_column, scale_b_k,
                                            {columns}};
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_a, scales, LoadOwnWeight{&map_b}, NoTail{}, ReadyAtStart{}, SCHEDULE);
    };
    run_roles(shared, produce, [&](u32 warp) {
        const Epilogue epilogue{shared, &map_d, {d, d_row_bytes, columns}, blocks_k, warp};
        for_each_scaled_tile<Walk::Stages, false>(shared, warp, epilogue);
    });
}
