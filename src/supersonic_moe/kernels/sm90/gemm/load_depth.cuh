// A contraction over the rows of an expert, bf16: the weight gradient. Rows are the outer dimension of both operands, so both are MN-major.
// First what math warps know of it, then the loading warps, called as the `produce` of run_roles.
//
// In the work tile, row_end is the number of rows of the contraction.
#pragma once
#include "gemm/load_rows.cuh"
#include "ptx/wgmma.cuh"

// Rows past the expert's end belong to the next one, or to nobody: zero them in both operands (0 * NaN is NaN). Each warpgroup
// clears its slab of A and its share of B's; all have done so before any multiplies.
template <Config C>
DEVICE void clear_rows(const SharedMemory<C>& shared, u32 stage, u32 group, u32 valid) {
    static_assert(C.slabs_n() % C.math_groups == 0, "warpgroups clear whole slabs of B");
    constexpr u32 slabs_b = C.slabs_n() / C.math_groups, slabs = 1 + slabs_b;
    const u32 thread = fresh_thread_index() % 128;
    const u32 a = shared.tile_a(stage) + group * C.slab_bytes(), b = shared.tile_b(stage) + group * slabs_b * C.slab_bytes();
    for (u32 unit = thread; unit < slabs * 512; unit += 128) {  // 512 units of 16 bytes a slab
        const u32 slab = unit / 512, line = unit % 512 / 8;
        const u32 at = (slab == 0 ? a : b + (slab - 1) * C.slab_bytes()) + unit % 512 * 16;
        if (line >= valid) asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_proxy_async();
    sync_math_warps<C>();
}

// As a math warpgroup sees it (see FixedDepth).
struct RaggedDepth {
    static constexpr bool SKIPS = false;
    static constexpr Major A = Major::MN;
    struct Extent {
        i32 blocks_k, valid;  // rows of the last block
        template <Config C>
        DEVICE void before_last_block(const SharedMemory<C>& shared, u32 stage, u32 group) const {
            if (valid < static_cast<i32>(C.block_k())) clear_rows(shared, stage, group, valid);
        }
    };
    i32 block_k;
    DEVICE Extent of_tile(const WorkTile& first) const { return {first.blocks_k, first.row_end - (first.blocks_k - 1) * block_k}; }
};

// The weight gradient as the loading warps see it.
struct DepthGemm {
    const i32* offsets;               // (experts + 1): first row of each expert
    const i32* index;                 // row -> row of A's matrix, with gather;
    const TensorMap* map_run;         // and A in boxes of WARP_LINES rows
    i32 experts, blocks_m, blocks_n;  // blocks_m: of a cluster
};

template <Config C>
constexpr u32 WARP_LINES = C.block_k() / 4;  // rows of the contraction that a loading warp fetches in a stage, with gather

// Loads all tiles of this block: for each, the K blocks of its expert, then stages for the epilogue to borrow, unless it adds nothing.
// With gather the rows change from block to block: a warp reads their indices one block ahead, past the end of a tile those of
// the next, one a lane, and its issuing lane picks them up from shared memory; where they follow each other, one box of a slab holds them.
template <u32 BorrowedByTile, Config C, typename Schedule = AllTiles<C>>
DEVICE void load_ragged_depth(const SharedMemory<C>& shared, const DepthGemm& gemm, const TensorMap* map_a, const TensorMap* map_b,
                              const bool adds, const Schedule schedule = {}) {
    const u32 warp = warp_index();
    if (warp >= C.load_warps()) return;
    const i32 rank = C.cluster > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    constexpr i32 block_k = C.block_k();
    const i32 tiles_each = gemm.blocks_m * gemm.blocks_n, tiles = gemm.experts * tiles_each;
    const auto fetch = [&](i32 first, i32 end) {
        const i32 row = first + static_cast<i32>(warp * WARP_LINES<C> + lane_index() % WARP_LINES<C>);
        return C.gather ? gemm.index[max(min(row, end - 1), 0)] : 0;  // past the end: loaded, then cleared by the math warps
    };
    i32 next_begin, next_end;
    const auto look_up = [&](i32 index) {  // rows of the tile's expert
        const i32 expert = min(index / tiles_each, gemm.experts - 1);
        next_begin = gemm.offsets[expert], next_end = gemm.offsets[expert + 1];
        if constexpr (Schedule::CLIPS) schedule.clip(expert, next_begin, next_end);
    };
    Ring<C> ring;
    i32 index = schedule.first();
    look_up(index);
    i32 mine = fetch(next_begin, next_end);
    while (index < tiles) {
        const i32 expert = index / tiles_each, begin = next_begin, end = next_end, next_index = schedule.next(index);
        look_up(next_index);
        i32 m, n;
        grouped_order<C.group_m / C.cluster>(index % tiles_each, gemm.blocks_m, gemm.blocks_n, m, n);
        const i32 blocks_k = max((end - begin + block_k - 1) / block_k, 1);  // without rows: zeros, once
        const WorkTile tile{m * static_cast<i32>(C.block_m * C.cluster) + rank * static_cast<i32>(C.block_m), end - begin,
                            n * static_cast<i32>(C.block_n), expert, blocks_k};
        for (i32 block = 0; block < blocks_k; ++block, ring.advance()) {
            const u32 full = shared.full(ring.stage), tile_a = shared.tile_a(ring.stage);
            const i32 k = begin + block * block_k;
            bool is_run = false;
            if constexpr (C.gather) {
                const u32 line = lane_index() % WARP_LINES<C>;
                if (lane_index() < WARP_LINES<C>) store_index(shared.row_index(warp * WARP_LINES<C> + line), mine);
                is_run = follow_each_other(mine, line, k + static_cast<i32>(warp * WARP_LINES<C> + line) >= end);
                mine = block + 1 < blocks_k ? fetch(k + block_k, end) : fetch(next_begin, next_end);
                __syncwarp();
            }
            mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
            if (begin == end) {
                if (warp == 0 && elect_one()) {
                    write_work_tile(shared.work_tile(ring.stage), tile);
                    mbarrier_arrive(full);
                }
                continue;
            }
            if (warp == 0 && elect_one()) {
                write_work_tile(shared.work_tile(ring.stage), tile);
                mbarrier_arrive_expect_tx(full, C.stage_bytes());
                if constexpr (!C.gather) {
#pragma unroll
                    for (u32 slab = 0; slab < C.slabs_m(); ++slab)
                        tma_load(tile_a + slab * C.slab_bytes(), map_a, full, tile.row + static_cast<i32>(slab * 64), k);
                }
                load_b_mn_major<C>(shared.tile_b(ring.stage), map_b, full, k, tile.column, 0, cluster_block_rank(), (1 << C.cluster) - 1);
            }
            if constexpr (C.gather) {
                if (elect_one()) {
                    const u32 indices = shared.row_index(warp * WARP_LINES<C>), lines = tile_a + warp * WARP_LINES<C> * LINE;
                    const auto load_slabs = [&](const TensorMap* map, u32 at, i32 row) {
#pragma unroll
                        for (u32 slab = 0; slab < C.slabs_m(); ++slab)
                            tma_load(at + slab * C.slab_bytes(), map, full, tile.row + static_cast<i32>(slab * 64), row);
                    };
                    if (is_run) {
                        load_slabs(gemm.map_run, lines, load_index(indices));
                    } else {
#pragma unroll
                        for (u32 first = 0; first < WARP_LINES<C>; first += 4) {
                            i32 rows[4];
                            load_indices(rows, indices + first * 4);
#pragma unroll
                            for (u32 i = 0; i < 4; ++i) load_slabs(map_a, lines + (first + i) * LINE, rows[i]);
                        }
                    }
                }
                __syncwarp();
            }
        }
        if (!adds || begin < end) offer_stages(shared, ring, BorrowedByTile, warp);
        index = next_index;
    }
    announce_end(shared, ring, warp);
}
