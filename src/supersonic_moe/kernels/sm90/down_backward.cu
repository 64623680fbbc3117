// dA[r] = dO[r] * W2[expert of r], and in the epilogue the backward of the activation. See down_backward.py.
//
// After the K blocks of a tile, the loading warpgroup sends the tile's part of H through the same ring: four stages of 64
// activations, gate in the room of A, up in the first half of B's. A math warp owns 16 rows of each: it reads gate and up, writes
// dH in their place and s A behind them, stores all three by TMA and gives the stage back. So the epilogue needs no shared memory
// of its own, H arrives while the last K blocks multiply, and the next tile's operands while this one's gradients leave.
//
// Constants: those of mainloop.cuh, ACTIVATION, INTERLEAVED (columns of H: gate and up alternate).
#include "activation_backward.cuh"
#include "load.cuh"

// Rows of score 0 are padding: zeros by selection, whatever H holds there.
DEVICE void select_scored(u32 (&words)[4], const RowPair& rows) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) words[i] = rows.score[i % 2] != 0.0f ? words[i] : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    down_backward(const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_w,
                  const __grid_constant__ TensorMap map_h, const __grid_constant__ TensorMap map_dh,
                  const __grid_constant__ TensorMap map_as, const i32* offsets, const i32* index, const i32 experts,
                  const i32 width, const i32 blocks_k, const u16* b1, const float* scores, u8* dh, u8* as,
                  float* dscores, const i32 rows_allocated, const i32 gate_base, const i32 up_base, const float alpha,
                  const float limit, const float up_offset) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, width, blocks_k};
    const i32 gate_half = gate_base > up_base, up_half = INTERLEAVED ? 0 : 1 - gate_half;

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const auto load_w = [&](u32 tile_b, u32 full, i32 k, const TileNote& note, u32 part, u16 blocks) {
            load_b_mn_major(tile_b, &map_w, full, k, note.column, note.expert, part, blocks);
        };
        const auto load_h = [&](Ring& ring, const TileNote& note, u32 loader) {
            const i32 end = min(note.column + static_cast<i32>(BLOCK_N), width);
            for (i32 column = note.column; column < end; column += CHUNK, ring.advance()) {
                const u32 full = shared.full(ring.stage);
                mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
                if (loader == 0 && elect_one()) {
                    write_note(shared.note(ring.stage), note);
                    mbarrier_arrive_expect_tx(full, 2 * ROOM_BYTES);
                    const i32 first = INTERLEAVED ? 2 * column : column, second = INTERLEAVED ? first + 64 : column;
                    tma_load(shared.tile_a(ring.stage), &map_h, full, first, INTERLEAVED ? 0 : gate_half, note.row);
                    tma_load(shared.tile_a(ring.stage) + ROOM_BYTES, &map_h, full, second, up_half, note.row);
                }
            }
        };
        load_ragged_rows<BLOCK_N>(shared, gemm, &map_do, Unscaled{}, load_w, load_h);
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        const ActivationConstants constants{alpha, limit, up_offset};
        const Gradients gradients{&map_dh, &map_as, dh, as, width, gate_base, up_base};
        Ring ring;
        Lent lent;
        float acc[BLOCK_N / 2];
        while (true) {
            const TileNote first = await_tile(shared, ring);
            if (first.row == TileNote::STOP_ROW) break;
            if (first.row + static_cast<i32>(group * GROUP_LINES) >= first.row_end) {
                lent.give_back(shared);
                const i32 columns = min(static_cast<i32>(BLOCK_N), width - first.column);
                skip_stages(shared, ring, blocks_k + (columns + static_cast<i32>(CHUNK) - 1) / static_cast<i32>(CHUNK));
                continue;
            }
            const u32 last = multiply_tile<Major::K, Major::MN>(
                acc, shared, ring, group, blocks_k, [&] { lent.give_back(shared); }, [](u32) {});
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);

            const u32 lane = fresh_thread_index() % 32, line = group * GROUP_LINES + warp % 4 * WARP_ROWS;
            const i32 row = note.row + static_cast<i32>(line), rows = note.row_end - row;
            const Bias bias{b1, note.expert, width, gate_base, up_base};
            RowPair pair{{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
            for (i32 i = 0; i < 2; ++i) {
                const i32 at = static_cast<i32>(lane / 4) + 8 * i;
                if (at < rows) pair.score[i] = scores[row + at];
            }
#pragma unroll
            for (u32 chunk = 0; chunk < BLOCK_N / CHUNK; ++chunk) {
                const i32 column = note.column + static_cast<i32>(chunk * CHUNK);
                if (column >= width) break;
                if (chunk == 2) lent.give_back(shared);  // the first two, for the next tile's operands
                const u32 tile = lent.borrow(shared, ring), scaled_tile = tile + 2 * ROOM_BYTES;
                if (rows > 0) {
#pragma unroll
                    for (u32 part = 0; part < 4; ++part) {
                        float* d = acc + chunk * 32 + part * 8;
                        pin_four(d), pin_four(d + 4);
                        Eight h = unpack_words(load_words(tile, line, part, lane),
                                               [](u32 word, float& low, float& high) { low = bf16_low(word), high = bf16_high(word); });
                        bias.add(column + static_cast<i32>(part * 16 + lane % 4 * 2), h);
                        float scaled[4][2];
                        backward_eight(d, h, scaled, pair, constants);
                        Words dh_words = pack_words(h);
                        u32 as_words[4];
#pragma unroll
                        for (u32 i = 0; i < 4; ++i) as_words[i] = pack_bf16(scaled[i][0], scaled[i][1]);
                        select_scored(dh_words.first, pair), select_scored(dh_words.second, pair), select_scored(as_words, pair);
                        store_words(tile, line, part, lane, dh_words);
                        store_matrices(matrix_address(scaled_tile, line, part, lane), as_words);
                    }
                    fence_proxy_async();
                    __syncwarp();
                    gradients.store(tile + line * LINE, scaled_tile + line * LINE, row, rows, column, lane);
                }
            }
            store_dscores(pair, dscores + static_cast<i64>(note.column / static_cast<i32>(BLOCK_N)) * rows_allocated + row, rows, lane);
        }
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
