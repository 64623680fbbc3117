// How a weight gradient leaves the accumulators, behind the bf16 loop or the FP8 one: through staging buffers, each with 64 columns
// (bf16) or 32 (fp32) of the tile, from there to D by TMA, which stores or adds. As D lies, each warp fills and stores its own 16 rows of
// a buffer; transposed, the 64 rows of a warpgroup make up the lines, so a warpgroup fills and stores together.
#pragma once
#include "epilogue/staging.cuh"

template <bool Fp32>
constexpr u32 BUFFER_COLUMNS = Fp32 ? 32 : 64;

// Where a gradient goes. `adds`: to D, in fp32 only, instead of storing; `transposed`: D is (E, N, M).
struct Gradient {
    const TensorMap* map;
    bool adds, transposed;
};

// 64 columns of a warpgroup's accumulators as 64 lines of 64 rows, bf16.
DEVICE void stage_bf16_transposed(float* acc, u32 lines, u32 thread) {
    const u32 warp = thread % 128 / 32, matrix = thread % 32 / 8;
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {  // 16 columns
        float* d = acc + part * 8;
        pin_four(d), pin_four(d + 4);
        const u32 matrices[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7])};
        const u32 line = part * 16 + matrix / 2 * 8 + thread % 8, chunk = warp * 2 + matrix % 2;
        store_matrices<true>(lines + swizzle<LINE>(line * LINE + chunk * 16), matrices);
    }
}

// 32 columns as lines of rows, fp32: 32 lines for the first 32 rows, then 32 for the others. A store instruction of a warp touches
// four lines at eight neighbouring places, which the swizzle spreads over all banks. It repeats every eight lines.
DEVICE void stage_f32_transposed(const float* acc, u32 lines, u32 thread) {
    const u32 warp = thread % 128 / 32, block = lines + warp / 2 * 32 * LINE, row = warp % 2 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 from = block + swizzle<LINE>((thread % 4 * 2 + i % 2) * LINE + (row + i / 2 * 8) * 4);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) asm volatile("st.shared.f32 [%0], %1;" ::"r"(from + j * 8 * LINE), "f"(acc[j * 4 + i]) : "memory");
    }
}

// First line of a buffer that math warp `warp` fills, or its warpgroup.
DEVICE u32 own_line(const Gradient& to, u32 warp) { return first_line(to.transposed ? warp / 4 * 4 : warp); }

// All who fill lines together have come this far.
DEVICE void sync_writers(const Gradient& to, u32 group) { to.transposed ? sync_warpgroup(group) : __syncwarp(); }

// `body` in the one of them that issues their stores. Two branches: as one condition, each TMA instruction becomes a loop over lanes.
template <typename Body>
DEVICE void in_issuing_thread(const Gradient& to, u32 warp, Body body) {
    if (to.transposed && warp % 4 != 0) return;
    if (elect_one()) body();
}

// A buffer's columns of the accumulators, from acc on, into its lines.
template <bool Fp32>
DEVICE void fill_buffer(const Gradient& to, float* acc, u32 lines, u32 thread) {
    if constexpr (Fp32) {
        to.transposed ? stage_f32_transposed(acc, lines, thread) : stage_f32(acc, lines, thread % 32);
    } else {
        to.transposed ? stage_bf16_transposed(acc, lines, thread) : stage_bf16(acc, lines, thread % 32);
    }
}

// The lines of a buffer, whose first is `row` of the tile's matrix and which start at `column`, to D[expert].
template <bool Fp32>
DEVICE void store_buffer(const Gradient& to, u32 lines, i32 row, i32 column, i32 expert) {
    const auto store_box = [&](u32 box, i32 c0, i32 c1) {
        if (Fp32 && to.adds) {
            tma_reduce_add(to.map, box, c0, c1, expert);
        } else {
            tma_store(to.map, box, c0, c1, expert);
        }
    };
    if (!to.transposed) {
        store_box(lines, column, row);
    } else {
        store_box(lines, row, column);
        if constexpr (Fp32) store_box(lines + 32 * LINE, row + 32, column);
    }
}
