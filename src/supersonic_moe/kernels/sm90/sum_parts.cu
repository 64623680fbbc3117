// What the ranks have made of this rank's tokens, added in order of ranks. See rank_tokens.py.
#include "exchange/flags.cuh"

constexpr u32 SUM_THREADS = 128, CHANNELS = 8, UNIT = SUM_THREADS * CHANNELS;

// Tells the others that this rank's parts are written, waits for theirs, and adds those of the ranks that have an expert of the token, in
// fp32 and rounded once. `accumulate`: what `out` holds is added to the rounded sum.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    sum_parts(u64** words, const i32 rank, const i32 ranks, const i64 limit_ns, const i32 call, const i32 phase, u64* host,
              const u64* state, const void* ids, const i32 wide, const i32 tokens, const i32 places, const i32 hidden, const i32 choices,
              const i32 num_experts, const i32 experts_here, const u64 parts_at, u16* out, const i32 accumulate) {
    const Wait flags{words, rank, ranks, limit_ns, call, phase, host};
    const u64 epoch = state[0];
    if (blockIdx.x == 0 && threadIdx.x == 0) tell_written(flags, epoch);
    if (threadIdx.x < 32) wait_for_written(flags, lanes_of_ranks(ranks), epoch);
    __syncthreads();
    const u16* const parts = reinterpret_cast<const u16*>(reinterpret_cast<const u8*>(words[rank]) + parts_at);
    const u32 lane = lane_index(), units_of_token = (hidden + UNIT - 1) / UNIT;
    for (u32 unit = blockIdx.x; unit < tokens * units_of_token; unit += gridDim.x) {
        const u32 token = unit / units_of_token, column = unit % units_of_token * UNIT + threadIdx.x * CHANNELS;
        i64 id = -1;
        const i64 slot = static_cast<i64>(token) * choices + lane;
        if (lane < choices) id = wide ? __ldg(static_cast<const i64*>(ids) + slot) : __ldg(static_cast<const i32*>(ids) + slot);
        const bool has_expert = id >= 0 && id < num_experts;
        u32 needed = __reduce_or_sync(0xffffffffu, has_expert ? 1u << static_cast<u32>(id) / static_cast<u32>(experts_here) : 0u);
        if (column >= hidden) continue;
        float sum[CHANNELS] = {};
        for (; needed != 0; needed &= needed - 1) {
            const i64 row = static_cast<i64>(__ffs(static_cast<i32>(needed)) - 1) * places + token;
            const uint4 part = *reinterpret_cast<const uint4*>(parts + row * hidden + column);
            const u32 pairs[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
            for (u32 i = 0; i < 4; ++i) sum[2 * i] += bf16_low(pairs[i]), sum[2 * i + 1] += bf16_high(pairs[i]);
        }
        u32 rounded[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) rounded[i] = pack_bf16(sum[2 * i], sum[2 * i + 1]);
        uint4* const to = reinterpret_cast<uint4*>(out + static_cast<i64>(token) * hidden + column);
        if (accumulate) {
            const uint4 before = *to;
            const u32 held[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                rounded[i] = pack_bf16(bf16_low(held[i]) + bf16_low(rounded[i]), bf16_high(held[i]) + bf16_high(rounded[i]));
        }
        *to = make_uint4(rounded[0], rounded[1], rounded[2], rounded[3]);
    }
}
