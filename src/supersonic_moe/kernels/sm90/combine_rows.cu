// Each token's weighted sum of its rows, choice by choice in ascending order. See combine_rows.py.
#include "ptx/barrier.cuh"

constexpr u32 combine_threads = 128, channels = 8;  // of a thread

struct EightChannels {
    float v[channels];
};

DEVICE EightChannels load_channels(const float* at) {
    const float4 a = *reinterpret_cast<const float4*>(at), b = *reinterpret_cast<const float4*>(at + 4);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}
DEVICE EightChannels load_channels(const u16* at) {
    const uint4 a = *reinterpret_cast<const uint4*>(at);
    return {bf16_low(a.x), bf16_high(a.x), bf16_low(a.y), bf16_high(a.y), bf16_low(a.z), bf16_high(a.z), bf16_low(a.w), bf16_high(a.w)};
}

template <typename T>
DEVICE void add_rows(float (&sum)[channels], const T* y, const i32* slot_row, const float* weights, i32 choices, i32 hidden, i32 column) {
    for (i32 j = 0; j < choices; ++j) {
        const i32 row = slot_row[j];
        if (row < 0) continue;
        const float weight = weights[j];
        const EightChannels values = load_channels(y + static_cast<i64>(row) * hidden + column);
#pragma unroll
        for (u32 i = 0; i < channels; ++i) sum[i] = __fmaf_rn(weight, values.v[i], sum[i]);
    }
}

// The header of `items` says whether rows were streamed. If not, the rows of a shared expert, the last choice of every token, are in
// `y_shared` (tokens, hidden), where that is not null.
extern "C" __global__ void __launch_bounds__(combine_threads)
    combine_rows(const float* streamed, const u16* y, const u16* y_shared, const int4* items, const i32* slot_row, const float* weights,
                 const i32 choices, const i32 hidden, const i32 parts, u16* out) {
    const i64 token = blockIdx.x / parts;
    const i32 column = (blockIdx.x % parts * combine_threads + threadIdx.x) * channels;
    dependency_wait();
    if (column >= hidden) return;
    float sum[channels] = {};
    const i32* const rows = slot_row + token * choices;
    if (items[0].w) {
        add_rows(sum, streamed, rows, weights + token * choices, choices, hidden, column);
    } else {
        add_rows(sum, y, rows, weights + token * choices, choices - (y_shared != nullptr), hidden, column);
        if (y_shared) {
            const EightChannels values = load_channels(y_shared + token * hidden + column);
#pragma unroll
            for (u32 i = 0; i < channels; ++i) sum[i] += values.v[i];
        }
    }
    *reinterpret_cast<uint4*>(out + token * hidden + column) =
        make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}
