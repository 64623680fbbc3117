// Backward of the gated activation behind the FP8 loop, outputs in bf16. For down_backward_fp8.cu.
//
// A tile is 128 rows x 256 activations, its epilogue four chunks of 64. Z waits for it in shared memory of its own (SavedSlots): the loader
// asks for it behind the tile's last K block, while three stages are still to be multiplied. dZ leaves through the ring, which the math
// warps have for one lap: eight of its nine buffers, two for each chunk in order, so
//
//   stage     0      |      1      |      2          The first stage goes back in the middle of chunk 2, the second in that of
//   buffer  0 1 2    |   0  1 2    |   0 1  -        chunk 3, and the next tile's operands come while chunks 2 and 3 are computed.
//   chunk   0 0 1    |   1  2 2    |   3 3           The last one goes back behind the next tile's first product.
//
// s A takes the place of the chunk's Z. A thread holds it back until its warp has read all of that Z. Every tile takes whole laps of the
// ring and of the slots, with as many chunks where it has fewer columns: the stage is a constant, and blocks of a cluster stay in step.
#pragma once
#include "epilogue/saved_preactivation.cuh"

template <Config C, Gate G, SavedFormat SAVED>
struct GatedBackwardScaled {
    static constexpr u32 CHUNKS = chunks<C>, SLOTS = slots_of<C, SAVED>, BUFFERS = C.stage_buffers();
    static_assert(BUFFERS == C.stages && 2 * CHUNKS <= BUFFERS * C.stages, "dZ of a tile takes one lap");
    static constexpr u32 STAGING_BYTES = SavedSlots<C, SAVED>::BYTES;
    static constexpr bool RUNS_WITHOUT_ROWS = false;
    // Chunks are turns of a loop, because a multiprocessor fetches straight code of 45 KB anew for each tile. With Z in bf16 some
    // activations would spill.
    static constexpr bool LOOPS = SAVED.fp8;
    const SharedMemory<C> shared;
    const SavedSlots<C, SAVED> slots;
    const ActivationConstants constants;
    const Gradients<C, G> gradients;
    const u16* b1;
    float* dscores;
    i32 rows_allocated, width, gate_base, up_base, blocks_k;
    u32 group, warp;
    u32 lap = 0;           // of the slots
    bool in_flight = false;  // the last chunk of the tile before may still be read by TMA

    // What `chunk` was the last to use, once TMA has read all that this warp has stored.
    DEVICE void give_back(u32 chunk) const {
        tma_wait_read<0>();
        __syncwarp();
        slots.release(chunk % SLOTS);
        if (chunk > 0) shared.release(chunk - 1);
    }
    DEVICE void overlap(float (&)[C.accumulators()]) const {
        if (in_flight) give_back(CHUNKS - 1);
    }
    DEVICE void skip(float (&acc)[C.accumulators()], const WorkTile&, Ring<C>& ring) {
        overlap(acc);
        in_flight = false;
        skip_stages(shared, ring, stages_of_laps<C>(blocks_k) + static_cast<i32>(C.stages));
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            mbarrier_wait(slots.full(chunk % SLOTS), (lap + chunk / SLOTS) % 2);
            __syncwarp();
            slots.release(chunk % SLOTS);
        }
        lap += CHUNKS / SLOTS;
    }
    DEVICE void finish(float (&)[C.accumulators()]) const {}
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, Ring<C>& ring) {
        const i32 width = this->width;  // a value: a load through `this` keeps the compiler from merging two conditions into one branch
        const auto [tile_lane, line, row, rows] = warp_rows(tile, warp);
        const Bias<G> bias{b1, tile.expert, width, gate_base, up_base};
        RowScores pair{{0.0f, 0.0f}, {0.0f, 0.0f}};
        bool padded = false;  // a row of this warp has the score 0
#pragma unroll(LOOPS ? 1 : CHUNKS)
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            const u32 lane = LOOPS ? fresh_thread_index() % 32 : tile_lane, load_lane = LOOPS ? hardware_lane() : tile_lane;
            const u32 row_offset = (tile.row % 4 + line + lane / 4) * 4;  // of scales and scores
            const i32 column = tile.column + static_cast<i32>(chunk * CHUNK);
            const u32 slot = chunk % SLOTS, buffer = slots.buffer(slot), buffers = shared.tile_a(0) + 2 * chunk * C.buffer_bytes();
            mbarrier_wait(slots.full(slot), (lap + chunk / SLOTS) % 2);
            if (chunk != 2) mbarrier_wait(shared.full((2 * chunk + 1) / BUFFERS), ring.phase);
            if (rows <= 0 || column >= width) {
                if (chunk > 0) give_back(chunk - 1);
                continue;
            }
            if (chunk == 0) {
                pair.score[0] = load_scale(slots.scores() + row_offset), pair.score[1] = load_scale(slots.scores() + row_offset + 32);
                padded = __any_sync(0xffffffffu, pair.score[0] == 0.0f || pair.score[1] == 0.0f);
            }
            const u32 of_gate = slots.scales(slot, 0) + row_offset, of_up = G.interleaved ? of_gate : slots.scales(slot, 1) + row_offset;
            const SavedScales<SAVED> scale_gate(of_gate, of_gate + 32), scale_up(of_up, of_up + 32);
            const u32 gate_at = gate_base > up_base ? LINE / 2 : 0;
            u32 as_words[4][4];
            PackedFragment saved = load_saved<C, SAVED>(buffer, line, 0, load_lane, gate_at);
#pragma unroll
            for (u32 part = 0; part < 4; ++part) {
                float* d = acc + (LOOPS ? 0 : chunk * 32) + part * 8;
                pin_four(d), pin_four(d + 4);
                if (part == 2 && chunk > 0) give_back(chunk - 1);
                GateUpFragment z = unpack_fragment<G>(saved, unpack_saved<SAVED>);
                if (part < 3) saved = load_saved<C, SAVED>(buffer, line, part + 1, load_lane, gate_at);
                const u32 scale_group = G.interleaved ? part : chunk % 2 * 2 + part / 2;
                scale_gate.apply(z.gate, scale_group), scale_up.apply(z.up, scale_group);
                bias.add(column + static_cast<i32>(part * 16 + load_lane % 4 * 2), z);
                float scaled[4][2];
                backward_fragment<G>(d, z, scaled, pair, constants);
                store_packed<C, G>(buffers, line, part, lane, pack_fragment<G>(z));
#pragma unroll
                for (u32 i = 0; i < 4; ++i) as_words[part][i] = pack_bf16(scaled[i][0], scaled[i][1]);
            }
            __syncwarp();
#pragma unroll
            for (u32 part = 0; part < 4; ++part) store_matrices(matrix_address(buffer, line, part, lane), as_words[part]);
            if (padded) {  // zeros whatever Z holds there
                __syncwarp();
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (pair.score[i] != 0.0f) continue;
                    const u32 at = (line + lane / 4 + i * 8) * LINE;
                    clear_line(buffers + at, lane), clear_line(buffers + C.buffer_bytes() + at, lane), clear_line(buffer + at, lane);
                }
            }
            fence_proxy_async();
            __syncwarp();
            gradients.store(buffers + line * LINE, buffer + line * LINE, row, rows, column, lane);
            if constexpr (LOOPS) next_products<C>(acc);
        }
        if (rows > 0)
            store_dscores(pair, dscores + static_cast<i64>(tile.column / static_cast<i32>(C.block_n)) * rows_allocated + row, rows, tile_lane);
        ring.phase ^= 1;
        lap += CHUNKS / SLOTS;
        in_flight = true;
    }
};
