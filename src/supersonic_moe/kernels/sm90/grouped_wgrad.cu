// D[e] = or += A[rows of e]^T * B[rows of e], or its transpose, bf16 operands, bf16 or fp32 output. See grouped_wgrad.py.
//
// The contraction runs over the rows of an expert, which are the outer dimension of both operands, so both are MN-major: lines of
// 64 elements of M or N, one for each row. Roles as in grouped_gemm.cu.
//
// Constants: those of mainloop.cuh, TRANSPOSED (D is (E, N, M)), OUTPUT (0: bf16, 1: fp32, 2: fp32 +=).
#include "load.cuh"

constexpr i32 ROWS = BLOCK_M * CLUSTER;
constexpr u32 ROOM_COLUMNS = OUTPUT == 0 ? 64 : 32;  // accumulators' columns in a room
constexpr u32 ROOMS_USED = BLOCK_N / ROOM_COLUMNS, ROOMS_EACH = OUTPUT == 0 ? ROOMS_USED / 2 : ROOMS;
constexpr u32 TURNS = (ROOMS_USED + ROOMS_EACH - 1) / ROOMS_EACH, LENT_STAGES = TURNS < STAGES ? TURNS : STAGES - 1;

// Rows past the expert's end belong to the next one, or to nobody: zero them in both operands (0 * NaN is NaN). Each warpgroup
// clears its slab of A and half of B's slabs; both meet before either multiplies.
DEVICE void clear_rows(const Shared& shared, u32 stage, u32 group, u32 valid) {
    constexpr u32 slabs = 1 + SLABS_N / 2;
    const u32 thread = fresh_thread_index() % 128;
    const u32 a = shared.tile_a(stage) + group * SLAB_BYTES, b = shared.tile_b(stage) + group * (SLABS_N / 2) * SLAB_BYTES;
    for (u32 unit = thread; unit < slabs * 512; unit += 128) {  // 512 units of 16 bytes a slab
        const u32 slab = unit / 512, line = unit % 512 / 8;
        const u32 at = (slab == 0 ? a : b + (slab - 1) * SLAB_BYTES) + unit % 512 * 16;
        if (line >= valid) asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_proxy_async();
    named_barrier_sync(3, 256);
}

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

// A staged block to D.
DEVICE void store_block(const TensorMap* map, u32 lines, i32 column, i32 row, i32 expert) {
    if constexpr (OUTPUT == 2) {
        tma_reduce_add(map, lines, column, row, expert);
    } else {
        tma_store(map, lines, column, row, expert);
    }
}

// The accumulators of a warpgroup through the lent stages. As D lies, each warp stores its own 16 rows; transposed, its 64 rows
// make one line, so the warpgroup stores together.
DEVICE void store_tile(float (&acc)[BLOCK_N / 2], const Shared& shared, Ring& ring, Lent& lent, u32 group, const TileNote& note,
                       const TensorMap* map) {
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 thread = fresh_thread_index(), lane = thread % 32;
        const u32 line = TRANSPOSED ? group * GROUP_LINES : first_line(group, thread);
        const i32 row = note.row + static_cast<i32>(line);
        if (turn >= LENT_STAGES) {  // a stage again, once TMA has read it
            tma_wait_read<LENT_STAGES - 1>();
            TRANSPOSED ? named_barrier_sync(1 + group, 128) : __syncwarp();
        }
        const u32 rooms = turn < LENT_STAGES ? lent.borrow(shared, ring) : shared.tile_a(lent.stage_of(turn - LENT_STAGES));
        const u32 lines = rooms + line * LINE;
#pragma unroll
        for (u32 i = 0; i < ROOMS_EACH; ++i) {
            const u32 room = turn * ROOMS_EACH + i;
            if (room >= ROOMS_USED) continue;
            float* part = acc + room * (ROOM_COLUMNS / 2);
            if constexpr (OUTPUT == 0) {
                TRANSPOSED ? stage_bf16_transposed(part, lines + i * ROOM_BYTES, thread) : stage_bf16(part, lines + i * ROOM_BYTES, lane);
            } else {
                TRANSPOSED ? stage_f32_transposed(part, lines + i * ROOM_BYTES, thread) : stage_f32(part, lines + i * ROOM_BYTES, lane);
            }
        }
        fence_proxy_async();
        TRANSPOSED ? named_barrier_sync(1 + group, 128) : __syncwarp();
        if (TRANSPOSED ? thread % 128 == 0 : lane == 0) {
#pragma unroll
            for (u32 i = 0; i < ROOMS_EACH; ++i) {
                const u32 room = turn * ROOMS_EACH + i, from = lines + i * ROOM_BYTES;
                if (room >= ROOMS_USED) continue;
                const i32 column = note.column + static_cast<i32>(room * ROOM_COLUMNS);
                if constexpr (!TRANSPOSED) {
                    store_block(map, from, column, row, note.expert);
                } else {
                    store_block(map, from, row, column, note.expert);
                    if constexpr (OUTPUT != 0) store_block(map, from + 32 * LINE, row + 32, column, note.expert);
                }
            }
            tma_commit();
        }
    }
}

constexpr u32 WARP_LINES = BLOCK_K / 4;  // rows of the contraction that a loading warp fetches in a stage, with GATHER

// Loads all tiles of this block: for each, the K blocks of its expert. With GATHER the rows change from block to block: a
// warp reads their indices one block ahead, one a lane, and its issuing lane picks them up from shared memory.
DEVICE void load_ragged_depth(const Shared& shared, const TensorMap* map_a, const TensorMap* map_b, const i32* offsets, const i32* index,
                              i32 experts, i32 blocks_m, i32 blocks_n) {
    const u32 warp = warp_index();
    if (warp >= LOAD_WARPS) return;
    const i32 rank = CLUSTER > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    const i32 tiles = experts * blocks_m * blocks_n;
    Ring ring;
    for (i32 tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
        const i32 expert = tile / (blocks_m * blocks_n);
        const i32 begin = offsets[expert], end = offsets[expert + 1];
        i32 m, n;
        grouped_order<GROUP_M / CLUSTER>(tile % (blocks_m * blocks_n), blocks_m, blocks_n, m, n);
        const i32 blocks_k = max((end - begin + static_cast<i32>(BLOCK_K) - 1) / static_cast<i32>(BLOCK_K), 1);  // none: zeros, once
        const TileNote note{m * ROWS + rank * static_cast<i32>(BLOCK_M), end - begin, n * static_cast<i32>(BLOCK_N), expert, blocks_k};
        const auto fetch = [&](i32 first) {
            const i32 row = first + static_cast<i32>(warp * WARP_LINES + lane_index() % WARP_LINES);
            return GATHER ? index[max(min(row, end - 1), 0)] : 0;  // past the end: loaded, then cleared by the math warps
        };
        i32 mine = fetch(begin);
        for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
            const u32 full = shared.full(ring.stage), tile_a = shared.tile_a(ring.stage);
            const i32 k = begin + block * BLOCK_K;
            if constexpr (GATHER) {
                if (lane_index() < WARP_LINES) store_index(shared.row_index(warp * WARP_LINES + lane_index()), mine);
                mine = fetch(k + BLOCK_K);
                __syncwarp();
            }
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (begin == end) {
                if (warp == 0 && elect_one()) {
                    write_note(shared.note(ring.stage), note);
                    mbarrier_arrive(full);
                }
                continue;
            }
            if (warp == 0 && elect_one()) {
                write_note(shared.note(ring.stage), note);
                mbarrier_arrive_expect_tx(full, STAGE_BYTES);
                if constexpr (!GATHER) {
                    tma_load(tile_a, map_a, full, note.row, k);
                    tma_load(tile_a + SLAB_BYTES, map_a, full, note.row + 64, k);
                }
                load_b_mn_major(shared.tile_b(ring.stage), map_b, full, k, note.column, 0, cluster_block_rank(), (1 << CLUSTER) - 1);
            }
            if constexpr (GATHER) {
                if (elect_one()) {
#pragma unroll
                    for (u32 first = warp * WARP_LINES; first < (warp + 1) * WARP_LINES; first += HELD) {
                        i32 rows[HELD];
                        load_indices(rows, shared.row_index(first));
#pragma unroll
                        for (u32 i = 0; i < HELD; ++i) {
                            const u32 line = tile_a + (first + i) * LINE;
                            tma_load(line, map_a, full, note.row, rows[i]);
                            tma_load(line + SLAB_BYTES, map_a, full, note.row + 64, rows[i]);
                        }
                    }
                }
                __syncwarp();
            }
        }
        if (OUTPUT != 2 || begin < end) lend_stages(shared, ring, LENT_STAGES, warp);
    }
    announce_end(shared, ring, warp);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_wgrad(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                  const __grid_constant__ TensorMap map_d, const i32* offsets, const i32* index, const i32 experts,
                  const i32 blocks_m, const i32 blocks_n) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        load_ragged_depth(shared, &map_a, &map_b, offsets, index, experts, blocks_m, blocks_n);
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        Ring ring;
        Lent lent;
        float acc[BLOCK_N / 2];
        while (true) {
            const TileNote first = await_tile(shared, ring);
            if (first.row == TileNote::STOP_ROW) break;
            const i32 blocks_k = first.blocks_k;
            const i32 valid = first.row_end - (blocks_k - 1) * static_cast<i32>(BLOCK_K);  // rows of the last block
            const u32 last = multiply_tile<Major::MN, Major::MN>(
                acc, shared, ring, group, blocks_k, [&] { lent.give_back(shared, TRANSPOSED ? group : Lent::NONE); },
                [&](u32 stage) {
                    if (valid < static_cast<i32>(BLOCK_K)) clear_rows(shared, stage, group, valid);
                });
            const TileNote note = read_note(shared.note(last));
            __syncwarp();
            shared.release(last);
            if (OUTPUT != 2 || note.row_end != 0) store_tile(acc, shared, ring, lent, group, note, &map_d);
        }
        tma_wait_read<0>();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
}
