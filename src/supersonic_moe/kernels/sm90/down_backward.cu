// dA[r] = dO[r] * W2[expert of r], and in the epilogue the backward of the activation. See down_backward.py.
#include "epilogue/gated_backward.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::BF16>;
constexpr Gate GATE{static_cast<Act>(ACTIVATION), INTERLEAVED};

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    down_backward(const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_do_run,
                  const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_z,
                  const __grid_constant__ TensorMap map_dz, const __grid_constant__ TensorMap map_as, const i32* offsets,
                  const i32* index, const i32 experts, const i32 width, const i32 blocks_k, const u16* b1, const float* scores, u8* dz,
                  u8* as, float* dscores, const i32 rows_allocated, const i32 gate_base, const i32 up_base, const float alpha,
                  const float limit, const float up_offset, const i32* begin_block, const i32* end_block, const u32* arrived, const i32 parts) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_do_run, experts, width, blocks_k};
    const i32 gate_half = gate_base > up_base, up_half = INTERLEAVED ? 0 : 1 - gate_half;
    const auto produce = [&](u32) {
        load_ragged_rows<CONFIG.block_n>(shared, gemm, &map_do, Unscaled{}, LoadWeight<CONFIG, B_MN_MAJOR>{&map_w},
                                         LoadSavedIntoRing<CONFIG, GATE>{shared, &map_z, width, gate_half, up_half}, ReadyAtStart{},
                                         SCHEDULE);
    };
    const GatedBackward<CONFIG, GATE> epilogue{{&map_dz, &map_as, dz, as, width, gate_base, up_base}, b1, scores, dscores, rows_allocated,
                                               width, gate_base, up_base, {alpha, limit, up_offset}};
    constexpr Major major = B_MN_MAJOR ? Major::MN : Major::K;
    run_roles(shared, produce, [&](u32 warp) { for_each_tile<major>(shared, warp, FixedDepth{blocks_k}, epilogue); });
}
