// Each token's weighted sum of its rows, choice by choice in ascending order, but for tokens of one row. See combine_rows.py.
#include "ptx/barrier.cuh"

constexpr u32 combine_threads = 128, channels = 8, chunks = 4;  // a thread adds `channels` neighbours, so often, a block's width apart
constexpr u32 chunk_channels = combine_threads * channels, unit_channels = chunks * chunk_channels;

struct Sums {
    float v[chunks][channels] = {};

    // Adds weight times this thread's channels of a row; `left`: how many the row has from its first on.
    DEVICE void add(const u16* row, float weight, i32 left) {
        uint4 loaded[chunks];
#pragma unroll
        for (u32 c = 0; c < chunks; ++c)
            if (static_cast<i32>(c * chunk_channels) < left) loaded[c] = *reinterpret_cast<const uint4*>(row + c * chunk_channels);
#pragma unroll
        for (u32 c = 0; c < chunks; ++c) {
            if (static_cast<i32>(c * chunk_channels) >= left) continue;
            const u32 words[4] = {loaded[c].x, loaded[c].y, loaded[c].z, loaded[c].w};
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                v[c][2 * i] = __fmaf_rn(weight, bf16_low(words[i]), v[c][2 * i]);
                v[c][2 * i + 1] = __fmaf_rn(weight, bf16_high(words[i]), v[c][2 * i + 1]);
            }
        }
    }
    DEVICE void store(u16* row, i32 left) const {
#pragma unroll
        for (u32 c = 0; c < chunks; ++c)
            if (static_cast<i32>(c * chunk_channels) < left)
                *reinterpret_cast<uint4*>(row + c * chunk_channels) = make_uint4(
                    pack_bf16(v[c][0], v[c][1]), pack_bf16(v[c][2], v[c][3]), pack_bf16(v[c][4], v[c][5]), pack_bf16(v[c][6], v[c][7]));
    }
};

// The rows of a shared expert, the last choice of every token, are in
// `y_shared` (tokens, hidden), where that is not null. A unit is `unit_channels` of a token, of which a lane has looked up one choice.
extern "C" __global__ void __launch_bounds__(combine_threads)
    combine_rows(const u16* y, const u16* y_shared, const i32* slot_row, const float* weights, const i32 choices,
                 const i32 hidden, const i32 parts, const i32 tokens, u16* out) {
    dependency_wait();
    const i32 lane = static_cast<i32>(lane_index());
    for (i64 unit = blockIdx.x; unit < static_cast<i64>(tokens) * parts; unit += gridDim.x) {
        const i64 token = unit / parts;
        const i32 first = static_cast<i32>(unit % parts) * static_cast<i32>(unit_channels) + static_cast<i32>(threadIdx.x * channels);
        const i32 left = hidden - first;
        const i32 row = lane < choices ? slot_row[token * choices + lane] : -1;
        const float weight = lane < choices ? weights[token * choices + lane] : 0.0f;
        u32 present = __ballot_sync(0xffffffffu, row >= 0);
        if (!y_shared && __popc(present) == 1) continue;  // the down-projection has written it
        if (y_shared) present &= ~(1u << (choices - 1));
        Sums sums;
        for (; present != 0; present &= present - 1) {
            const i32 choice = __ffs(static_cast<i32>(present)) - 1;
            const i64 of_choice = __shfl_sync(0xffffffffu, row, choice);
            sums.add(y + of_choice * hidden + first, __shfl_sync(0xffffffffu, weight, choice), left);
        }
        if (y_shared) sums.add(y_shared + token * hidden + first, 1.0f, left);
        sums.store(out + token * hidden + first, left);
    }
}
