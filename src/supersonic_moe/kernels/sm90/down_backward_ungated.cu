// dA[r] = dO[r] * W2[expert of r], and in the epilogue the backward of a squared ReLU. See down_backward_ungated.py.
#include "epilogue/ungated_backward.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::BF16>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    down_backward_ungated(const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_do_run,
                          const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_z,
                          const __grid_constant__ TensorMap map_dz, const __grid_constant__ TensorMap map_as, const i32* offsets,
                          const i32* index, const i32 experts, const i32 width, const i32 blocks_k, const u16* b1, const float* scores,
                          u8* dz, u8* as, float* dscores, const i32 rows_allocated) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_do_run, experts, width, blocks_k};
    const auto produce = [&](u32) {
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_do, Unscaled{}, LoadWeight<CONFIG, true>{&map_w},
                                         LoadUngatedIntoRing<CONFIG>{shared, &map_z, width});
    };
    const UngatedBackward<CONFIG> epilogue{&map_dz, &map_as, dz, as, b1, scores, dscores, rows_allocated, width};
    run_roles(shared, produce, [&](u32 warp) { for_each_tile<Major::MN>(shared, warp, FixedDepth{blocks_k}, epilogue); });
}
