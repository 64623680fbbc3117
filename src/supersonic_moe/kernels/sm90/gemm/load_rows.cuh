// The loading warps of a GEMM with ragged rows: tiles of A and B into the ring, for rows of A as they lie or through an index. Called as
// the `produce` of run_roles.
//
// As they lie, one thread issues TMA loads of whole tiles. Through an index (gather), A comes row by row: TMA on sm_90 has no gather,
// but a box of one row works, 128 of them a stage. The engine keeps up with the tensor cores as long as four warps issue boxes back to
// back, with the indices of their rows at hand in shared memory. With a shuffle for each box the GEMM falls to 0.9 of its speed, with a
// box a lane to 0.55; cp.async, 16 bytes a thread, gives 0.92 (docs/log.md). An index of -1 lies outside the tensor and gives zeros, but
// such boxes are slow: lines past the expert's end repeat its last row, or are not loaded where a warp has no other. What they hold
// reaches no row that is stored. Where a warp's rows of a tile follow each other in A (each token chose the expert, or tokens are
// grouped), one box takes the place of theirs; past the expert's end it has the rows that come next. With share_a the two blocks of a
// cluster have the same rows and neighbouring columns: each gathers half of the rows, for both.
#pragma once
#include "gemm/load_b.cuh"
#include "gemm/scales.cuh"
#include "gemm/shared_memory.cuh"

constexpr u32 HELD = 8;  // row indices in registers at a time

DEVICE void store_index(u32 address, i32 index) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(index) : "memory"); }
DEVICE i32 load_index(u32 address) {
    i32 index;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(index) : "r"(address) : "memory");
    return index;
}
template <u32 Held>
DEVICE void load_indices(i32 (&rows)[Held], u32 address) {
#pragma unroll
    for (u32 i = 0; i < Held; i += 4)
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(rows[i]), "=r"(rows[i + 1]), "=r"(rows[i + 2]), "=r"(rows[i + 3])
                     : "r"(address + i * 4)
                     : "memory");
}

// Whether the rows that a warp gathers follow each other in A, so that one box holds them all. A lane has `row` of line `line`, its own
// number modulo the lines; those `past_end` do not matter. All lanes.
DEVICE bool follow_each_other(i32 row, u32 line, bool past_end) {
    const i32 first = __shfl_sync(0xffffffffu, row, 0);
    return __all_sync(0xffffffffu, past_end || row == first + static_cast<i32>(line));
}

// A box of gathered rows, with share_a for all blocks of the cluster.
template <Config C>
DEVICE void load_gathered(u32 lines, const TensorMap* map, u32 full, i32 k, i32 row) {
    if constexpr (C.share_a) {
        tma_load_multicast(lines, map, full, (1 << C.cluster) - 1, k, row);
    } else {
        tma_load(lines, map, full, k, row);
    }
}

// Rows of A as they lie, by one thread. In e4m3 a box has half of a tile's where two blocks share B: if both have the same rows, each
// loads one half for both.
template <Config C>
DEVICE void load_rows_of_a(u32 tile_a, const TensorMap* map, u32 full, i32 k, i32 row, i32 rank, bool same_rows) {
    if constexpr (C.scaled() && C.cluster == 2) {
        constexpr i32 half = C.block_m / 2;
        if (same_rows) {
            tma_load_multicast(tile_a + rank * (C.bytes_a() / 2), map, full, 3, k, row + rank * half);
        } else {
            tma_load(tile_a, map, full, k, row);
            tma_load(tile_a + C.bytes_a() / 2, map, full, k, row + half);
        }
    } else {
        tma_load(tile_a, map, full, k, row);
    }
}

// The GEMM as the loading warps see it.
struct RaggedGemm {
    const i32* offsets;        // (experts + 1): first row of each expert
    const i32* index;          // row -> row of A's matrix, with gather;
    const TensorMap* map_run;  // and A in boxes of the rows that a warp gathers in a stage
    i32 experts, columns, blocks_k;
};

// Bytes of A that reach a stage of a tile: with gather, the boxes of the warps that have a row of it.
template <Config C>
DEVICE u32 bytes_of_a(const WorkTile& tile) {
    const u32 rows = static_cast<u32>(max(min(tile.row_end - tile.row, static_cast<i32>(C.block_m)), 0));
    return C.gather ? (rows + C.box_rows() - 1) / C.box_rows() * (C.box_rows() * LINE) : C.bytes_a();
}

// A tile as the loading warps walk it.
struct FoundTile {
    WorkTile tile;
    bool own_columns;  // no other block of the cluster has the same
    bool found;
    i32 part;  // round of the schedule
};

// `load_tail` behind a tile's K blocks, as the loader calls it: `load_tail(ring, tile, warp)`, by all warps that load; they wait for each
// stage, and the ring advances. Either nothing,
struct NoTail {
    template <typename Cursor>
    DEVICE void operator()(Cursor&, const WorkTile&, u32) const {}
};
// or stages for the epilogue to borrow.
template <Config C>
struct OfferStages {
    const SharedMemory<C>& shared;
    u32 count;
    DEVICE void operator()(Ring<C>& ring, const WorkTile&, u32 warp) const { offer_stages(shared, ring, count, warp); }
};

// Loads all tiles of this block: blocks_k stages each, of block_m rows of A and of a B of TileColumns columns, then what `load_tail` adds
// (for `load_b` see load_b.cuh). The next tile is looked up, and its indices and first scales are read, while the current one is
// loaded: each of these reads takes as long as a K block. Where rows arrive while the kernel runs, they are read once they are there,
// and behind `load_tail`: the epilogue of a tile must not wait for the next one's rows.
template <i32 TileColumns, Config C, typename AllScales, typename LoadB, typename LoadTail, typename Ready = ReadyAtStart,
          typename Schedule = AllTiles<C>>
DEVICE void load_ragged_rows(const SharedMemory<C>& shared, const RaggedGemm& gemm, const TensorMap* map_a, const AllScales& scales,
                             LoadB load_b, LoadTail load_tail, const Ready ready = {}, const Schedule schedule = {}) {
    const u32 warp = warp_index();
    if (warp >= C.load_warps()) return;
    constexpr i32 rows = C.share_a ? C.block_m : C.block_m * C.cluster, columns = C.share_a ? TileColumns * C.cluster : TileColumns;
    const i32 rank = C.cluster > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    RaggedRows<rows, columns, C.share_a ? C.group_m : C.group_m / C.cluster, !C.share_a && C.cluster == 2, Schedule> tiles(
        gemm.offsets, gemm.experts, gemm.columns, schedule);
    i32 tile_index = schedule.first();
    const auto find = [&] {
        i32 m, n;
        FoundTile found;
        found.found = tiles.find(tile_index, m, n);
        tile_index = schedule.next(tile_index);
        found.own_columns = C.share_a || tiles.split;
        const i32 row = tiles.begin + m * rows + (found.own_columns ? 0 : rank * static_cast<i32>(C.block_m));
        const i32 column = C.share_a ? (n * static_cast<i32>(C.cluster) + rank) * TileColumns : (tiles.split ? n + rank : n) * TileColumns;
        found.tile = {row, tiles.end, column, tiles.expert, gemm.blocks_k};
        found.part = tiles.part;
        return found;
    };
    // Row of A's matrix that line `line` of a tile reads; past the expert's end, its last.
    const auto row_of = [&](const WorkTile& tile, u32 line) {
        return C.gather ? load_input<Ready>(gemm.index + max(min(tile.row + static_cast<i32>(line), tile.row_end - 1), 0)) : 0;
    };
    const u32 first_line = (C.share_a ? rank * (C.block_m / C.cluster) : 0) + warp * C.box_rows();  // this warp's boxes, with gather
    const u32 box_line = first_line + lane_index() % C.box_rows(), scale_line = warp * (C.block_m / 4) + lane_index() % (C.block_m / 4);

    Ring<C> ring;
    i32 part = 0;  // whose rows are there
    FoundTile now = find();
    if (now.found) {
        ready.wait(now.tile);
        i32 box_row = row_of(now.tile, box_line), scale_row = C.share_a ? row_of(now.tile, scale_line) : box_row;
        TileScales<C, Ready, AllScales> tile_scales(scales, now.tile, scale_row);
        while (true) {
            const WorkTile tile = now.tile;
            if constexpr (Schedule::CLIPS) {
                if (now.part != part) schedule.wait_for(part = now.part);
            }
            // Blocks with the same columns load a part of B each, for all of them; one that has its columns for itself loads every part.
            const u32 first_part = now.own_columns ? 0 : static_cast<u32>(rank), parts = now.own_columns ? C.cluster : 1;
            const u16 sharers = static_cast<u16>(now.own_columns ? 1 << rank : (1 << C.cluster) - 1);
            const bool same_rows = now.own_columns;  // as the other block of the cluster
            const bool has_rows = tile.row + static_cast<i32>(first_line) < tile.row_end;
            bool is_run = false;
            if constexpr (C.gather) {
                const u32 line = lane_index() % C.box_rows();
                store_index(shared.row_index(warp * C.box_rows() + line), box_row);
                is_run = follow_each_other(box_row, line, tile.row + static_cast<i32>(box_line) >= tile.row_end);
                __syncwarp();
            }
            for (i32 block = 0; block < gemm.blocks_k; ++block, ring.advance()) {
                const u32 full = shared.full(ring.stage), tile_a = shared.tile_a(ring.stage);
                const i32 k = block * C.block_k();
                mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
                if constexpr (C.scaled() && C.gather) {
                    store_scale(shared.scale_a(ring.stage) + scale_line * 4, tile_scales.next_a);
                    __syncwarp();
                    if (warp > 0 && arrives_full<C>()) mbarrier_arrive(full);
                }
                const bool loads_b = warp == 0 && elect_one();
                if (C.full_arrivals() > C.full_warps() && warp == 0 && !loads_b) mbarrier_arrive(full);
                if (loads_b) {
                    write_work_tile(shared.work_tile(ring.stage), tile);
                    if constexpr (C.scaled()) store_scales(shared.scale_b(ring.stage), tile_scales.next_first, tile_scales.next_second);
                    const u32 scale_bytes = C.scaled() && !C.gather ? C.scale_load_bytes() : 0;
                    mbarrier_arrive_expect_tx(full, bytes_of_a<C>(tile) + C.bytes_b() + scale_bytes);
                    if constexpr (!C.gather) {
                        if constexpr (C.scaled()) tma_load(shared.scale_a(ring.stage), scales.map_a, full, tile.row / 4 * 4, block);
                        load_rows_of_a<C>(tile_a, map_a, full, k, tile.row, rank, same_rows);
                    }
#pragma unroll 1
                    for (u32 part = first_part; part < first_part + parts; ++part)
                        load_b(shared.tile_b(ring.stage), full, k, tile, part, sharers);
                }
                // The next scales are asked for ahead of the boxes, whose issue takes as long as L2 does; behind them the warp would wait.
                if constexpr (C.scaled()) {
                    if (block + 1 < gemm.blocks_k) tile_scales.advance(scales, warp);
                }
                if constexpr (C.gather) {
                    if (has_rows && elect_one()) {
                        const u32 indices = shared.row_index(warp * C.box_rows()), lines = tile_a + first_line * LINE;
                        if (is_run) {
                            load_gathered<C>(lines, gemm.map_run, full, k, load_index(indices));
                        } else {
#pragma unroll
                            for (u32 first = 0; first < C.box_rows(); first += HELD) {
                                i32 rows_of_a[HELD];
                                load_indices(rows_of_a, indices + first * 4);
#pragma unroll
                                for (u32 i = 0; i < HELD; ++i)
                                    load_gathered<C>(lines + (first + i) * LINE, map_a, full, k, rows_of_a[i]);
                            }
                        }
                    }
                    __syncwarp();
                }
                if (block == (C.scaled() ? 0 : gemm.blocks_k - 1)) {
                    now = find();
                    if (C.gather && !Ready::WAITS && now.found) {
                        box_row = row_of(now.tile, box_line);
                        scale_row = C.share_a ? row_of(now.tile, scale_line) : box_row;
                    }
                }
            }
            if constexpr (!Ready::WAITS) {
                if (now.found) tile_scales = TileScales<C, Ready, AllScales>(scales, now.tile, scale_row);
            }
            load_tail(ring, tile, warp);
            if constexpr (Ready::WAITS) {
                if (now.found) {
                    ready.wait(now.tile);
                    box_row = row_of(now.tile, box_line);
                    scale_row = C.share_a ? row_of(now.tile, scale_line) : box_row;
                    tile_scales = TileScales<C, Ready, AllScales>(scales, now.tile, scale_row);
                }
            }
            if (!now.found) break;
        }
    }
    announce_end(shared, ring, warp);
}
