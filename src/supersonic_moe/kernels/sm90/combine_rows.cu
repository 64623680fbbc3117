// Each token's weighted sum of its rows, choice by choice in ascending order, but for tokens of one row. See combine_rows.py.
#include "ptx/barrier.cuh"

constexpr u32 combine_threads = 128, channels = 8;  // of a thread

struct EightChannels {
    float v[channels];
};

DEVICE EightChannels load_channels(const u16* at) {
    const uint4 a = *reinterpret_cast<const uint4*>(at);
    return {bf16_low(a.x), bf16_high(a.x), bf16_low(a.y), bf16_high(a.y), bf16_low(a.z), bf16_high(a.z), bf16_low(a.w), bf16_high(a.w)};
}

DEVICE void combine_token(const u16* y, const u16* y_shared, const i32* rows, const float* weights, i64 token, i32 choices, i32 hidden,
                          i32 column, u16* out) {
    float sum[channels] = {};
    const i32 routed = choices - (y_shared != nullptr);
    i32 present = 0;
    for (i32 j = 0; j < choices; ++j) present += rows[j] >= 0;
    if (present == 1 && !y_shared) return;  // the down-projection has written it
    for (i32 j = 0; j < routed; ++j) {
        const i32 row = rows[j];
        if (row < 0) continue;
        const float weight = weights[j];
        const EightChannels values = load_channels(y + static_cast<i64>(row) * hidden + column);
#pragma unroll
        for (u32 i = 0; i < channels; ++i) sum[i] = __fmaf_rn(weight, values.v[i], sum[i]);
    }
    if (y_shared) {
        const EightChannels values = load_channels(y_shared + token * hidden + column);
#pragma unroll
        for (u32 i = 0; i < channels; ++i) sum[i] += values.v[i];
    }
    *reinterpret_cast<uint4*>(out + token * hidden + column) =
        make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}

// Nothing where the header of `items` says that rows are streamed. The rows of a shared expert, the last choice of every token, are in
// `y_shared` (tokens, hidden), where that is not null.
extern "C" __global__ void __launch_bounds__(combine_threads)
    combine_rows(const u16* y, const u16* y_shared, const int4* items, const i32* slot_row, const float* weights, const i32 choices,
                 const i32 hidden, const i32 parts, const i32 tokens, u16* out) {
    dependency_wait();
    if (items[0].w) return;
    for (i64 unit = blockIdx.x; unit < static_cast<i64>(tokens) * parts; unit += gridDim.x) {
        const i64 token = unit / parts;
        const i32 column = (static_cast<i32>(unit % parts) * combine_threads + threadIdx.x) * channels;
        if (column < hidden)
            combine_token(y, y_shared, slot_row + token * choices, weights + token * choices, token, choices, hidden, column, out);
    }
}
