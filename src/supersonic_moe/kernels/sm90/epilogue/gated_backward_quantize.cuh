// Backward of the gated activation behind the FP8 loop, outputs in e4m3: dZ as it lies with a scale for each row and 128 columns; dZ
// and s A transposed, one scale for each tile of 128 x 128. For down_backward_fp8_quantize.cu; it differs from gated_backward_fp8.cuh as
// follows.
//
// A kernel tile is 128 rows from an expert's first on, one block of positions, and its 256 activations are four tiles of dZ, a chunk each
// since gate and up alternate, and two of s A, a pair of chunks each. So no scale takes more than one block: each warp finds its largest
// magnitude, then all wait for each other (sync_math_warps). Until then a thread holds its values in registers: 64 of dZ and up to 64 of
// s A, beside the products of the chunks to come. That is as much as the main loop takes, and a few too many: 12 values of a pair's first
// chunk wait in shared memory (park).
//
// The four chunks are turns of one loop, because straight code for all of them is 70 KB, which a multiprocessor fetches anew for each
// tile. Registers have no index, so the products move instead: those of the chunk at hand are always the first 32 accumulators, where its
// s A takes their place; that of a pair's first chunk moves to the next 32.
//
// Rows that the expert does not have count as rows of score 0: they raise no maximum and become zeros, in the transposed outputs up to the
// end of the block of positions. So a warp, or a warpgroup, without rows computes like the others.
//
// Where outputs wait for TMA. A warp's 16 lines of the chunk's Z are its own again behind the barrier: they hold s A of the pair while it
// is transposed, then dZ in tile scales while that is transposed, then dZ as it lies. What is transposed goes to the ring, which the
// math warps have for one lap. One warp, STORING_WARP, hands it to TMA behind the next barrier; chunk 3 has none after it, so there the
// others only arrive (TILE_END_BARRIER).
//
//   stage     0            |  1           |  2                  handed over behind the barrier of
//   buffer    0            |  0     1     |  0     1     2      chunk 1: dZ 0         chunk 2: dZ 1, sA 0
//             dZ 0         |  dZ 1  sA 0  |  dZ 2  dZ 3  sA 1   chunk 3: dZ 2         the tile's end: dZ 3, sA 1
//
// Slots and stages go back as in gated_backward_fp8.cuh: slot c and stage c - 1 in the middle of chunk c + 1, the last ones behind the
// next tile's first product. A warp gives back once TMA has read what this warp handed over; a stage waits for all eight, the storing
// warp among them. Every tile takes all four barriers, whatever rows and columns it has. The maxima of a chunk are overwritten a tile
// later.
#pragma once
#include "epilogue/quantize.cuh"
#include "epilogue/saved_preactivation.cuh"
#include "epilogue/transpose_e4m3.cuh"

constexpr u32 STORING_WARP = 4;
constexpr i32 PAIR = 2 * CHUNK;

// Largest magnitudes that the warps found, of dZ of a chunk and of s * A of the pair that it completes.
template <Config C>
struct Maxima {
    u32 base;
    DEVICE u32 at(u32 chunk, bool of_a) const { return base + (2 * chunk + of_a) * C.math_warps() * 4; }
    // Magnitudes order as their bits do.
    DEVICE static float of_warp(float x) {
        u32 largest;
        asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(__float_as_uint(x)));
        return __uint_as_float(largest);
    }
    DEVICE void put(u32 chunk, bool of_a, u32 warp, u32 lane, float x) const {
        const float largest = of_warp(x);
        if (lane == 0) store_scale(at(chunk, of_a) + warp * 4, largest);
    }
    DEVICE float of_dz(u32 chunk, u32 lane) const { return of_warp(load_scale(at(chunk, false) + lane % C.math_warps() * 4)); }
    // Of the two chunks of a pair, this one the second.
    DEVICE float of_a(u32 chunk, u32 lane) const {
        return of_warp(load_scale(at(chunk - lane / C.math_warps() % 2, true) + lane % C.math_warps() * 4));
    }
};

constexpr u32 PARKED = 12;  // values of each math thread, to shared memory and back: of s * A of a chunk's first 32 activations
template <Config C>
DEVICE u32 parking_place(u32 base, u32 i) {
    return base + (fresh_thread_index() % C.math_threads() + i / 4 * C.math_threads()) * 16;
}
template <Config C>
DEVICE void park(u32 base, const float* values) {
#pragma unroll
    for (u32 i = 0; i < PARKED; i += 4)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(parking_place<C>(base, i)), "f"(values[i]), "f"(values[i + 1]),
                     "f"(values[i + 2]), "f"(values[i + 3])
                     : "memory");
}
template <Config C>
DEVICE void unpark(u32 base, float* values) {
#pragma unroll
    for (u32 i = 0; i < PARKED; i += 4)
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(values[i]), "=f"(values[i + 1]), "=f"(values[i + 2]), "=f"(values[i + 3])
                     : "r"(parking_place<C>(base, i))
                     : "memory");
}

template <Config C, Gate G, bool Int8 = false>
struct GatedBackwardQuantized {
    static constexpr SavedFormat SAVED{true, true, Int8};
    static constexpr u32 CHUNKS = chunks<C>, SLOTS = slots_of<C, SAVED>, MAXIMA_BYTES = 2 * CHUNKS * C.math_warps() * 4;
    static_assert(G.interleaved, "a chunk is a tile of dZ where gate and up alternate; a slot is what one chunk stages");
    static_assert(C.share_a || C.cluster == 1, "every block of a cluster has rows: a block of positions belongs to an expert");
    static_assert(C.side_bytes() % 1024 + 16 * SLOTS + MAXIMA_BYTES <= 1024, "and maxima behind the barriers");
    static constexpr u32 STAGING_BYTES = SavedSlots<C, SAVED>::BYTES + C.math_threads() * PARKED * 4;
    static constexpr bool RUNS_WITHOUT_ROWS = true;
    const SharedMemory<C> shared;
    const SavedSlots<C, SAVED> slots;
    const Maxima<C> maxima;
    const ActivationConstants constants;
    const TensorMap *map_dz, *map_dz_transposed, *map_as_transposed;
    const i32 *offsets, *padded_offsets;
    const u16* b1;
    u8* dz;
    float* row_scales;
    i64 row_scales_stride;
    float* dz_scales;
    i64 dz_scales_stride;
    float* as_scales;
    i64 as_scales_stride;
    float* dscores;
    i32 rows_allocated, pow2, width, blocks_k;
    u32 group, warp;
    u32 lap = 0;           // of the slots, its parity
    bool in_flight = false;  // the last chunk of the tile before may still be read by TMA

    // Codes of a chunk of dZ, by the inverse scales of the two rows that this thread holds, to the warp's lines.
    DEVICE static void stage_dz(const GateUpFragment (&z)[4], u32 buffer, u32 line, u32 lane, float first, float second) {
#pragma unroll
        for (u32 part = 0; part < 4; ++part) {
            u32 words[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const float(&gate)[2] = z[part].gate[i], (&up)[2] = z[part].up[i];
                const float inverse = i % 2 == 0 ? first : second;
                words[i] = pack_four_e4m3(gate[0] * inverse, up[0] * inverse, gate[1] * inverse, up[1] * inverse);
            }
            store_matrices(matrix_address(buffer, line, part, lane), words);
        }
    }
    // What `chunk` was the last to use, once TMA has read all that this warp has stored.
    DEVICE void give_back(u32 chunk) const {
        tma_wait_read<0>();
        __syncwarp();
        slots.release(chunk);
        if (chunk > 0) shared.release(chunk - 1);
    }
    DEVICE u32 buffer_of_dz(u32 chunk) const { return shared.tile_a(min(chunk, C.stages - 1)) + chunk / C.stages * C.buffer_bytes(); }
    DEVICE u32 buffer_of_a(u32 pair) const { return shared.tile_a(pair + 1) + (pair + 1) * C.buffer_bytes(); }
    DEVICE void overlap(float (&)[C.accumulators()]) const {
        if (in_flight) give_back(CHUNKS - 1);
    }
    DEVICE void skip(float (&acc)[C.accumulators()], const WorkTile&, Ring<C>& ring) const {
        overlap(acc);
        skip_stages(shared, ring, stages_of_laps<C>(blocks_k));
#pragma unroll
        for (u32 i = 0; i < C.block_n / 2; ++i) acc[i] = 0.0f;
    }
    DEVICE void finish(float (&)[C.accumulators()]) const {}
    DEVICE void operator()(float (&acc)[C.accumulators()], const WorkTile& tile, Ring<C>& ring) {
        const auto [_, line, row, rows] = warp_rows(tile, warp);
        const i32 position = tile.row - offsets[tile.expert] + padded_offsets[tile.expert];
        const Bias<G> bias{b1, tile.expert, width, 0, 1};
        RowScores rows_held{{0.0f, 0.0f}, {0.0f, 0.0f}};
        bool padded = false;  // a row of this warp has the score 0
        const u32 parking = slots.buffer(0) + SavedSlots<C, SAVED>::BYTES;
        const auto clear_padded = [&](u32 lines) {  // zeros whatever Z holds there
            if (!padded) return;
            const u32 lane = fresh_thread_index() % 32;
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                if (rows_held.score[i] == 0.0f) clear_line(lines + (lane / 4 + i * 8) * LINE, lane);
        };
        // Its Z is there, and the buffer for what it writes.
        const auto await_chunk = [&](u32 chunk) {
            mbarrier_wait(slots.full(chunk), lap);
            if (chunk < C.stages) mbarrier_wait(shared.full(chunk), ring.phase);
        };
        // What all warps have staged of a chunk, and of the pair that it completes.
        const auto store_transposed = [&](u32 chunk) {
            const i32 column = tile.column + static_cast<i32>(chunk * CHUNK), first_of_pair = column - static_cast<i32>(CHUNK);
            if (warp != STORING_WARP || !elect_one()) return;
            if (column < width) tma_store(map_dz_transposed, buffer_of_dz(chunk), position, 2 * column);
            if (chunk % 2 == 1 && first_of_pair < width) tma_store(map_as_transposed, buffer_of_a(chunk / 2), position, first_of_pair);
            tma_commit();
        };
#pragma unroll 1
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            const bool completes_pair = chunk % 2 == 1;
            const i32 column = tile.column + static_cast<i32>(chunk * CHUNK);
            const i32 first_of_pair = tile.column + static_cast<i32>(chunk / 2) * PAIR;
            const u32 lane = hardware_lane(), row_offset = (tile.row % 4 + line + lane / 4) * 4;  // of scales and scores
            await_chunk(chunk);
            if (first_of_pair >= width) {
                give_back(chunk - 1);
                sync_math_warps<C>();
                store_transposed(chunk - 1);
                continue;
            }
            const u32 buffer = slots.buffer(chunk), lines = buffer + line * LINE;
            if (chunk == 0) {
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (static_cast<i32>(lane / 4 + 8 * i) < rows) rows_held.score[i] = load_scale(slots.scores() + row_offset + i * 32);
                }
            }
            const u32 scales = slots.scales(chunk, 0) + row_offset;
            const SavedScales<SAVED> scale(scales, scales + 32);

            GateUpFragment z[4];
            float largest[2] = {0.0f, 0.0f}, largest_a = 0.0f;  // of dZ in the rows that this thread holds; of s * A
            PackedFragment saved = load_saved<C, SAVED>(buffer, line, 0, lane, 0);
#pragma unroll
            for (u32 part = 0; part < 4; ++part) {
                float* d = acc + part * 8;
                pin_four(d), pin_four(d + 4);
                if (part == 2 && !completes_pair) park<C>(parking, acc);  // s * A of parts 0 and 1
                if (part == 2 && chunk > 0) give_back(chunk - 1);
                z[part] = unpack_fragment<G>(saved, unpack_saved<SAVED>);
                if (part < 3) saved = load_saved<C, SAVED>(buffer, line, part + 1, lane, 0);
                scale.apply(z[part].gate, part), scale.apply(z[part].up, part);
                bias.add(column + static_cast<i32>(part * 16 + lane % 4 * 2), z[part]);
                float a[4][2];
                backward_fragment<G>(d, z[part], a, rows_held, constants);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    float& of_row = largest[i / 2 % 2];
                    of_row = fmaxf(of_row, fmaxf(fabsf(z[part].gate[i / 2][i % 2]), fabsf(z[part].up[i / 2][i % 2])));
                    largest_a = fmaxf(largest_a, fabsf(a[i / 2][i % 2]));
                    d[i] = a[i / 2][i % 2];
                }
            }
            padded = __any_sync(0xffffffffu, rows_held.score[0] == 0.0f || rows_held.score[1] == 0.0f);
            maxima.put(chunk, false, warp - 4, lane, fmaxf(largest[0], largest[1]));
            maxima.put(chunk, true, warp - 4, lane, largest_a);
            sync_math_warps<C>();
            if (chunk > 0) store_transposed(chunk - 1);

            const float tile_scale = block_scale(maxima.of_dz(chunk, lane), pow2), inverse = inverse_of_scale(tile_scale);
            if (completes_pair) {
                const u32 lane = fresh_thread_index() % 32;
                unpark<C>(parking, acc + 32);
                const float scale_a = block_scale(maxima.of_a(chunk, lane), pow2), inverse = inverse_of_scale(scale_a);
                if (warp == STORING_WARP && lane == 0) as_scales[position / 128 * as_scales_stride + first_of_pair / 128] = scale_a;
#pragma unroll
                for (u32 part = 0; part < 4; ++part) {  // 32 activations, of the chunk before and of this one
                    const float* a = acc + (part < 2 ? 32 : 0) + part % 2 * 16;
                    u32 words[4];
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) {
                        const float* four = a + i / 2 * 8 + i % 2 * 2;
                        words[i] = pack_four_e4m3(four[0] * inverse, four[1] * inverse, four[4] * inverse, four[5] * inverse);
                    }
                    store_matrices(matrix_address(buffer, line, part, lane), words);
                }
                clear_padded(lines);
                __syncwarp();
                transpose_lines<true>(lines, buffer_of_a(chunk / 2), line / WARP_ROWS, fresh_thread_index() % 32);
                __syncwarp();
            }
            if (warp == STORING_WARP && lane == 0 && column < width)
                dz_scales[position / 128 * dz_scales_stride + column / 64] = tile_scale;
            stage_dz(z, buffer, line, fresh_thread_index() % 32, inverse, inverse);
            clear_padded(lines);
            __syncwarp();
            transpose_lines<false>(lines, buffer_of_dz(chunk), line / WARP_ROWS, fresh_thread_index() % 32);
            __syncwarp();
            // As it lies, dZ has a scale for each row: a quiet token beside a loud one keeps its gradient.
            const float row_scale[2] = {block_scale(quad_max(largest[0]), pow2), block_scale(quad_max(largest[1]), pow2)};
            const i32 scaled_row = static_cast<i32>(lane / 4 + lane % 2 * 8);
            if (lane % 4 < 2 && scaled_row < rows && column < width)
                row_scales[column / 64 * row_scales_stride + row + scaled_row] = lane % 2 == 0 ? row_scale[0] : row_scale[1];
            stage_dz(z, buffer, line, fresh_thread_index() % 32, inverse_of_scale(row_scale[0]), inverse_of_scale(row_scale[1]));
            clear_padded(lines);
            fence_proxy_async();
            __syncwarp();
            if (column < width) {
                if (rows >= static_cast<i32>(WARP_ROWS)) {
                    if (elect_one()) {
                        tma_store(map_dz, lines, 2 * column, row);
                        tma_commit();
                    }
                } else {
                    store_rows<1>({dz, static_cast<i64>(width) * 2, 2 * width}, lines, row, rows, 2 * column, lane);
                }
            }
            // The next chunk's products take the place of this one's; behind a first chunk its s * A waits in theirs.
            if (completes_pair) {
#pragma unroll
                for (u32 i = 0; i < 64; ++i) acc[i] = acc[64 + i];
            } else {
#pragma unroll
                for (u32 i = 0; i < 32; ++i) {
                    const float a = acc[i];
                    acc[i] = acc[32 + i];
                    if (i >= PARKED) acc[32 + i] = a;
                }
            }
        }
        if (warp == STORING_WARP) {
            named_barrier_sync(TILE_END_BARRIER, C.math_threads());
            store_transposed(CHUNKS - 1);
        } else {
            named_barrier_arrive(TILE_END_BARRIER, C.math_threads());
        }
        const i64 block_n = tile.column / static_cast<i32>(C.block_n);
        if (rows > 0) store_dscores(rows_held, dscores + block_n * rows_allocated + row, rows, fresh_thread_index() % 32);
        ring.phase ^= 1;
        lap ^= 1;
        in_flight = true;
    }
};
