// Z[r] = X[r] * W1[expert of r]^T and A[r] = act(Z[r] + b1), e4m3 operands, A and if wanted Z quantized 1 x 128, for rows sorted by
// expert and gated activations. See up_projection_fp8.py.
#include "epilogue/gated_quantize.cuh"
#include "gemm/load_rows.cuh"
#include "gemm/roles.cuh"
#include "gemm/spec.cuh"
#include "gemm/tiles_fp8.cuh"

constexpr Config CONFIG = CONFIG_OF_SPEC<Operand::E4M3>;
constexpr Gate GATE{static_cast<Act>(ACTIVATION), INTERLEAVED};
#ifndef SAVED_INT8
#define SAVED_INT8 0
#endif
using Epilogue = GatedActivationQuantized<CONFIG, GATE, SAVED_INT8>;

extern "C" __global__ void __launch_bounds__(CONFIG.threads(), 1)
    up_projection_fp8(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_x_run,
                      const __grid_constant__ TensorMap map_scale_x, const __grid_constant__ TensorMap map_w,
                      const __grid_constant__ TensorMap map_z, const __grid_constant__ TensorMap map_a, const i32* offsets,
                      const i32* index, const i32 experts, const i32 width, const i32 blocks_k, const float* scale_x,
                      const i64 scale_x_row, const float* scale_w, const i64 scale_w_expert, const i32 scale_w_column,
                      const i32 scale_w_k, const u16* b1, u8* z, float* scale_z, u8* a, float* scale_a, const i64 z_row_bytes,
                      const i64 a_row_bytes, const i64 scale_stride, const i32 saved, const i32 pow2, const i32 gate_base,
                      const i32 up_base, const float alpha, const float limit, const float up_offset,
                      const i32* begin_block, const i32* end_block, const u32* arrived, const i32 parts) {
    const auto shared = shared_memory<CONFIG, SMEM_BYTES, Epilogue::STAGING_BYTES>();
    const RaggedGemm gemm{offsets, index, &map_x_run, experts, width, blocks_k};
    const auto produce = [&](u32) {
        const Scales<GateAndUpBlocks<GATE.interleaved>> scales{&map_scale_x,  scale_x,        scale_x_row, scale_w,
                                                               scale_w_expert, scale_w_column, scale_w_k,   {width, gate_base, up_base}};
        const auto load_b = [&] {
            if constexpr (CONFIG.cluster > 1 && !CONFIG.share_a) {
                return LoadGateAndUp<CONFIG>{&map_w, gate_base};
            } else {
                return LoadOwnGateAndUp<CONFIG>{&map_w, gate_base, up_base};
            }
        }();
        load_ragged_rows<Epilogue::WIDTH>(shared, gemm, &map_x, scales, load_b, NoTail{}, ReadyAtStart{}, SCHEDULE);
    };
    run_roles(shared, produce, [&](u32 warp) {
        const Epilogue epilogue{shared, &map_z, &map_a, b1, z, scale_z, a, scale_a, z_row_bytes, a_row_bytes, scale_stride, saved, pow2,
                                gate_base, up_base, width, blocks_k, {alpha, limit, up_offset}, warp};
        for_each_scaled_tile<Walk::Stages, GATE.interleaved>(shared, warp, epilogue);
    });
}
