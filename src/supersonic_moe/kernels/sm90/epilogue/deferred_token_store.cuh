// Store of a down-projection's tile in bf16 behind the FP8 loop (gemm/tiles_fp8.cuh): the row of a token that has no other, times its
// weight, is the token's output; other rows go to y, to be added up. The tile waits in registers, and in shared memory where its rows go,
// until the first product of the next one is in flight; then they pass through staging buffers of their own, and leave by ordinary
// stores: TMA writes neighbouring rows only.
#pragma once
#include "epilogue/staging.cuh"
#include "gemm/scales.cuh"

// Where rows go: `of_row[r]` is {token, weight} for out, or {-1, 1} for y. Both have rows of `row_bytes`.
struct TokenRows {
    const int2* of_row;
    u8 *y, *out;
    i64 row_bytes;
    i32 columns;
};

template <Config C>
struct DeferredTokenStore {
    static constexpr u32 BUFFERS = (C.block_n + 63) / 64, TARGETS = BUFFERS * C.buffer_bytes();
    static constexpr u32 STAGING_BYTES = TARGETS + C.block_m * 8;
    static constexpr bool RUNS_WITHOUT_ROWS = false;
    const SharedMemory<C> shared;
    TokenRows to;
    i32 blocks_k;
    u32 warp;
    WorkTile held{WorkTile::STOP_ROW, 0, 0, 0, 0};  // the tile in the accumulators

    DEVICE void skip(float (&)[C.accumulators()], const WorkTile&, Ring<C>& ring) const { skip_stages(shared, ring, blocks_k); }
    DEVICE void operator()(float (&)[C.accumulators()], const WorkTile& tile, Ring<C>&) {
        held = tile;
        const u32 lane = fresh_thread_index() % 32;
        const i32 row = tile.row + static_cast<i32>(first_line(warp) + lane);
        if (lane < WARP_ROWS && row < tile.row_end)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target(static_cast<u32>(row - tile.row))), "l"(to.of_row + row) : "memory");
    }
    // Where the {token, weight} of a line is.
    DEVICE u32 target(u32 line) const { return shared.staging() + TARGETS + line * 8; }
    DEVICE void finish(float (&acc)[C.accumulators()]) const { overlap(acc); }
    DEVICE void overlap(float (&acc)[C.accumulators()]) const {
        const u32 lane = fresh_thread_index() % 32, line = first_line(warp), lines = shared.staging() + line * LINE;
        const i32 row = held.row + static_cast<i32>(line), rows = held.row_end - row;
        if (held.row == WorkTile::STOP_ROW || rows <= 0) return;
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();  // targets are there, and the lines of the tile before have been read
        const u32 at = target(line + lane / 4) + 4;
        const float upper = load_scale(at), lower = load_scale(at + 8 * 8);
#pragma unroll
        for (u32 i = 0; i < C.accumulators(); i += 4) acc[i] *= upper, acc[i + 1] *= upper, acc[i + 2] *= lower, acc[i + 3] *= lower;
#pragma unroll
        for (u32 i = 0; i < BUFFERS; ++i) stage_bf16(acc + i * 32, lines + i * C.buffer_bytes(), lane);
        __syncwarp();
#pragma unroll
        for (u32 part = 0; part < WARP_ROWS / 4; ++part) {
            const u32 own = part * 4 + lane / 8, chunk = lane % 8;
            if (static_cast<i32>(own) >= rows) continue;
            const i32 token = __float_as_int(load_scale(target(line + own)));
            u8* const of_row = token < 0 ? to.y + (row + static_cast<i32>(own)) * to.row_bytes : to.out + token * to.row_bytes;
#pragma unroll
            for (u32 i = 0; i < BUFFERS; ++i) {
                const i32 column = held.column + static_cast<i32>(i * 64 + chunk * 8);
                if (column < to.columns) copy_chunk(of_row + column * 2, lines + i * C.buffer_bytes() + swizzle<LINE>(own * LINE + chunk * 16));
            }
        }
    }
    DEVICE static void copy_chunk(u8* to, u32 from) {
        u32 v[4];
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from) : "memory");
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
    }
};
