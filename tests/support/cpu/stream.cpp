// The streaming kernel on a CPU, a thread for each block.
#define SMEM_BYTES 232448
#define RANKS 0
#define __shared__ thread_local
#include <thread>

#include "stream/layer.cuh"

// W13 in boxes of `rows` lines, as map_of_pairs() makes them; `strides` of it, in bytes.
static TensorMap pairs(const u8* w13, i64 experts, i64 inter, i64 hidden, const i64* strides, i64 rows) {
    return {w13, {hidden, 8, 2, inter / 8, experts}, {1, strides[3], strides[2], strides[1], strides[0]}, {128, 8, 2, rows / 16, 1}};
}
static TensorMap of_w2(const u8* w2, i64 experts, i64 hidden, i64 inter, i64 rows) {
    return {w2, {inter, hidden, experts, 1, 1}, {1, inter, hidden * inter, 0, 0}, {128, rows, 1, 1, 1}};
}

extern "C" void stream(i32 blocks, const u8* w13, const u8* w2, const u8* shared_w13, const u8* shared_w2, const i64* strides,
                       const int4* items, const i32* row_slot, const i32* slot_row, const float* slot_weight, i32 tokens, i32 choices,
                       i32 shared_expert, i32 hidden, i32 inter, i32 routed, i32 interleaved, i32 gate_first, const void* x, i32 x_bf16,
                       const float* x_scale, i64 x_scale_row, i64 x_scale_k, const float* x_weight, const float* w13_scale,
                       const float* w2_scale, const float* shared_w13_scale, const float* shared_w2_scale, i64 plane_rows, u8* x_codes,
                       float* x_code_scale, float* c, u8* c_codes, float* c_scale, float* y, u16* out, u32* counters, i32 max_items,
                       float limit, i32 pow2) {
    const Problem problem = {items, row_slot, slot_row, slot_weight, tokens, choices, hidden, inter, routed, interleaved != 0,
                             gate_first != 0, {x, x_bf16 != 0, x_scale, x_scale_row, x_scale_k, out, tokens, hidden}, x_weight, w13_scale,
                             w2_scale, shared_w13_scale, shared_w2_scale, {x_codes, x_code_scale, plane_rows}, c,
                             {c_codes, c_scale, plane_rows}, y, counters, max_items, limit, pow2 != 0, shared_expert != 0};
    TensorMap maps[2][4];
    for (const i64 rows : {128, 64}) {
        TensorMap* const of = maps[rows == 64];
        of[0] = pairs(w13, routed, inter, hidden, strides, rows), of[1] = of_w2(w2, routed, hidden, inter, rows);
        of[2] = pairs(shared_w13, 1, inter, hidden, strides, rows), of[3] = of_w2(shared_w2, 1, hidden, inter, rows);
    }
    gridDim.x = blocks, blockDim.x = STREAM_THREADS;
    std::vector<std::thread> running_blocks;
    for (i32 i = 0; i < blocks; ++i)
        running_blocks.emplace_back([&, i] {
            blockIdx.x = i;
            std::memset(dynamic_shared_memory, 0x7f, sizeof dynamic_shared_memory);
            run_block(STREAM_THREADS, [&] {
                stream_layer(problem, {&maps[0][0], &maps[0][1]}, {&maps[1][0], &maps[1][1]}, {&maps[0][2], &maps[0][3]},
                             {&maps[1][2], &maps[1][3]});
            });
        });
    for (std::thread& block : running_blocks) block.join();
}
