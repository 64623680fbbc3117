// D[r] = A[r] * B[expert of r] for rows sorted by expert, bf16. See grouped_gemm.py for layout, maths, bytes and FLOPs.
#include "epilogue/store.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::BF16>;
using Epilogue = Store<CONFIG>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    grouped_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_a_run,
                 const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d, const i32* offsets, const i32* index,
                 const i32 experts, const i32 columns, const i32 blocks_k, u8* d, const i64 d_row_bytes, const i32* begin_block, const i32* end_block,
                 const u32* arrived, const i32 parts) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_a_run, experts, columns, blocks_k};
    const auto produce = [&](u32) {
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_a, Unscaled{}, LoadWeight<CONFIG, B_MN_MAJOR>{&map_b},
                                         OfferStages<CONFIG>{shared, Epilogue::STAGES_USED}, ReadyAtStart{}, SCHEDULE);
    };
    run_roles(shared, produce, [&](u32 warp) {
        for_each_tile<B_MN_MAJOR ? Major::MN : Major::K>(shared, warp, FixedDepth{blocks_k}, Epilogue{&map_d, {d, d_row_bytes, columns}});
    });
}
