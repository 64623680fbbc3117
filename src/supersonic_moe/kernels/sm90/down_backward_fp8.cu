// dA[r] = dO[r] * W2[expert of r] in e4m3 with block scales, and in the epilogue the backward of the activation. See
// down_backward_fp8.py.
#include "epilogue/gated_backward_fp8.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::E4M3>;
constexpr Gate GATE{static_cast<Act>(ACTIVATION), INTERLEAVED};
#ifndef SAVED_INT8
#define SAVED_INT8 0
#endif
constexpr SavedFormat SAVED{SAVED_FP8, INTERLEAVED, SAVED_INT8};
using Epilogue = GatedBackwardScaled<CONFIG, GATE, SAVED>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    down_backward_fp8(const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_do_run,
                      const __grid_constant__ TensorMap map_scale_do, const __grid_constant__ TensorMap map_w,
                      const __grid_constant__ TensorMap map_z, const __grid_constant__ TensorMap map_scale_z,
                      const __grid_constant__ TensorMap map_scores, const __grid_constant__ TensorMap map_dz,
                      const __grid_constant__ TensorMap map_as, const i32* offsets, const i32* index, const i32 experts, const i32 width,
                      const i32 blocks_k, const float* scale_do, const i64 scale_do_row, const float* scale_w, const i64 scale_w_expert,
                      const i32 scale_w_column, const i32 scale_w_k, const u16* b1, u8* dz, u8* as, float* dscores,
                      const i32 rows_allocated, const i32 gate_base, const i32 up_base, const float alpha, const float limit,
                      const float up_offset) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES, Epilogue::STAGING_BYTES>();
    const SavedSlots<CONFIG, SAVED> slots{shared};
    slots.init_barriers();
    const RaggedGemm gemm{offsets, index, &map_do_run, experts, width, blocks_k};
    const auto produce = [&](u32) {
        const Scales<ColumnBlocksOf> scales{&map_scale_do, scale_do, scale_do_row, scale_w, scale_w_expert, scale_w_column, scale_w_k,
                                            {width}};
        const LoadSavedSlots<CONFIG, SAVED> saved{&map_z, &map_scale_z, &map_scores, width, gate_base, up_base};
        load_tiles_with_saved<CHUNK>(shared, slots, gemm, &map_do, &map_w, scales, saved);
    };
    run_roles(shared, produce, [&](u32 warp) {
        const Epilogue epilogue{
            shared, slots, {alpha, limit, up_offset}, {&map_dz, &map_as, dz, as, width, gate_base, up_base}, b1, dscores,
            rows_allocated, width, gate_base, up_base, blocks_k, warp / 4 - 1, warp};
        for_each_scaled_tile<Walk::Laps, false>(shared, warp, epilogue);
    });
}
