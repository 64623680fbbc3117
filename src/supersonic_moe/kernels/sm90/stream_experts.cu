// A Mixture-of-Experts layer for few rows an expert: weights stream through once. See stream_experts.py.
#include "stream/layer.cuh"

extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 1)
    stream_experts(const __grid_constant__ TensorMap map_w13, const __grid_constant__ TensorMap map_w13_narrow,
                   const __grid_constant__ TensorMap map_w2, const __grid_constant__ TensorMap map_w2_narrow,
                   const __grid_constant__ TensorMap map_shared_w13, const __grid_constant__ TensorMap map_shared_w13_narrow,
                   const __grid_constant__ TensorMap map_shared_w2, const __grid_constant__ TensorMap map_shared_w2_narrow,
                   const int4* items, const i32* row_slot, const i32* slot_row, const float* slot_weight, const i32 tokens,
                   const i32 choices, const i32 shared_expert, const i32 hidden, const i32 inter, const i32 routed, const i32 interleaved,
                   const i32 gate_first, const void* x, const i32 x_bf16, const float* x_scale, const i64 x_scale_row, const i64 x_scale_k,
                   const float* x_weight, const float* w13_scale, const float* w2_scale, const float* shared_w13_scale,
                   const float* shared_w2_scale, const i64 plane_rows, u8* x_codes, float* x_code_scale, float* c, u8* c_codes,
                   float* c_scale, float* y, u16* out, u32* counters, const i32 max_items, const float limit, const i32 pow2) {
    const Problem problem = {items, row_slot, slot_row, slot_weight, tokens, choices, hidden, inter, routed, interleaved != 0,
                             gate_first != 0, {x, x_bf16 != 0, x_scale, x_scale_row, x_scale_k, out, tokens, hidden}, x_weight, w13_scale,
                             w2_scale, shared_w13_scale, shared_w2_scale, {x_codes, x_code_scale, plane_rows}, c,
                             {c_codes, c_scale, plane_rows}, y, counters, max_items, limit, pow2 != 0, shared_expert != 0};
    stream_layer(problem, {&map_w13, &map_w2}, {&map_w13_narrow, &map_w2_narrow}, {&map_shared_w13, &map_shared_w2},
                 {&map_shared_w13_narrow, &map_shared_w2_narrow});
}
