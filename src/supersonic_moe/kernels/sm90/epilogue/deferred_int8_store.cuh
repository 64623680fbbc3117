// Store of a tile in int8 with a power of two for 32 columns of a row (the *saved* format) behind the FP8 loop, and its walk over the
// tiles. For grouped_gemm_fp8_int8.cu.
//
// A tile waits in registers until the next one multiplies: its first 128 columns are rounded and leave during the first product of that
// tile, the others during the second. 32 columns of a row are held by four lanes, 8 numbers each, so its largest is 8 maxima and two
// shuffles away. The walk is not for_each_scaled_tile, whose epilogues take all of a tile at once.
#pragma once
#include "epilogue/gated_quantize.cuh"  // chunk_start, stage_int8
#include "gemm/k_loop_fp8.cuh"

template <Config C>
struct DeferredInt8Store {
    static_assert(C.block_n == 256 && C.parts() == 2, "a half of a tile during each product, which fills a staging buffer");
    static constexpr u32 STAGING_BYTES = 2 * C.buffer_bytes();
    const SharedMemory<C> shared;
    const TensorMap* map_d;
    Rows codes;
    u32* words;  // exponents of four groups, those of a row one after the other
    i64 words_row;
    u32 warp;
    WorkTile held{WorkTile::STOP_ROW, 0, 0, 0, 0};  // the tile in the accumulators

    DEVICE void store_half(float (&acc)[C.accumulators()], u32 half) const {
        const auto [lane, line, row, rows] = warp_rows(held, warp);
        const i32 column = held.column + static_cast<i32>(half * LINE);
        if (held.row == WorkTile::STOP_ROW || rows <= 0 || column >= codes.columns) return;
        float* const sums = acc + half * (C.accumulators() / 2);
        u32 exponents[2];  // of two groups each: byte 2 * (0 for row r, 1 for row r + 8) + group % 2
#pragma unroll
        for (u32 group = 0; group < 4; ++group) {
            float largest[2] = {0.0f, 0.0f};
#pragma unroll
            for (u32 i = 0; i < 16; ++i) largest[i / 2 % 2] = larger_or_nan(largest[i / 2 % 2], sums[group * 16 + i]);
            const u32 both = group_exponents(largest[0], largest[1]);
            exponents[group / 2] = group % 2 == 0 ? both : exponents[group / 2] | both << 8;
        }
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            u32 word;
            asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(exponents[0]), "r"(exponents[1]), "r"(i == 0 ? 0x5410 : 0x7632));
            const i32 at = static_cast<i32>(lane / 4 + 8 * i);
            if (lane % 4 == 0 && at < rows) words[(row + at) * words_row + column / static_cast<i32>(LINE)] = word;
        }
        const u32 lines = shared.staging() + half * C.buffer_bytes() + line * LINE, start = chunk_start(lines, lane, 2);
        if (half == 0) {
            tma_wait_read<0>();
            __syncwarp();
        }
#pragma unroll
        for (u32 i = 0; i < C.accumulators() / 2; i += 8) {
            pin_four(sums + i), pin_four(sums + i + 4);
            const u32 pair = exponents[i / 32] >> 8 * (i / 16 % 2);
            const float inverse[2] = {inverse_of_exponent(pair & 0xff), inverse_of_exponent(pair >> 16 & 0xff)};
            stage_int8(sums + i, inverse, start, i / 8);
        }
        fence_proxy_async();
        __syncwarp();
        store_lines<1>(1, row, rows, lane, [&](u32) -> Destination { return {map_d, codes, lines, column, 0}; });
    }
    // Every tile of this block.
    DEVICE void run() {
        const u32 group = warp / 4 - 1;
        const OperandAddresses<C> operands(shared, group);
        Ring<C> ring;
        float acc[C.accumulators()];
        while (true) {
            const WorkTile tile = await_tile(shared, ring);
            if (tile.row == WorkTile::STOP_ROW) break;
            if (tile.row + static_cast<i32>(group * GROUP_ROWS) >= tile.row_end) {
                skip_stages(shared, ring, tile.blocks_k);
                continue;
            }
            multiply_stages<false>(acc, shared, operands.of_tile(tile.row), ring, tile.blocks_k, [&](u32 half) { store_half(acc, half); });
            held = tile;
        }
        store_half(acc, 0);
        store_half(acc, 1);
    }
};
