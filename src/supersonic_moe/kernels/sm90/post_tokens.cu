// The tokens of a rank to where all ranks read them: choices into every block, x into its own. See rank_tokens.py.
#include "exchange/flags.cuh"
#include "stream/chunk.cuh"

constexpr u32 POST_THREADS = 256, POST_WARPS = POST_THREADS / 32;
constexpr u32 LINE = 128;        // elements of x that share a scale
constexpr u32 PART_LINES = 16;   // of a row, that a warp takes at a time: eight lanes a line, four times

struct Posted {
    const void* x;  // (tokens, hidden) e4m3 with scales, or bf16
    const float* x_scale;
    i64 x_scale_row, x_scale_k;
    u8* codes;       // (places, hidden) of the own block
    float* scales;   // (places, hidden / 128)
    u32 lines;       // of a row
    bool x_bf16, pow2;

    // A warp: lines `first` and on of a token.
    DEVICE void copy_part(u32 token, u32 first) const {
        const u32 lane = lane_index();
        const i64 row = static_cast<i64>(token) * lines;
        if (!x_bf16) {
            if (lane < PART_LINES && first + lane < lines)
                scales[row + first + lane] = __ldg(x_scale + token * x_scale_row + (first + lane) * x_scale_k);
        }
#pragma unroll
        for (u32 i = 0; i < PART_LINES / 4; ++i) {
            const u32 line = first + 4 * i + lane / 8;
            const i64 at = (row + line) * LINE + lane % 8 * 16;
            uint4 chunk = {};
            if (x_bf16) {
                uint4 halves[2] = {};
                if (line < lines) {
                    const u16* const from = static_cast<const u16*>(x) + at;
                    halves[0] = load_chunk(from), halves[1] = load_chunk(from + 8);
                }
                float scale;
                chunk = quantize_chunk(halves[0], halves[1], pow2, scale);
                if (line < lines && lane % 8 == 0) scales[row + line] = scale;
            } else if (line < lines) {
                chunk = load_chunk(static_cast<const u8*>(x) + at);
            }
            if (line < lines) *reinterpret_cast<uint4*>(codes + at) = chunk;
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

// `state[0]`: the last epoch of this exchange; choices belong to the one two before, x to the one before. The first `choice_blocks` blocks
// write choices; places without a token get -1.
extern "C" __global__ void __launch_bounds__(POST_THREADS, 2)
    post_tokens(u64** words, const i32 rank, const i32 ranks, const u64* state, u32* arrived, const void* x, const i32 x_bf16,
                const float* x_scale, const i64 x_scale_row, const i64 x_scale_k, const void* ids, const i32 wide, const float* weights,
                const i32 tokens, const i32 places, const i32 hidden, const i32 choices, const i32 num_experts, const i32 choice_blocks,
                const u64 codes_at, const u64 scales_at, const u64 ids_at, const u64 weights_at, const i32 pow2) {
    const u32 slots = places * choices, used = tokens * choices;
    if (blockIdx.x < choice_blocks) {
        const u32 step = choice_blocks * POST_THREADS;
        for (u32 i = blockIdx.x * POST_THREADS + threadIdx.x; i < ranks * slots; i += step) {
            const u32 slot = i % slots;
            u8* const block = reinterpret_cast<u8*>(words[i / slots]);
            i64 id = -1;
            if (slot < used) id = wide ? __ldg(static_cast<const i64*>(ids) + slot) : __ldg(static_cast<const i32*>(ids) + slot);
            const i64 at = static_cast<i64>(rank) * slots + slot;
            reinterpret_cast<i32*>(block + ids_at)[at] = id >= 0 && id < num_experts ? static_cast<i32>(id) : -1;
            reinterpret_cast<float*>(block + weights_at)[at] = slot < used ? __ldg(weights + slot) : 0.0f;
        }
        __syncthreads();
        if (threadIdx.x == 0 && is_last(arrived, choice_blocks)) tell_written(words, rank, ranks, state[0] - 2 << 32);
    } else {
        u8* const own = reinterpret_cast<u8*>(words[rank]);
        const u32 lines = hidden / LINE, parts = (lines + PART_LINES - 1) / PART_LINES;
        const Posted posted = {x, x_scale, x_scale_row, x_scale_k, own + codes_at, reinterpret_cast<float*>(own + scales_at), lines,
                               x_bf16 != 0, pow2 != 0};
        const u32 warps = (gridDim.x - choice_blocks) * POST_WARPS;
        for (u32 unit = (blockIdx.x - choice_blocks) * POST_WARPS + threadIdx.x / 32; unit < tokens * parts; unit += warps)
            posted.copy_part(unit / parts, unit % parts * PART_LINES);
        __syncthreads();
    }
    // x is told last, so a rank whose x is there has told of its choices before.
    if (threadIdx.x == 0 && is_last(arrived + 1, gridDim.x)) tell_written(words, rank, ranks, state[0] - 1 << 32);
}
