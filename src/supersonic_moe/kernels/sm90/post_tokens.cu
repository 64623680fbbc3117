// The tokens of a rank to where the others read them: choices into every block, x into those of the ranks that have an expert of the token.
// See rank_tokens.py.
#include "exchange/flags.cuh"
#include "stream/chunk.cuh"

constexpr u32 POST_THREADS = 256, POST_WARPS = POST_THREADS / 32;
constexpr u32 LINE = 128;        // elements of x that share a scale
constexpr u32 PART_LINES = 16;   // of a row, that a warp takes at a time: eight lanes a line, four times

struct Choices {
    const void* ids;
    bool wide;  // 64-bit ids
    i32 num_experts;

    // -1 for none.
    DEVICE i32 expert(i64 slot) const {
        const i64 id = wide ? __ldg(static_cast<const i64*>(ids) + slot) : __ldg(static_cast<const i32*>(ids) + slot);
        return id >= 0 && id < num_experts ? static_cast<i32>(id) : -1;
    }
};

struct Posted {
    const void* x;  // (tokens, hidden) e4m3 with scales, or bf16
    const float* x_scale;
    i64 x_scale_row, x_scale_k;
    u64* const* blocks;  // of each rank: (ranks * places, hidden) codes and (ranks * places, hidden / 128) scales
    u64 codes_at, scales_at;
    i64 first_place;
    u32 lines;  // of a row
    bool x_bf16, pow2;

    DEVICE u8* codes(u32 rank) const { return reinterpret_cast<u8*>(blocks[rank]) + codes_at + first_place * lines * LINE; }
    DEVICE float* scales(u32 rank) const {
        return reinterpret_cast<float*>(reinterpret_cast<u8*>(blocks[rank]) + scales_at) + first_place * lines;
    }

    // A warp: lines `first` and on of a token, to the ranks of a mask.
    DEVICE void copy_part(u32 token, u32 first, u32 ranks) const {
        const u32 lane = lane_index();
        const i64 row = static_cast<i64>(token) * lines;
        uint4 chunks[PART_LINES / 4] = {};
        float scale[PART_LINES / 4] = {};
#pragma unroll
        for (u32 i = 0; i < PART_LINES / 4; ++i) {
            const u32 line = first + 4 * i + lane / 8;
            const i64 at = (row + line) * LINE + lane % 8 * 16;
            if (x_bf16) {
                uint4 halves[2] = {};
                if (line < lines) {
                    const u16* const from = static_cast<const u16*>(x) + at;
                    halves[0] = load_chunk(from), halves[1] = load_chunk(from + 8);
                }
                chunks[i] = quantize_chunk(halves[0], halves[1], pow2, scale[i]);
            } else if (line < lines) {
                chunks[i] = load_chunk(static_cast<const u8*>(x) + at);
                scale[i] = __ldg(x_scale + token * x_scale_row + line * x_scale_k);
            }
        }
        for (; ranks != 0; ranks &= ranks - 1) {
            const u32 rank = __ffs(static_cast<i32>(ranks)) - 1;
#pragma unroll
            for (u32 i = 0; i < PART_LINES / 4; ++i) {
                const u32 line = first + 4 * i + lane / 8;
                if (line >= lines) continue;
                *reinterpret_cast<uint4*>(codes(rank) + (row + line) * LINE + lane % 8 * 16) = chunks[i];
                if (lane % 8 == 0) scales(rank)[row + line] = scale[i];
            }
        }
    }
};

// Counts the blocks that have come here; true in the last of `blocks`, which then is alone and leaves the counter at zero.
DEVICE bool is_last(u32* counter, u32 blocks) {
    __threadfence_system();  // what this block has written, in other GPUs too
    const bool last = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence_system();  // and what the others have
    return last;
}

// A new exchange of three epochs (choices, x, parts): the first `choice_blocks` blocks write choices, the rest x. Places without a token get
// -1. Ends when the choices of all are here.
extern "C" __global__ void __launch_bounds__(POST_THREADS, 2)
    post_tokens(u64** words, const i32 rank, const i32 ranks, const i64 limit_ns, const i32 call, const i32 phase, u64* host, u64* state,
                u32* arrived, const void* x, const i32 x_bf16, const float* x_scale, const i64 x_scale_row, const i64 x_scale_k, const void* ids, const i32 wide, const float* weights, const i32 tokens, const i32 places,
                const i32 hidden, const i32 choices, const i32 num_experts, const i32 choice_blocks, const u64 codes_at,
                const u64 scales_at, const u64 ids_at, const u64 weights_at, const i32 pow2) {
    const Wait flags{words, rank, ranks, limit_ns, call, phase, host};
    const u64 of_choices = state[0] + 1, of_x = of_choices + 1, of_parts = of_x + 1;
    const u32 slots = places * choices, used = tokens * choices, experts_here = num_experts / ranks;
    const Choices chosen = {ids, wide != 0, num_experts};
    if (blockIdx.x < choice_blocks) {
        const u32 step = choice_blocks * POST_THREADS;
        for (u32 i = blockIdx.x * POST_THREADS + threadIdx.x; i < ranks * slots; i += step) {
            const u32 slot = i % slots;
            u8* const block = reinterpret_cast<u8*>(words[i / slots]);
            const i64 at = static_cast<i64>(rank) * slots + slot;
            reinterpret_cast<i32*>(block + ids_at)[at] = slot < used ? chosen.expert(slot) : -1;
            reinterpret_cast<float*>(block + weights_at)[at] = slot < used ? __ldg(weights + slot) : 0.0f;
        }
        __syncthreads();
        if (threadIdx.x == 0 && is_last(arrived, choice_blocks)) tell_written(flags, of_choices);
    } else {
        const u32 lines = hidden / LINE, parts = (lines + PART_LINES - 1) / PART_LINES, lane = lane_index();
        const Posted posted = {x, x_scale, x_scale_row, x_scale_k, words, codes_at, scales_at, static_cast<i64>(rank) * places, lines,
                               x_bf16 != 0, pow2 != 0};
        const u32 warps = (gridDim.x - choice_blocks) * POST_WARPS;
        for (u32 unit = (blockIdx.x - choice_blocks) * POST_WARPS + threadIdx.x / 32; unit < tokens * parts; unit += warps) {
            const u32 token = unit / parts;
            const i32 expert = lane < choices ? chosen.expert(static_cast<i64>(token) * choices + lane) : -1;
            const u32 needed = __reduce_or_sync(0xffffffffu, expert >= 0 ? 1u << static_cast<u32>(expert) / experts_here : 0u);
            posted.copy_part(token, unit % parts * PART_LINES, needed);
        }
        __syncthreads();
    }
    // x is told last, so a rank whose x is there has told of its choices before. All blocks have read the state by then.
    if (threadIdx.x == 0 && is_last(arrived + 1, gridDim.x)) {
        tell_written(flags, of_x);
        state[0] = of_parts;
    }
    __syncwarp();
    if (blockIdx.x == 0 && threadIdx.x < 32) wait_for_written(flags, lanes_of_ranks(ranks), of_choices);
}
