// Backward of the gated activation, bf16. After the K blocks of a tile, the loading warpgroup sends the tile's part of H through the same
// ring: stages of 64 activations, gate in the room of A, up in the first half of B's. A math warp owns 16 rows of each: it reads gate and
// up, writes dH in their place and s A behind them, stores all three by TMA and gives the stage back.
#pragma once
#include "epilogue/activation_backward.cuh"

// Rows of score 0 are padding: zeros by selection, whatever H holds there.
DEVICE void select_scored(u32 (&words)[4], const RowPair& rows) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) words[i] = rows.score[i % 2] != 0.0f ? words[i] : 0;
}

template <Config C, Gate G>
struct LoadSaved {
    const Shared<C>& shared;
    const TensorMap* map;
    i32 width, gate_half, up_half;
    DEVICE void operator()(Ring<C>& ring, const TileNote& note, u32 loader) const {
        const i32 end = min(note.column + static_cast<i32>(C.block_n), width);
        for (i32 column = note.column; column < end; column += CHUNK, ring.advance()) {
            const u32 full = shared.full(ring.stage);
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (loader == 0 && elect_one()) {
                write_note(shared.note(ring.stage), note);
                mbarrier_arrive_expect_tx(full, 2 * C.room_bytes());
                const i32 first = G.interleaved ? 2 * column : column, second = G.interleaved ? first + 64 : column;
                tma_load(shared.tile_a(ring.stage), map, full, first, G.interleaved ? 0 : gate_half, note.row);
                tma_load(shared.tile_a(ring.stage) + C.room_bytes(), map, full, second, up_half, note.row);
            }
        }
    }
};

template <Config C, Gate G>
struct GatedBackward {
    static constexpr bool BY_WARPGROUP = false;
    Gradients<C, G> gradients;
    const u16* b1;
    const float* scores;
    float* dscores;
    i32 rows_allocated, width, gate_base, up_base;
    ActivationConstants constants;

    DEVICE i32 stages(const TileNote& note) const {
        const i32 columns = min(static_cast<i32>(C.block_n), width - note.column);
        return (columns + static_cast<i32>(CHUNK) - 1) / static_cast<i32>(CHUNK);
    }
    DEVICE void operator()(float (&acc)[C.block_n / 2], const TileNote& note, const Shared<C>& shared, Ring<C>& ring, Lent<C>& lent, u32 group, u32 warp) const {
        const u32 lane = fresh_thread_index() % 32, line = group * C.group_lines() + warp % 4 * WARP_ROWS;
        const i32 row = note.row + static_cast<i32>(line), rows = note.row_end - row;
        const Bias<G> bias{b1, note.expert, width, gate_base, up_base};
        RowPair pair{{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
        for (i32 i = 0; i < 2; ++i) {
            const i32 at = static_cast<i32>(lane / 4) + 8 * i;
            if (at < rows) pair.score[i] = scores[row + at];
        }
#pragma unroll
        for (u32 chunk = 0; chunk < C.block_n / CHUNK; ++chunk) {
            const i32 column = note.column + static_cast<i32>(chunk * CHUNK);
            if (column >= width) break;
            if (chunk == 2) lent.give_back(shared);  // the first two, for the next tile's operands
            const u32 tile = lent.borrow(shared, ring), scaled_tile = tile + 2 * C.room_bytes();
            if (rows > 0) {
#pragma unroll
                for (u32 part = 0; part < 4; ++part) {
                    float* d = acc + chunk * 32 + part * 8;
                    pin_four(d), pin_four(d + 4);
                    Eight h = unpack_words<G>(load_words<C, G>(tile, line, part, lane),
                                           [](u32 word, float& low, float& high) { low = bf16_low(word), high = bf16_high(word); });
                    bias.add(column + static_cast<i32>(part * 16 + lane % 4 * 2), h);
                    float scaled[4][2];
                    backward_eight<G>(d, h, scaled, pair, constants);
                    Words dh_words = pack_words<G>(h);
                    u32 as_words[4];
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) as_words[i] = pack_bf16(scaled[i][0], scaled[i][1]);
                    select_scored(dh_words.first, pair), select_scored(dh_words.second, pair), select_scored(as_words, pair);
                    store_words<C, G>(tile, line, part, lane, dh_words);
                    store_matrices(matrix_address(scaled_tile, line, part, lane), as_words);
                }
                fence_proxy_async();
                __syncwarp();
                gradients.store(tile + line * LINE, scaled_tile + line * LINE, row, rows, column, lane);
            }
        }
        store_dscores(pair, dscores + static_cast<i64>(note.column / static_cast<i32>(C.block_n)) * rows_allocated + row, rows, lane);
    }
};
