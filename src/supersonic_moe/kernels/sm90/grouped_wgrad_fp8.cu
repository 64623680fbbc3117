// D[e] = or += A[:, positions of e] * B[:, positions of e]^T, or its transpose, e4m3 operands with block scales, bf16 or fp32 output.
// See grouped_wgrad_fp8.py. Roles as in grouped_gemm_fp8.cu.
//
// Both operands lie along the contraction, which every expert fills with whole K blocks, so a K block is a box of each and nothing is
// cleared. A tile waits in registers until the next one multiplies: its first 128 columns leave during the first product of that tile,
// the others during the second, each through staging of its own (bf16) or, fp32, through the same 64 KB, once TMA has read them.
//
// Constants: those of mainloop.cuh and wgrad_store.cuh.
#include "mainloop_fp8.cuh"
#include "wgrad_store.cuh"

static_assert(!GATHER && CLUSTER == 1, "whole tiles, each block for itself");
constexpr u32 ROOMS_EACH = ROOMS_USED / 2;  // of half a tile

// The product as the loading warp sees it.
struct RaggedDepth {
    const i32* offsets;  // (experts + 1), positions: multiples of BLOCK_K
    i32 experts, rows, columns;
    const float* scale_b;  // (blocks of columns, blocks of positions), with these strides
    i64 scale_column, scale_k;
};

struct DepthTile {
    TileNote note;  // blocks_k 0: no position, zeros
    i32 first_k;    // K block, of all experts'
    bool found;
};

// The two scales of B, one K block ahead of their use.
struct DepthScales {
    const float *first = nullptr, *second = nullptr;
    float next_first = 0.0f, next_second = 0.0f;
    DEVICE DepthScales(const RaggedDepth& gemm, const DepthTile& tile) {
        if (!tile.found || tile.note.blocks_k == 0) return;  // its positions may start where the scales end
        const i32 column = tile.note.column / 128, last = (gemm.columns - 1) / 128;
        const float* at = gemm.scale_b + tile.first_k * gemm.scale_k;
        next_first = __ldg(first = at + column * gemm.scale_column);
        next_second = __ldg(second = at + min(column + 1, last) * gemm.scale_column);
    }
    DEVICE void advance(const RaggedDepth& gemm) { next_first = __ldg(first += gemm.scale_k), next_second = __ldg(second += gemm.scale_k); }
};

// Loads all tiles of this block: the K blocks of its expert, or one stage with nothing but a note. The next tile's offsets and first scales
// are read while the current one is loaded: each of these reads takes as long as a K block.
DEVICE void load_ragged_depth(const Shared& shared, const RaggedDepth& gemm, const TensorMap* map_a, const TensorMap* map_scale_a,
                              const TensorMap* map_b) {
    const i32 blocks_m = (gemm.rows + static_cast<i32>(BLOCK_M) - 1) / static_cast<i32>(BLOCK_M);
    const i32 blocks_n = (gemm.columns + static_cast<i32>(BLOCK_N) - 1) / static_cast<i32>(BLOCK_N);
    const i32 tiles_each = blocks_m * blocks_n;
    i32 tile = blockIdx.x;
    const auto find = [&]() -> DepthTile {
        for (; tile < gemm.experts * tiles_each; tile += gridDim.x) {
            const i32 expert = tile / tiles_each, begin = gemm.offsets[expert], blocks_k = (gemm.offsets[expert + 1] - begin) / 128;
            if (OUTPUT == 2 && blocks_k == 0) continue;  // nothing to add
            i32 m, n;
            grouped_order<GROUP_M>(tile % tiles_each, blocks_m, blocks_n, m, n);
            tile += gridDim.x;
            return {{m * static_cast<i32>(BLOCK_M), gemm.rows, n * static_cast<i32>(BLOCK_N), expert, blocks_k}, begin / 128, true};
        }
        return {{TileNote::STOP_ROW, 0, 0, 0, 0}, 0, false};
    };
    Ring ring;
    DepthTile now = find();
    DepthScales scales(gemm, now);
    while (now.found) {
        const TileNote note = now.note;
        const i32 first_k = now.first_k, stages = max(note.blocks_k, 1);
        for (i32 block = 0; block < stages; ++block, ring.advance()) {
            const u32 full = shared.full(ring.stage);
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (elect_one()) {
                write_note(shared.note(ring.stage), note);
                if (note.blocks_k == 0) {
                    mbarrier_arrive(full);
                } else {
                    const i32 k = (first_k + block) * static_cast<i32>(BLOCK_K);
                    store_scales(shared.scale_b(ring.stage), scales.next_first, scales.next_second);
                    mbarrier_arrive_expect_tx(full, STAGE_BYTES + SCALE_LOAD_BYTES);
                    tma_load(shared.scale_a(ring.stage), map_scale_a, full, note.row, first_k + block);
                    tma_load(shared.tile_a(ring.stage), map_a, full, k, note.row);
                    tma_load(shared.tile_b(ring.stage), map_b, full, k, note.column);
                }
            }
            if (block + 1 < stages) scales.advance(gemm);
            if (block == 0) now = find();
        }
        scales = DepthScales(gemm, now);
    }
    announce_end(shared, ring, 0);
}

// Where a tile lies in D, as the first 16 bytes of its note say. A tile's note stays with its first stage, which is handed back before
// the tile is stored, so a warp that stores it keeps a copy: in registers it would be three too many in the main loop.
struct TilePlace {
    i32 row, row_end, column, expert;
};
DEVICE TilePlace load_place(u32 note) {
    TilePlace place;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(place.row), "=r"(place.row_end), "=r"(place.column), "=r"(place.expert)
                 : "r"(note)
                 : "memory");
    return place;
}
DEVICE void store_place(u32 copy, const TilePlace& place) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(copy), "r"(place.row), "r"(place.row_end), "r"(place.column),
                 "r"(place.expert)
                 : "memory");
}
// This warp's copy, where a kernel that gathers has row indices.
DEVICE u32 held_note(const Shared& shared) { return shared.row_index(fresh_thread_index() / 32 * 4); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_wgrad_fp8(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_scale_a,
                      const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_d, const i32* offsets, const i32 experts,
                      const i32 rows, const i32 columns, const float* scale_b, const i64 scale_b_column, const i64 scale_b_k) {
    extern __shared__ __align__(1024) u8 raw[];
    const Shared shared{smem_address(raw)};
    shared.prepare();

    const u32 warp = warp_index();
    if (warp < 4) {
        register_dealloc<LOAD_REGISTERS>();
        if (warp > 0) return;
        load_ragged_depth(shared, {offsets, experts, rows, columns, scale_b, scale_b_column, scale_b_k}, &map_a, &map_scale_a, &map_b);
    } else {
        register_alloc<MATH_REGISTERS>();
        const u32 group = warp / 4 - 1;
        const Operands operands(shared, group);
        Ring ring;
        bool held = false;  // a tile is in the accumulators; its note is in shared memory, for the thread that stores it
        float acc[BLOCK_N / 2];
        const auto store_half = [&](u32 half) {
            if (!held) return;
            const u32 thread = fresh_thread_index(), line = own_line(group, thread);
            const u32 lines = shared.staging() + (OUTPUT == 0 ? half * ROOMS_EACH * ROOM_BYTES : 0) + line * LINE;
            if (OUTPUT != 0 || half == 0) {
                tma_wait_read<0>();
                meet_writers(group);
            }
#pragma unroll
            for (u32 i = 0; i < ROOMS_EACH; ++i) fill_room(acc + (half * ROOMS_EACH + i) * (ROOM_COLUMNS / 2), lines + i * ROOM_BYTES, thread);
            fence_proxy_async();
            meet_writers(group);
            if (hands_over(thread)) {
                const TilePlace tile = load_place(held_note(shared));
#pragma unroll
                for (u32 i = 0; i < ROOMS_EACH; ++i)
                    store_room(&map_d, lines + i * ROOM_BYTES, tile.row + static_cast<i32>(line),
                               tile.column + static_cast<i32>((half * ROOMS_EACH + i) * ROOM_COLUMNS), tile.expert);
                tma_commit();
            }
        };
        // The tile whose first stage is this warp's is the one in the accumulators from here on.
        const auto hold = [&] {
            if (hands_over(fresh_thread_index())) store_place(held_note(shared), load_place(shared.note(ring.stage)));
            held = true;
        };
        while (true) {
            const TileNote note = await_note(shared, ring);
            const bool stop = note.row == TileNote::STOP_ROW;
            if (!stop && note.row + static_cast<i32>(group * GROUP_LINES) >= rows) {
                skip_stages(shared, ring, max(note.blocks_k, 1));
                continue;
            }
            if (!stop && note.blocks_k > 0) {
                multiply_stages<false>(acc, shared, operands.of_tile(note.row), ring, note.blocks_k, [&](u32 half) {
                    store_half(half);
                    if (half == 1) hold();
                });
                continue;
            }
            store_half(0);
            store_half(1);
            if (stop) break;
            hold();
#pragma unroll
            for (u32 i = 0; i < BLOCK_N / 2; ++i) acc[i] = 0.0f;
            skip_stages(shared, ring, 1);
        }
        tma_wait_read<0>();
    }
}
