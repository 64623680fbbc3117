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
    constexpr u32 slabs_b = (C.slabs_n() + C.math_groups - 1) / C.math_groups;
    const u32 slabs = 1 + (C.slabs_n() % C.math_groups == 0 ? slabs_b : min(slabs_b, C.slabs_n() - group * slabs_b));
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

// As a math warpgroup sees it (see FixedDepth). For LastRows see load_ragged_depth.
template <bool LastRows = false>
struct RaggedDepth {
    static constexpr bool SKIPS = LastRows;
    static constexpr Major A = Major::MN;
    struct Extent {
        i32 blocks_k, valid;  // rows of the last block
        template <Config C>
        DEVICE void before_last_block(const SharedMemory<C>& shared, u32 stage, u32 group) const {
            if (valid < static_cast<i32>(C.block_k())) clear_rows(shared, stage, group, valid);
        }
    };
    i32 block_k, rows;  // rows: of the output
    DEVICE i32 row_end(const WorkTile&) const { return rows; }
    DEVICE Extent of_tile(const WorkTile& first) const { return {first.blocks_k, first.row_end - (first.blocks_k - 1) * block_k}; }
};

// The weight gradient as the loading warps see it.
struct DepthGemm {
    const i32* offsets;               // (experts + 1): first row of each expert
    const i32* index;                 // row -> row of A's matrix, with gather;
    const TensorMap* map_run;         // and A in boxes of WARP_LINES rows
    i32 experts, blocks_m, blocks_n;  // blocks_m: of a cluster
    i32 rows;                         // of the output
};

template <Config C>
constexpr u32 WARP_LINES = C.block_k() / 4;  // rows of the contraction that a loading warp fetches in a stage, with gather

// This warp's rows of a stage, columns from `column` on, through the indices in shared memory. One thread.
template <u32 Slabs, Config C>
DEVICE void gather_slabs(const SharedMemory<C>& shared, u32 tile_a, const TensorMap* map_a, u32 full, i32 column, u32 warp) {
#pragma unroll
    for (u32 first = warp * WARP_LINES<C>; first < (warp + 1) * WARP_LINES<C>; first += 4) {
        i32 rows[4];
        load_indices(rows, shared.row_index(first));
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
#pragma unroll
            for (u32 slab = 0; slab < Slabs; ++slab)
                tma_load(tile_a + (first + i) * LINE + slab * C.slab_bytes(), map_a, full, column + static_cast<i32>(slab * 64), rows[i]);
        }
    }
}

// Loads all tiles of this block: for each, the K blocks of its expert, then stages for the epilogue to borrow, unless it adds nothing.
// With gather the rows change from block to block: a warp reads their indices one block ahead, past the end of a tile those of
// the next, one a lane, and its issuing lane picks them up from shared memory; where they follow each other, one box of a slab holds them.
//
// LastRows, for outputs whose rows are no multiple of a cluster's: where the last rows fit into one block, the two blocks take
// neighbouring columns of them (paired_order), slabs of A past the last row are not loaded, and a warpgroup past it multiplies nothing.
// Outputs that tiles fill would pay 3 % for it.
template <u32 BorrowedByTile, bool LastRows = false, Config C, typename Schedule = AllTiles<C>>
DEVICE void load_ragged_depth(const SharedMemory<C>& shared, const DepthGemm& gemm, const TensorMap* map_a, const TensorMap* map_b,
                              const bool adds, const Schedule schedule = {}) {
    const u32 warp = warp_index();
    if (warp >= C.load_warps()) return;
    const i32 rank = C.cluster > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    constexpr i32 block_k = C.block_k();
    static_assert(!LastRows || C.cluster == 2, "two blocks take neighbouring columns of the last rows");
    constexpr i32 rows = C.block_m * C.cluster;
    const bool short_tail = LastRows && gemm.rows <= (gemm.blocks_m - 1) * rows + static_cast<i32>(C.block_m);
    const i32 full_m = short_tail ? gemm.blocks_m - 1 : gemm.blocks_m, pairs_n = gemm.blocks_n / 2;
    const i32 tiles_each = full_m * gemm.blocks_n + (short_tail ? gemm.blocks_n - pairs_n : 0), tiles = gemm.experts * tiles_each;
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
        bool split = false;
        if constexpr (LastRows) {
            split = paired_order<C.group_m / C.cluster>(index % tiles_each, full_m, gemm.blocks_n, pairs_n, m, n);
        } else {
            grouped_order<C.group_m / C.cluster>(index % tiles_each, gemm.blocks_m, gemm.blocks_n, m, n);
        }
        const i32 blocks_k = max((end - begin + block_k - 1) / block_k, 1);  // without rows: zeros, once
        const WorkTile tile{m * rows + (split ? 0 : rank * static_cast<i32>(C.block_m)), end - begin,
                            (split ? n + rank : n) * static_cast<i32>(C.block_n), expert, blocks_k};
        const u32 slabs = LastRows ? min(C.slabs_m(), static_cast<u32>(max((gemm.rows - tile.row + 63) / 64, 0))) : C.slabs_m();
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
                mbarrier_arrive_expect_tx(full, slabs * C.slab_bytes() + C.bytes_b());
                if constexpr (!C.gather) {
#pragma unroll
                    for (u32 slab = 0; slab < C.slabs_m(); ++slab)
                        if (slab < slabs) tma_load(tile_a + slab * C.slab_bytes(), map_a, full, tile.row + static_cast<i32>(slab * 64), k);
                }
                const auto load_part = [&](u32 part, u16 blocks) {
                    load_b_mn_major<C>(shared.tile_b(ring.stage), map_b, full, k, tile.column, 0, part, blocks);
                };
                if (split) {  // both parts, for this block alone
#pragma unroll 1
                    for (u32 part = 0; part < C.cluster; ++part) load_part(part, 1 << rank);
                } else {
                    load_part(cluster_block_rank(), (1 << C.cluster) - 1);
                }
            }
            if constexpr (C.gather) {
                if (elect_one()) {
                    if (is_run) {
                        const u32 lines = tile_a + warp * WARP_LINES<C> * LINE;
                        const i32 first = load_index(shared.row_index(warp * WARP_LINES<C>));
#pragma unroll
                        for (u32 slab = 0; slab < C.slabs_m(); ++slab)
                            if (slab < slabs)
                                tma_load(lines + slab * C.slab_bytes(), gemm.map_run, full, tile.row + static_cast<i32>(slab * 64), first);
                    } else if (!LastRows || slabs == C.slabs_m()) {
                        gather_slabs<C.slabs_m()>(shared, tile_a, map_a, full, tile.row, warp);
                    } else if (C.slabs_m() > 1 && slabs == 1) {
                        gather_slabs<1>(shared, tile_a, map_a, full, tile.row, warp);
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
