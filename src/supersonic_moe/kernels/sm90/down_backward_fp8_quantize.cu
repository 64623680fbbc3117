// down_backward_fp8.cu with FP8 outputs: dZ in e4m3 as it lies and transposed, s * A transposed, one scale for each tile of 128 x 128. See
// down_backward_fp8_quantize.py.
#include "epilogue/gated_backward_quantize.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::E4M3>;
#ifndef SAVED_INT8
#define SAVED_INT8 0
#endif
using Epilogue = GatedBackwardQuantized<CONFIG, Gate{static_cast<Act>(ACTIVATION), INTERLEAVED}, SAVED_INT8>;
static_assert(SAVED_FP8, "a slot is what one chunk stages");

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1) down_backward_fp8_quantize(
    const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_do_run, const __grid_constant__ TensorMap map_scale_do,
    const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_z, const __grid_constant__ TensorMap map_scale_z,
    const __grid_constant__ TensorMap map_scores, const __grid_constant__ TensorMap map_dz,
    const __grid_constant__ TensorMap map_dz_transposed, const __grid_constant__ TensorMap map_as_transposed, const i32* offsets,
    const i32* padded_offsets, const i32* index, const i32 experts, const i32 width, const i32 blocks_k, const float* scale_do,
    const i64 scale_do_row, const float* scale_w, const i64 scale_w_expert, const i32 scale_w_column, const i32 scale_w_k, const u16* b1,
    u8* dz, float* row_scales, const i64 row_scales_stride, float* dz_scales, const i64 dz_scales_stride, float* as_scales,
    const i64 as_scales_stride, float* dscores, const i32 rows_allocated, const i32 pow2, const float alpha, const float limit,
    const float up_offset, const i32* begin_block, const i32* end_block, const u32* arrived, const i32 parts) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES, Epilogue::STAGING_BYTES>();
    const SavedSlots<CONFIG, Epilogue::SAVED> slots{shared};
    slots.init_barriers();
    const RaggedGemm gemm{offsets, index, &map_do_run, experts, width, blocks_k};
    const auto produce = [&](u32) {
        const Scales<ColumnBlocksOf> scales{&map_scale_do, scale_do, scale_do_row, scale_w, scale_w_expert, scale_w_column, scale_w_k,
                                            {width}};
        const LoadSavedSlots<CONFIG, Epilogue::SAVED> saved{&map_z, &map_scale_z, &map_scores, width, 0, 1};
        load_tiles_with_saved<PAIR>(shared, slots, gemm, &map_do, &map_w, scales, saved, SCHEDULE);
    };
    run_roles(shared, produce, [&](u32 warp) {
        const Epilogue epilogue{shared, slots, {slots.empty(Epilogue::SLOTS)}, {alpha, limit, up_offset}, &map_dz, &map_dz_transposed,
                                &map_as_transposed, offsets, padded_offsets, b1, dz, row_scales, row_scales_stride, dz_scales,
                                dz_scales_stride, as_scales, as_scales_stride, dscores, rows_allocated, pow2, width, blocks_k,
                                warp / 4 - 1, warp};
        for_each_scaled_tile<Walk::Laps, false>(shared, warp, epilogue);
    });
}
