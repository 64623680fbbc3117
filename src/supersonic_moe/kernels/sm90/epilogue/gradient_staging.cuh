// How a weight gradient leaves the accumulators, in BF16 or FP8: buffers of 16 KB in shared memory, each with 64 columns (bf16) or 32 (fp32)
// of the tile, from there to D by TMA, which stores or adds. As D lies, each warp fills and stores its own 16 rows of a buffer; transposed,
// the 64 rows of a warpgroup make up the lines, so a warpgroup fills and stores together.
//
// Constants: those of mainloop.cuh, O.transposed (D is (E, N, M)), OUTPUT (0: bf16, 1: fp32, 2: fp32 +=).
#pragma once
#include "epilogue/staging.cuh"

enum class Format : int { BF16 = 0, FP32 = 1, FP32_ADD = 2 };
struct Output {
    bool transposed;  // D is (E, N, M)
    Format format;
    DEVICE constexpr u32 buffer_columns() const { return format == Format::BF16 ? 64 : 32; }  // accumulators' columns in a buffer
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
template <Output O>
DEVICE u32 own_line(u32 warp) { return first_line(O.transposed ? warp / 4 * 4 : warp); }

// All who fill lines together have come this far.
template <Output O>
DEVICE void sync_writers(u32 group) { O.transposed ? sync_warpgroup(group) : __syncwarp(); }

// `body` in the one of them that issues their stores. Two branches: as one condition, each TMA instruction becomes a loop over lanes.
template <Output O, typename Body>
DEVICE void in_issuing_thread(u32 warp, Body body) {
    if (O.transposed && warp % 4 != 0) return;
    if (elect_one()) body();
}

// A buffer's columns of the accumulators, from acc on, into its lines.
template <Output O>
DEVICE void fill_buffer(float* acc, u32 lines, u32 thread) {
    if constexpr (O.format == Format::BF16) {
        O.transposed ? stage_bf16_transposed(acc, lines, thread) : stage_bf16(acc, lines, thread % 32);
    } else {
        O.transposed ? stage_f32_transposed(acc, lines, thread) : stage_f32(acc, lines, thread % 32);
    }
}

// A box of staged lines to D.
template <Output O>
DEVICE void store_box(const TensorMap* map, u32 lines, i32 column, i32 row, i32 expert) {
    if constexpr (O.format == Format::FP32_ADD) {
        tma_reduce_add(map, lines, column, row, expert);
    } else {
        tma_store(map, lines, column, row, expert);
    }
}

// The lines of a buffer, whose first is `row` of the tile's matrix and which start at `column`, to D[expert].
template <Output O>
DEVICE void store_buffer(const TensorMap* map, u32 lines, i32 row, i32 column, i32 expert) {
    if constexpr (!O.transposed) {
        store_box<O>(map, lines, column, row, expert);
    } else {
        store_box<O>(map, lines, row, column, expert);
        if constexpr (O.format != Format::BF16) store_box<O>(map, lines + 32 * LINE, row + 32, column, expert);
    }
}
