// Backward of a squared ReLU without a gate behind the bf16 loop, as gated_backward.cuh does a gated activation: stages of 64 activations
// come through the ring, Z in the stage's first buffer; a math warp writes dZ in its place and s A into the second. For
// down_backward_ungated.cu.
#pragma once
#include "epilogue/activation_backward.cuh"

template <Config C>
struct LoadUngatedIntoRing {
    const SharedMemory<C>& shared;
    const TensorMap* map;
    i32 width;
    DEVICE void operator()(Ring<C>& ring, const WorkTile& tile, u32 loader) const {
        const i32 end = min(tile.column + static_cast<i32>(C.block_n), width);
        for (i32 column = tile.column; column < end; column += CHUNK, ring.advance()) {
            const u32 full = shared.full(ring.stage);
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (loader == 0 && elect_one()) {
                write_work_tile(shared.work_tile(ring.stage), tile);
                mbarrier_arrive_expect_tx(full, C.buffer_bytes());
                tma_load(shared.tile_a(ring.stage), map, full, column, 0, tile.row);
            }
        }
    }
};

template <Config C>
struct UngatedBackward {
    const TensorMap *map_dz, *map_as;
    u8 *dz, *as;
    const u16* b1;
    const float* scores;
    float* dscores;
    i32 rows_allocated, width;

    DEVICE static constexpr bool by_warpgroup() { return false; }
    DEVICE i32 stages(const WorkTile& tile) const {
        const i32 columns = min(static_cast<i32>(C.block_n), width - tile.column);
        return (columns + static_cast<i32>(CHUNK) - 1) / static_cast<i32>(CHUNK);
    }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32, u32 warp) const {
        const auto [lane, line, row, rows] = warp_rows(tile, warp);
        RowScores pair = load_scores(scores, row, rows, lane);
#pragma unroll
        for (u32 chunk = 0; chunk < C.block_n / CHUNK; ++chunk) {
            const i32 column = tile.column + static_cast<i32>(chunk * CHUNK);
            if (column >= width) break;
            if (chunk == 2) borrowed.give_back(shared);  // the first two, for the next tile's operands
            const u32 buffers = borrowed.borrow(shared, ring), as_buffer = buffers + C.buffer_bytes();
            if (rows > 0) {
#pragma unroll
                for (u32 part = 0; part < 4; ++part) {
                    float* d = acc + chunk * 32 + part * 8;
                    pin_four(d), pin_four(d + 4);
                    u32 words[4], as_words[4];  // as GateUpFragment has its gates
                    load_matrices(words, matrix_address(buffers, line, part, lane));
                    backward(d, words, as_words, tile.expert, column + static_cast<i32>(part * 16 + lane % 4 * 2), pair);
                    select_scored(words, pair), select_scored(as_words, pair);
                    store_matrices(matrix_address(buffers, line, part, lane), words);
                    store_matrices(matrix_address(as_buffer, line, part, lane), as_words);
                }
                fence_proxy_async();
                __syncwarp();
                store_lines(2, row, rows, lane, [&](u32 i) -> Destination {
                    const Rows out{i == 0 ? dz : as, static_cast<i64>(width) * 2, width};
                    return {i == 0 ? map_dz : map_as, out, (i == 0 ? buffers : as_buffer) + line * LINE, column, 0};
                });
            }
        }
        store_dscores(pair, dscores + static_cast<i64>(tile.column / static_cast<i32>(C.block_n)) * rows_allocated + row, rows, lane);
    }

    // Eight activations of a thread, from column c on: Z becomes dZ, `scaled` gets s A. `d`: dA before the score.
    DEVICE void backward(const float* d, u32 (&z)[4], u32 (&scaled)[4], i32 expert, i32 c, RowScores& rows) const {
        const u16* bias = b1 == nullptr ? nullptr : b1 + static_cast<i64>(expert) * width;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 of_bias = bias == nullptr ? 0 : load_bias_pair(bias, c + static_cast<i32>(i / 2) * 8, width);
            const float s = rows.score[i % 2];
            float dz_values[2], as_values[2];
#pragma unroll
            for (u32 j = 0; j < 2; ++j) {
                const float at = j == 0 ? bf16_low(z[i]) + bf16_low(of_bias) : bf16_high(z[i]) + bf16_high(of_bias);
                const float positive = relu(at), value = positive * positive, da = d[i * 2 + j];
                rows.dscore[i % 2] += da * value;
                dz_values[j] = 2.0f * s * da * positive, as_values[j] = s * value;
            }
            z[i] = pack_bf16(dz_values[0], dz_values[1]), scaled[i] = pack_bf16(as_values[0], as_values[1]);
        }
    }
};
