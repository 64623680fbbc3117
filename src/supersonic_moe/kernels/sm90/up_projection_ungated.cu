// Z[r] = X[r] * W1[expert of r]^T and A[r] = relu(Z[r] + b1)^2, for rows sorted by expert. See up_projection_ungated.py.
#include "epilogue/ungated.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::BF16>;
using Epilogue = UngatedActivation<CONFIG>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    up_projection_ungated(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_x_run,
                          const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_z,
                          const __grid_constant__ TensorMap map_a, const i32* offsets, const i32* index, const i32 experts,
                          const i32 width, const i32 blocks_k, u8* z, u8* a, const u16* b1) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_x_run, experts, width, blocks_k};
    const Epilogue epilogue{&map_z, &map_a, z, a, b1, width, Epilogue::stages_used(z)};
    const auto produce = [&](u32) {
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_x, Unscaled{}, LoadWeight<CONFIG, false>{&map_w},
                                         OfferStages<CONFIG>{shared, epilogue.used});
    };
    run_roles(shared, produce, [&](u32 warp) { for_each_tile<Major::K>(shared, warp, FixedDepth{blocks_k}, epilogue); });
}
