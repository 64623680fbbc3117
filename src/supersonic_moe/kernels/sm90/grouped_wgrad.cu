// D[e] = or += A[rows of e]^T * B[rows of e], or its transpose, bf16 operands, bf16 or fp32 output. See grouped_wgrad.py.
//
// The contraction runs over the rows of an expert, which are the outer dimension of both operands, so both are MN-major: lines of
// 64 elements of M or N, one for each row. Roles as in grouped_gemm.cu.
//
// Constants: those of mainloop.cuh and wgrad_store.cuh.
#include "load.cuh"
#include "wgrad_store.cuh"

constexpr i32 ROWS = BLOCK_M * CLUSTER;
constexpr u32 ROOMS_EACH = OUTPUT == 0 ? ROOMS_USED / 2 : ROOMS;
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

// The accumulators of a warpgroup through the lent stages.
DEVICE void store_tile(float (&acc)[BLOCK_N / 2], const Shared& shared, Ring& ring, Lent& lent, u32 group, const TileNote& note,
                       const TensorMap* map) {
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 thread = fresh_thread_index(), line = own_line(group, thread);
        const i32 row = note.row + static_cast<i32>(line);
        if (turn >= LENT_STAGES) {  // a stage again, once TMA has read it
            tma_wait_read<LENT_STAGES - 1>();
            meet_writers(group);
        }
        const u32 rooms = turn < LENT_STAGES ? lent.borrow(shared, ring) : shared.tile_a(lent.stage_of(turn - LENT_STAGES));
        const u32 lines = rooms + line * LINE;
#pragma unroll
        for (u32 i = 0; i < ROOMS_EACH; ++i) {
            const u32 room = turn * ROOMS_EACH + i;
            if (room < ROOMS_USED) fill_room(acc + room * (ROOM_COLUMNS / 2), lines + i * ROOM_BYTES, thread);
        }
        fence_proxy_async();
        meet_writers(group);
        if (hands_over(thread)) {
#pragma unroll
            for (u32 i = 0; i < ROOMS_EACH; ++i) {
                const u32 room = turn * ROOMS_EACH + i;
                if (room < ROOMS_USED)
                    store_room(map, lines + i * ROOM_BYTES, row, note.column + static_cast<i32>(room * ROOM_COLUMNS), note.expert);
            }
            tma_commit();
        }
    }
}

constexpr u32 WARP_LINES = BLOCK_K / 4;  // rows of the contraction that a loading warp fetches in a stage, with GATHER

// Loads all tiles of this block: for each, the K blocks of its expert. With GATHER the rows change from block to block: a
// warp reads their indices one block ahead, past the end of a tile those of the next, one a lane, and its issuing lane picks them up
// from shared memory.
DEVICE void load_ragged_depth(const Shared& shared, const TensorMap* map_a, const TensorMap* map_b, const i32* offsets, const i32* index,
                              i32 experts, i32 blocks_m, i32 blocks_n) {
    const u32 warp = warp_index();
    if (warp >= LOAD_WARPS) return;
    const i32 rank = CLUSTER > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    const i32 tiles = experts * blocks_m * blocks_n;
    const auto fetch = [&](i32 first, i32 end) {
        const i32 row = first + static_cast<i32>(warp * WARP_LINES + lane_index() % WARP_LINES);
        return GATHER ? index[max(min(row, end - 1), 0)] : 0;  // past the end: loaded, then cleared by the math warps
    };
    Ring ring;
    const i32* rows = offsets + min(static_cast<i32>(blockIdx.x / CLUSTER) / (blocks_m * blocks_n), experts - 1);
    i32 next_begin = rows[0], next_end = rows[1];
    i32 mine = fetch(next_begin, next_end);
    for (i32 tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
        const i32 expert = tile / (blocks_m * blocks_n), begin = next_begin, end = next_end;
        rows = offsets + min(static_cast<i32>(tile + gridDim.x / CLUSTER) / (blocks_m * blocks_n), experts - 1);
        next_begin = rows[0], next_end = rows[1];
        i32 m, n;
        grouped_order<GROUP_M / CLUSTER>(tile % (blocks_m * blocks_n), blocks_m, blocks_n, m, n);
        const i32 blocks_k = max((end - begin + static_cast<i32>(BLOCK_K) - 1) / static_cast<i32>(BLOCK_K), 1);  // none: zeros, once
        const TileNote note{m * ROWS + rank * static_cast<i32>(BLOCK_M), end - begin, n * static_cast<i32>(BLOCK_N), expert, blocks_k};
        for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
            const u32 full = shared.full(ring.stage), tile_a = shared.tile_a(ring.stage);
            const i32 k = begin + block * BLOCK_K;
            if constexpr (GATHER) {
                if (lane_index() < WARP_LINES) store_index(shared.row_index(warp * WARP_LINES + lane_index()), mine);
                mine = block + 1 < blocks_k ? fetch(k + BLOCK_K, end) : fetch(next_begin, next_end);
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
                    for (u32 first = warp * WARP_LINES; first < (warp + 1) * WARP_LINES; first += 4) {
                        i32 rows[4];
                        load_indices(rows, shared.row_index(first));
#pragma unroll
                        for (u32 i = 0; i < 4; ++i) {
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
