// Backward of the gated activation behind the bf16 loop. After the K blocks of a tile, the loading warps send the tile's part of Z
// through the same ring: stages of 64 activations, gate in the stage's first buffer, up in its second. A math warp owns 16 rows of each:
// it reads gate and up, writes dZ in their place and s A into the third, stores all three by TMA and gives the stage back. For
// down_backward.cu.
#pragma once
#include "epilogue/activation_backward.cuh"

template <Config C, Gate G>
struct LoadSavedIntoRing {
    const SharedMemory<C>& shared;
    const TensorMap* map;
    i32 width, gate_half, up_half;
    DEVICE void operator()(Ring<C>& ring, const WorkTile& tile, u32 loader) const {
        const i32 end = min(tile.column + static_cast<i32>(C.block_n), width);
        for (i32 column = tile.column; column < end; column += CHUNK, ring.advance()) {
            const u32 full = shared.full(ring.stage);
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (loader == 0 && elect_one()) {
                write_work_tile(shared.work_tile(ring.stage), tile);
                mbarrier_arrive_expect_tx(full, 2 * C.buffer_bytes());
                const i32 first = G.interleaved ? 2 * column : column, second = G.interleaved ? first + 64 : column;
                tma_load(shared.tile_a(ring.stage), map, full, first, G.interleaved ? 0 : gate_half, tile.row);
                tma_load(shared.tile_a(ring.stage) + C.buffer_bytes(), map, full, second, up_half, tile.row);
            }
        }
    }
};

template <Config C, Gate G>
struct GatedBackward {
    Gradients<C, G> gradients;
    const u16* b1;
    const float* scores;
    float* dscores;
    i32 rows_allocated, width, gate_base, up_base;
    ActivationConstants constants;

    DEVICE static constexpr bool by_warpgroup() { return false; }
    DEVICE i32 stages(const WorkTile& tile) const {
        const i32 columns = min(static_cast<i32>(C.block_n), width - tile.column);
        return (columns + static_cast<i32>(CHUNK) - 1) / static_cast<i32>(CHUNK);
    }
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, const SharedMemory<C>& shared, Ring<C>& ring,
                           BorrowedStages<C>& borrowed, u32, u32 warp) const {
        const auto [last_lane, line, row, rows] = warp_rows(tile, warp);
        const Bias<G> bias{b1, tile.expert, width, gate_base, up_base};
        RowScores pair = load_scores(scores, row, rows, last_lane);
        const bool padded = __any_sync(0xffffffffu, pair.score[0] == 0.0f || pair.score[1] == 0.0f);
#pragma unroll 1  // straight code for four chunks is 45 KB, which a multiprocessor fetches anew for each tile
        for (u32 chunk = 0; chunk < C.block_n / CHUNK; ++chunk) {
            const u32 lane = fresh_thread_index() % 32;
            const i32 column = tile.column + static_cast<i32>(chunk * CHUNK);
            if (column >= width) break;
            if (chunk == 2) borrowed.give_back(shared);  // the first two, for the next tile's operands
            const u32 buffers = borrowed.borrow(shared, ring), as_buffer = buffers + 2 * C.buffer_bytes();
            if (rows > 0) {
                PackedFragment saved = load_packed<C, G>(buffers, line, 0, lane);
#pragma unroll
                for (u32 part = 0; part < 4; ++part) {
                    float* d = acc + part * 8;
                    pin_four(d), pin_four(d + 4);
                    GateUpFragment z = unpack_fragment<G>(
                        saved, [](u32 word, float& low, float& high) { low = bf16_low(word), high = bf16_high(word); });
                    if (part < 3) saved = load_packed<C, G>(buffers, line, part + 1, lane);
                    bias.add(column + static_cast<i32>(part * 16 + lane % 4 * 2), z);
                    float scaled[4][2];
                    backward_fragment<G>(d, z, scaled, pair, constants);
                    PackedFragment dz_words = pack_fragment<G>(z);
                    u32 as_words[4];
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) as_words[i] = pack_bf16(scaled[i][0], scaled[i][1]);
                    store_packed<C, G>(buffers, line, part, lane, dz_words);
                    store_matrices(matrix_address(as_buffer, line, part, lane), as_words);
                }
                if (padded) {  // zeros whatever Z holds there
                    __syncwarp();
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        if (pair.score[i] != 0.0f) continue;
                        const u32 at = (line + lane / 4 + i * 8) * LINE;
                        clear_line(buffers + at, lane), clear_line(buffers + C.buffer_bytes() + at, lane), clear_line(as_buffer + at, lane);
                    }
                }
                fence_proxy_async();
                __syncwarp();
                gradients.store(buffers + line * LINE, as_buffer + line * LINE, row, rows, column, lane);
                next_products<C>(acc);
            }
        }
        store_dscores(pair, dscores + static_cast<i64>(tile.column / static_cast<i32>(C.block_n)) * rows_allocated + row, rows, last_lane);
    }
};
