// The layer of stream_experts.cu for tokens of several ranks, read where each rank has put them; outputs go into the memory of the rank
// that they are for. See stream_experts.py.
#include "stream/layer.cuh"

extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 1)
    stream_experts_ranks(const __grid_constant__ TensorMap map_w13, const __grid_constant__ TensorMap map_w13_narrow,
                         const __grid_constant__ TensorMap map_w2, const __grid_constant__ TensorMap map_w2_narrow, const int4* items,
                         const i32* row_slot, const i32* slot_row, const float* slot_weight, const i32 choices, const i32 hidden,
                         const i32 inter, const i32 routed, const i32 interleaved, const i32 gate_first, const float* w13_scale,
                         const float* w2_scale, const i64 plane_rows, u8* x_codes, float* x_code_scale, float* c, u8* c_codes,
                         float* c_scale, float* y, u32* counters, const i32 max_items, const float limit, const i32 pow2, u64** words,
                         const i32 rank, const i32 ranks, const i64 limit_ns, const i32 call, const i32 phase, u64* host,
                         const u64* state, const i32 left, const i32 places, const u64 codes_at, const u64 scales_at, const u64 out_at) {
    const Tokens tokens = {{words, rank, ranks, limit_ns, call, phase, host}, state[0] - left, places, hidden, codes_at, scales_at, out_at};
    const Problem problem = {items, row_slot, slot_row, slot_weight, ranks * places, choices, hidden, inter, routed, interleaved != 0,
                             gate_first != 0, tokens, nullptr, w13_scale, w2_scale, w13_scale, w2_scale,
                             {x_codes, x_code_scale, plane_rows}, c, {c_codes, c_scale, plane_rows}, y, counters, max_items, limit,
                             pow2 != 0, false};
    const WeightMaps wide = {&map_w13, &map_w2}, narrow = {&map_w13_narrow, &map_w2_narrow};
    stream_layer(problem, wide, narrow, wide, narrow);
}
