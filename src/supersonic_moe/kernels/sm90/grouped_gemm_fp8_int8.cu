// D[r] = A[r] * B[expert of r] for rows sorted by expert, e4m3 with block scales, D in int8. See grouped_gemm_fp8_int8.py.
#include "epilogue/deferred_int8_store.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::E4M3>;
using Epilogue = DeferredInt8Store<CONFIG>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    grouped_gemm_fp8_int8(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_scale_a,
                          const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d, const i32* offsets,
                          const i32 experts, const i32 columns, const i32 blocks_k, const float* scale_b, const i64 scale_b_expert,
                          const i32 scale_b_column, const i32 scale_b_k, u8* d, const i64 d_row_bytes, u32* words, const i64 words_row) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES, Epilogue::STAGING_BYTES>();
    const auto produce = [&](u32) {
        const RaggedGemm gemm{offsets, nullptr, nullptr, experts, columns, blocks_k};
        const Scales<ColumnBlocksOf> scales{&map_scale_a, nullptr, 0, scale_b, scale_b_expert, scale_b_column, scale_b_k, {columns}};
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_a, scales, LoadOwnWeight{&map_b}, NoTail{});
    };
    run_roles(shared, produce, [&](u32 warp) { Epilogue{shared, &map_d, {d, d_row_bytes, columns}, words, words_row, warp}.run(); });
}
