// The loading warpgroup: tiles of A and B into the ring, for kernels whose A has ragged rows, and rows of A by an index.
//
// Without GATHER one thread issues TMA loads of whole tiles. With GATHER, A comes row by row: TMA on sm_90 has no gather, but a box
// of one row works, 128 of them a stage. The engine keeps up with the tensor cores as long as four warps issue boxes back to back, with
// the indices of their rows at hand in shared memory. With a shuffle for each box the GEMM falls to 0.9 of its speed, with a box a
// lane to 0.55; cp.async, 16 bytes a thread, gives 0.92 (docs/log.md). An index of -1 lies outside the
// tensor and gives zeros, but such boxes are slow: lines past the expert's end repeat its last row, or are not loaded where a warp
// has no other. What they hold reaches no row that is stored. With SHARE_A the two blocks of a cluster have the same rows and
// neighbouring columns: each gathers half of the rows, for both.
#pragma once
#include "epilogue/staging.cuh"
#include "gemm/ready.cuh"

constexpr u32 HELD = 8;    // row indices in registers at a time

DEVICE void store_index(u32 address, i32 index) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(index) : "memory"); }
template <u32 Held>
DEVICE void load_indices(i32 (&rows)[Held], u32 address) {
#pragma unroll
    for (u32 i = 0; i < Held; i += 4)
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(rows[i]), "=r"(rows[i + 1]), "=r"(rows[i + 2]), "=r"(rows[i + 3])
                     : "r"(address + i * 4)
                     : "memory");
}

// The loading warps' last word: one more stage, empty, whose tile says that no tile follows.
template <Config C>
DEVICE void announce_end(const SharedMemory<C>& shared, const Ring<C>& ring, u32 warp) {
    mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
    if (warp >= C.full_warps()) return;
    if (warp == 0 && elect_one()) write_work_tile(shared.work_tile(ring.stage), {WorkTile::STOP_ROW, 0, 0, 0, 0});
    __syncwarp();
    if (arrives_full<C>()) mbarrier_arrive(shared.full(ring.stage));
}

// A GEMM with ragged rows as the loading warpgroup sees it.
struct RaggedGemm {
    const i32* offsets;  // (experts + 1)
    const i32* index;    // row -> row of A's matrix, with GATHER
    i32 experts, columns, blocks_k;
};

// Block scales as the loading warpgroup sees them, with SCALED. Those of A lie by K block, (K blocks, rows), for TMA; with GATHER by
// row, (rows, K blocks): a lane reads its row's one K block ahead. A tile has two of B, for the blocks of 128 columns that
// `blocks_of(tile)` names; the thread that loads B reads them one K block ahead and leaves them beside the tile.
template <typename BlocksOf>
struct Scales {
    const TensorMap* map_a;
    const float* a;
    i64 a_row;
    const float* b;  // (experts, blocks of columns, K blocks), with these strides
    i64 b_expert;
    i32 b_column, b_k;
    BlocksOf blocks_of;
};
struct Unscaled {};
struct ColumnBlocks {
    i32 first, second;
};

DEVICE void store_scale(u32 address, float scale) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(scale) : "memory"); }
DEVICE void store_scales(u32 address, float first, float second) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

// The scales of one tile, one K block ahead of their use. `row`: of A's matrix, this lane's, with GATHER.
template <Config C, typename AllScales>
struct TileScales {
    DEVICE TileScales(const AllScales&, const WorkTile&, i32) {}
};
template <Config C, typename BlocksOf>
struct TileScales<C, Scales<BlocksOf>> {
    const float *a = nullptr, *first, *second;
    float next_a = 0.0f, next_first, next_second;
    DEVICE TileScales(const Scales<BlocksOf>& scales, const WorkTile& tile, i32 row) {
        if constexpr (C.gather) next_a = __ldg(a = scales.a + max(row, 0) * scales.a_row);
        const ColumnBlocks blocks = scales.blocks_of(tile);
        const float* b = scales.b + tile.expert * scales.b_expert;
        next_first = __ldg(first = b + static_cast<i64>(blocks.first) * scales.b_column);
        next_second = __ldg(second = b + static_cast<i64>(blocks.second) * scales.b_column);
    }
    DEVICE void advance(const Scales<BlocksOf>& scales, u32 warp) {
        if constexpr (C.gather) next_a = __ldg(++a);
        if (warp == 0) next_first = __ldg(first += scales.b_k), next_second = __ldg(second += scales.b_k);
    }
};

// Bytes of A that reach a stage of a tile: the boxes that have a row of it, with GATHER.
template <Config C>
DEVICE u32 bytes_of_a(const WorkTile& tile) {
    const u32 rows = static_cast<u32>(max(min(tile.row_end - tile.row, static_cast<i32>(C.block_m)), 0));
    return C.gather ? (rows + C.boxes() - 1) / C.boxes() * (C.boxes() * LINE) : C.bytes_a();
}

// A tile as the loading warps walk it.
struct FoundTile {
    WorkTile tile;
    bool own_columns;  // no other block of the cluster has the same
    bool found;
};

// Loads all tiles of this block: `blocks_k` stages each, of BLOCK_M rows of A and of a B of TileColumns columns, then what
// `load_tail` adds to a tile. The next tile is looked up, and its indices and first scales are read, while the current one is loaded:
// each of these reads takes as long as a K block.
//   load_b(tile_b, full, k, tile, part, blocks)  one thread: part `part` of CLUSTER of B, for those `blocks` of the cluster
//   load_tail(ring, tile, warp)       all warps that load: they wait for each stage; advances the ring
template <i32 TileColumns, Config C, typename AllScales, typename LoadB, typename LoadTail, typename Ready = ReadyAtStart, typename Schedule = AllTiles<C>>
DEVICE void load_ragged_rows(const SharedMemory<C>& shared, const RaggedGemm& gemm, const TensorMap* map_a, const AllScales& scales, LoadB load_b,
                             LoadTail load_tail, const Ready ready = {}, Schedule schedule = {}) {
    const u32 warp = warp_index();
    if (warp >= C.load_warps()) return;
    constexpr i32 rows = C.share_a ? C.block_m : C.block_m * C.cluster, columns = C.share_a ? TileColumns * C.cluster : TileColumns;
    const i32 rank = C.cluster > 1 ? static_cast<i32>(cluster_block_rank()) : 0;
    RaggedRows<rows, columns, C.share_a ? C.group_m : C.group_m / C.cluster, !C.share_a && C.cluster == 2, Schedule> tiles(gemm.offsets, gemm.experts, gemm.columns, schedule);
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
        return found;
    };
    // Row of A's matrix that line `line` of a tile reads; past the expert's end, its last.
    const auto row_of = [&](const WorkTile& tile, u32 line) {
        return C.gather ? gemm.index[max(min(tile.row + static_cast<i32>(line), tile.row_end - 1), 0)] : 0;
    };
    const u32 first_line = (C.share_a ? rank * (C.block_m / C.cluster) : 0) + warp * C.boxes();  // this warp's boxes, with GATHER
    const u32 box_line = first_line + lane_index() % C.boxes(), scale_line = warp * 32 + lane_index();

    Ring<C> ring;
    FoundTile now = find();
    if (now.found) {
        i32 box_row = row_of(now.tile, box_line), scale_row = C.share_a ? row_of(now.tile, scale_line) : box_row;
        ready.wait(now.tile);
        TileScales<C, AllScales> tile_scales(scales, now.tile, scale_row);
        while (true) {
            const WorkTile tile = now.tile;
            // Blocks with the same columns load a part of B each, for all of them; one that has its columns for itself loads every part.
            const u32 first_part = now.own_columns ? 0 : static_cast<u32>(rank), parts = now.own_columns ? C.cluster : 1;
            const u16 sharers = static_cast<u16>(now.own_columns ? 1 << rank : (1 << C.cluster) - 1);
            const bool has_rows = tile.row + static_cast<i32>(first_line) < tile.row_end;
            if constexpr (C.gather) {
                store_index(shared.row_index(warp * C.boxes() + lane_index() % C.boxes()), box_row);
                __syncwarp();
            }
            for (i32 block = 0; block < gemm.blocks_k; ++block, ring.advance()) {
                const u32 full = shared.full(ring.stage), tile_a = shared.tile_a(ring.stage);
                const i32 k = block * C.block_k();
                mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
                if constexpr (C.scaled && C.gather) {
                    store_scale(shared.scale_a(ring.stage) + scale_line * 4, tile_scales.next_a);
                    __syncwarp();
                    if (warp > 0 && arrives_full<C>()) mbarrier_arrive(full);
                }
                const bool loads_b = warp == 0 && elect_one();
                if (C.full_arrivals() > C.full_warps() && warp == 0 && !loads_b) mbarrier_arrive(full);
                if (loads_b) {
                    write_work_tile(shared.work_tile(ring.stage), tile);
                    if constexpr (C.scaled) store_scales(shared.scale_b(ring.stage), tile_scales.next_first, tile_scales.next_second);
                    mbarrier_arrive_expect_tx(full, bytes_of_a<C>(tile) + C.bytes_b() + (C.scaled && !C.gather ? C.scale_load_bytes() : 0));
                    if constexpr (!C.gather) {
                        if constexpr (C.scaled) tma_load(shared.scale_a(ring.stage), scales.map_a, full, tile.row / 4 * 4, block);
                        tma_load(tile_a, map_a, full, k, tile.row);
                    }
#pragma unroll 1
                    for (u32 part = first_part; part < first_part + parts; ++part)
                        load_b(shared.tile_b(ring.stage), full, k, tile, part, sharers);
                }
                if constexpr (C.gather) {
                    if (has_rows && elect_one()) {
#pragma unroll
                        for (u32 first = 0; first < C.boxes(); first += HELD) {
                            i32 rows_of_a[HELD];
                            load_indices(rows_of_a, shared.row_index(warp * C.boxes() + first));
#pragma unroll
                            for (u32 i = 0; i < HELD; ++i) {
                                const u32 line = tile_a + (first_line + first + i) * LINE;
                                if constexpr (C.share_a) {
                                    tma_load_multicast(line, map_a, full, (1 << C.cluster) - 1, k, rows_of_a[i]);
                                } else {
                                    tma_load(line, map_a, full, k, rows_of_a[i]);
                                }
                            }
                        }
                    }
                    __syncwarp();
                }
                if constexpr (C.scaled) {
                    if (block + 1 < gemm.blocks_k) tile_scales.advance(scales, warp);
                }
                if (block == (C.scaled ? 0 : gemm.blocks_k - 1)) {
                    now = find();
                    if (C.gather && now.found) {
                        box_row = row_of(now.tile, box_line);
                        scale_row = C.share_a ? row_of(now.tile, scale_line) : box_row;
                    }
                }
            }
            if constexpr (!Ready::WAITS) {  // ahead of time
                if (now.found) tile_scales = TileScales<C, AllScales>(scales, now.tile, scale_row);
            }
            load_tail(ring, tile, warp);
            if constexpr (Ready::WAITS) {  // the epilogue of this tile must not wait for the next one's rows
                if (now.found) {
                    ready.wait(now.tile);
                    tile_scales = TileScales<C, AllScales>(scales, now.tile, scale_row);
                }
            }
            if (!now.found) break;
        }
    }
    announce_end(shared, ring, warp);
}

// Part `part` of CLUSTER of an N-contiguous B, BLOCK_N columns from first_column on in slabs of 64: rows k.. of slice `slice`.
template <Config C>
DEVICE void load_b_mn_major(u32 tile_b, const TensorMap* map, u32 full, i32 k, i32 first_column, i32 slice, u32 part, u16 blocks) {
    constexpr u32 slabs = C.slabs_n() / C.cluster;
#pragma unroll
    for (u32 i = 0; i < slabs; ++i) {
        const u32 at = tile_b + (part * slabs + i) * C.slab_bytes();
        const i32 column = first_column + static_cast<i32>((part * slabs + i) * 64);
        if constexpr (C.cluster > 1) {
            tma_load_multicast(at, map, full, blocks, column, k, slice);
        } else {
            tma_load(at, map, full, column, k, slice);
        }
    }
}
