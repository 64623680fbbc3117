// dA[r] = dO[r] * W2[expert of r] in e4m3 with block scales, and in the epilogue the backward of the activation. See
// down_backward_fp8.py. Main loop and roles as in grouped_gemm_fp8.cu, the maths of the epilogue as in down_backward.cu.
//
// A tile is 128 rows x 256 activations, its epilogue four chunks of 64. H waits for it in shared memory of its own (Slots): the loader
// asks for it behind the tile's last K block, while three stages are still to be multiplied. dH leaves through the ring, which the math
// warps have for one lap: eight of its nine rooms, two for each chunk in order, so
//
//   stage    0      |      1      |      2          The first stage goes back in the middle of chunk 2, the second in that of
//   room  0 1 2     |   0  1 2    |   0 1  -        chunk 3, and the next tile's operands come while chunks 2 and 3 are computed.
//   chunk 0 0 1     |   1  2 2    |   3 3           The last one goes back behind the next tile's first product.
//
// s A takes the place of the chunk's H. A thread holds it back until its warp has read all of that H. Every tile takes whole laps of the
// ring and of the slots, with as many chunks where it has fewer columns: the stage is a constant, and blocks of a cluster stay in step.
//
// Constants: those of mainloop.cuh, ACTIVATION, INTERLEAVED (columns of H: gate and up alternate), SAVED_FP8 (H is e4m3 with scales of
// 1 x 128, else bf16).
#include "down_backward_fp8.cuh"

static_assert(ROOMS == STAGES && 2 * CHUNKS <= ROOMS * STAGES, "dH of a tile takes one lap");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    down_backward_fp8(const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_scale_do,
                      const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_h,
                      const __grid_constant__ TensorMap map_scale_h, const __grid_constant__ TensorMap map_scores,
                      const __grid_constant__ TensorMap map_dh, const __grid_constant__ TensorMap map_as, const i32* offsets,
                      const i32* index, const i32 experts, const i32 width, const i32 blocks_k, const float* scale_do,
                      const i64 scale_do_row, const float* scale_w, const i64 scale_w_expert, const i32 scale_w_column,
                      const i32 scale_w_k, const u16* b1, u8* dh, u8* as, float* dscores, const i32 rows_allocated, const i32 gate_base,
                      const i32 up_base, const float alpha, const float limit, const float up_offset) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    const Slots slots{shared};
    slots.prepare();
    shared.prepare();
    const RaggedGemm gemm{offsets, index, experts, width, blocks_k};

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        const Scales<BlocksOfW> scales{&map_scale_do, scale_do, scale_do_row, scale_w, scale_w_expert, scale_w_column, scale_w_k, {width}};
        load_tiles<CHUNK>(shared, slots, gemm, &map_do, &map_w, scales, {&map_h, &map_scale_h, &map_scores, width, gate_base, up_base});
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        const Operands operands(shared, group);
        const ActivationConstants constants{alpha, limit, up_offset};
        const Gradients gradients{&map_dh, &map_as, dh, as, width, gate_base, up_base};
        Ring ring;
        u32 lap = 0;           // of the slots
        bool leaving = false;  // the last chunk of the tile before may still be read by TMA
        float acc[BLOCK_N / 2];
        // What `chunk` was the last to use, once TMA has read all that this warp has stored.
        const auto give_back = [&](u32 chunk) {
            tma_wait_read<0>();
            __syncwarp();
            slots.release(chunk % SLOTS);
            if (chunk > 0) shared.release(chunk - 1);
        };
        const auto give_back_last = [&] {
            if (leaving) give_back(CHUNKS - 1);
        };
        while (true) {
            const TileNote note = await_note(shared, ring);
            if (note.row == TileNote::STOP_ROW) break;
            if (note.row + static_cast<i32>(group * GROUP_LINES) >= note.row_end) {
                give_back_last();
                leaving = false;
                skip_stages(shared, ring, stages_of_laps(blocks_k) + static_cast<i32>(STAGES));
                for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
                    mbarrier_wait(slots.full(chunk % SLOTS), (lap + chunk / SLOTS) % 2);
                    __syncwarp();
                    slots.release(chunk % SLOTS);
                }
                lap += CHUNKS / SLOTS;
                continue;
            }
            multiply_scaled_tile<false>(acc, shared, ring, operands, note, give_back_last);

            const u32 lane = fresh_thread_index() % 32, line = group * GROUP_LINES + warp % 4 * WARP_ROWS;
            const i32 row = note.row + static_cast<i32>(line), rows = note.row_end - row;
            const u32 row_offset = (note.row % 4 + line + lane / 4) * 4;  // of scales and scores
            const Bias bias{b1, note.expert, width, gate_base, up_base};
            RowPair pair{{0.0f, 0.0f}, {0.0f, 0.0f}};
            bool padded = false;  // a row of this warp has the score 0
#pragma unroll
            for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
                const i32 column = note.column + static_cast<i32>(chunk * CHUNK);
                const u32 slot = chunk % SLOTS, room = slots.room(slot), rooms = shared.tile_a(0) + 2 * chunk * ROOM_BYTES;
                mbarrier_wait(slots.full(slot), (lap + chunk / SLOTS) % 2);
                if (chunk != 2) mbarrier_wait(shared.full((2 * chunk + 1) / ROOMS), ring.phase);
                if (rows <= 0 || column >= width) {
                    if (chunk > 0) give_back(chunk - 1);
                    continue;
                }
                if (chunk == 0) {
                    pair.score[0] = load_scale(slots.scores() + row_offset), pair.score[1] = load_scale(slots.scores() + row_offset + 32);
                    padded = __any_sync(0xffffffffu, pair.score[0] == 0.0f || pair.score[1] == 0.0f);
                }
                float scale_gate[2], scale_up[2];
                if constexpr (SAVED_FP8) {
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        scale_gate[i] = load_scale(slots.scales(slot, 0) + row_offset + i * 32);
                        scale_up[i] = INTERLEAVED ? scale_gate[i] : load_scale(slots.scales(slot, 1) + row_offset + i * 32);
                    }
                }
                const u32 gate_at = gate_base > up_base ? LINE / 2 : 0;
                u32 as_words[4][4];
                Words saved = load_saved(room, line, 0, lane, gate_at);
#pragma unroll
                for (u32 part = 0; part < 4; ++part) {
                    float* d = acc + chunk * 32 + part * 8;
                    pin_four(d), pin_four(d + 4);
                    if (part == 2 && chunk > 0) give_back(chunk - 1);
                    Eight h = unpack_words(saved, [](u32 word, float& low, float& high) {
                        if constexpr (SAVED_FP8) {
                            unpack_e4m3(word, low, high);
                        } else {
                            low = bf16_low(word), high = bf16_high(word);
                        }
                    });
                    if (part < 3) saved = load_saved(room, line, part + 1, lane, gate_at);
                    if constexpr (SAVED_FP8) {
#pragma unroll
                        for (u32 i = 0; i < 8; ++i)
                            h.gate[i / 2][i % 2] *= scale_gate[i / 2 % 2], h.up[i / 2][i % 2] *= scale_up[i / 2 % 2];
                    }
                    bias.add(column + static_cast<i32>(part * 16 + lane % 4 * 2), h);
                    float scaled[4][2];
                    backward_eight(d, h, scaled, pair, constants);
                    store_words(rooms, line, part, lane, pack_words(h));
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) as_words[part][i] = pack_bf16(scaled[i][0], scaled[i][1]);
                }
                __syncwarp();
#pragma unroll
                for (u32 part = 0; part < 4; ++part) store_matrices(matrix_address(room, line, part, lane), as_words[part]);
                if (padded) {  // zeros whatever H holds there
                    __syncwarp();
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        if (pair.score[i] != 0.0f) continue;
                        const u32 at = (line + lane / 4 + i * 8) * LINE;
                        clear_line(rooms + at, lane), clear_line(rooms + ROOM_BYTES + at, lane), clear_line(room + at, lane);
                    }
                }
                fence_proxy_async();
                __syncwarp();
                gradients.store(rooms + line * LINE, room + line * LINE, row, rows, column, lane);
            }
            if (rows > 0)
                store_dscores(pair, dscores + static_cast<i64>(note.column / static_cast<i32>(BLOCK_N)) * rows_allocated + row, rows, lane);
            ring.phase ^= 1;
            lap += CHUNKS / SLOTS;
            leaving = true;
        }
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
