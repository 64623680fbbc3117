// The last thing that the math warps of the streaming kernel do: each token's weighted sum of its rows of y, in fp32 and in ascending order
// of the choices. A warp takes 128 columns of as many tokens as have their slots in 32 lanes. A token without rows gets +0.
#pragma once
#include "stream/work.cuh"

constexpr u32 COMBINE_AHEAD = 8;  // rows of y that a lane has asked for

DEVICE void combine_tokens(const Problem& p, const Geometry& g) {
    const u32 lane = lane_index(), warp = threadIdx.x / 32, columns = p.blocks_hidden();
    const u32 each = 32 / p.choices, batches = (p.tokens + each - 1) / each;
    const i64 units = static_cast<i64>(batches) * columns;
    for (i64 unit = blockIdx.x + gridDim.x * warp; unit < units; unit += gridDim.x * MATH_WARPS) {
        const u32 block = unit % columns, first_token = unit / columns * each, tokens = min(each, p.tokens - first_token);
        i32 row = -1;
        float weight = 0.0f;
        if (lane < tokens * p.choices) {
            const i64 slot = static_cast<i64>(first_token) * p.choices + lane;
            row = p.slot_row[slot];
            if (row >= 0) weight = p.slot_weight[slot];
        }
        u32 wanted = __ballot_sync(0xffffffffu, row >= 0), held = wanted;  // rows to ask for, rows to add
        const u32 column = block * BLOCK_CHANNELS + 4 * lane;
        const float* const y = p.y + column;
        u16* out = p.out + static_cast<i64>(first_token) * p.hidden + column;

        wait_for_count(p.stored(block), 2 * g.items);
        float4 ahead[COMBINE_AHEAD];
        const auto ask = [&](float4& place) {
            const i64 of = __shfl_sync(0xffffffffu, row, __ffs(wanted) - 1 & 31);
            if (wanted) place = load_shared_by_blocks(reinterpret_cast<const float4*>(y + of * p.hidden));
            wanted &= wanted - 1;
        };
#pragma unroll
        for (u32 i = 0; i < COMBINE_AHEAD; ++i) ask(ahead[i]);
        u32 token = 0;
        float4 sum = {};
        const auto finish_until = [&](u32 next) {
            for (; token < next; ++token, out += p.hidden, sum = float4{})
                *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
        };
        while (held) {
#pragma unroll
            for (u32 i = 0; i < COMBINE_AHEAD; ++i) {
                if (!held) break;
                const u32 slot = __ffs(held) - 1;
                held &= held - 1;
                finish_until(slot / p.choices);
                const float w = __shfl_sync(0xffffffffu, weight, slot);
                sum.x = __fmaf_rn(w, ahead[i].x, sum.x), sum.y = __fmaf_rn(w, ahead[i].y, sum.y);
                sum.z = __fmaf_rn(w, ahead[i].z, sum.z), sum.w = __fmaf_rn(w, ahead[i].w, sum.w);
                ask(ahead[i]);
            }
        }
        finish_until(tokens);
    }
}
